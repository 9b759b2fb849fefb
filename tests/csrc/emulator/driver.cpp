// A stand-in for libcuda.so.1: the few calls that csrc/common/driver.cpp makes. A "cubin" is a kernel's name.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "device.h"

#include "common/copy_engine.cuh"

namespace {

using Run = void (*)(const void*);
constexpr int kInvalid = 1, kNotFound = 500, kHangs = 719;

// CUlaunchConfig, with what csrc/common/driver.cpp asks for: the blocks of a cluster, and that the kernel may begin early.
constexpr int kClusterDims = 4, kEarly = 6;
struct LaunchAttribute {
  int id, padding;
  unsigned cluster[16];
};
struct LaunchConfig {
  unsigned grid[3], threads[3], shared_bytes;
  void* stream;
  const LaunchAttribute* attribute;
  unsigned attributes;
};
constexpr size_t kStackBytes = 64 * 1024;
constexpr unsigned kNever = ~0u;
constexpr int kResident = 3;  // clusters

using Kernels = std::map<std::string, Run>;  // of a cubin, by symbol

std::map<std::string, Kernels>& cubins() {
  static std::map<std::string, Kernels> all;
  return all;
}

void* current_context = nullptr;
jmp_buf scheduler;
Run running = nullptr;
const void* running_params = nullptr;

// A thread of one of the blocks that run together.
struct Fiber {
  ucontext_t beginning;
  jmp_buf place;  // where it goes on
  bool began = false;
  unsigned block;
  bool finished = false;
  unsigned long long exchanged = 0;
  unsigned came_at = kNever;  // how often its block had met when it came to that barrier last
  unsigned cluster_at = 0;    // how often the cluster had met when it came to that one last
  bool waits_for_cluster = false;
  const unsigned long long* waits_for_zero = nullptr;
};
std::vector<Fiber> fibers;  // by block, then by thread
unsigned current = 0;

// A context begins a fiber; to and fro it goes by jumps, which make no system call.
void give_way() {
  if (_setjmp(fibers[current].place) == 0) _longjmp(scheduler, 1);
}
void let_run(Fiber& fiber) {
  if (_setjmp(scheduler) != 0) return;
  if (fiber.began) _longjmp(fiber.place, 1);
  fiber.began = true;
  setcontext(&fiber.beginning);
}

// Threads that meet: a fiber goes on when all of the group came.
struct Meeting {
  unsigned came = 0, times = 0;

  void arrive(unsigned size) {
    if (++came < size) return;
    came = 0;
    ++times;
  }
  void meet(unsigned size) {
    const unsigned now = times;
    arrive(size);
    while (times == now) give_way();
  }
};
constexpr unsigned kWarp = 32;
std::vector<Meeting> of_blocks, of_warps;
Meeting of_cluster;
std::vector<std::vector<unsigned char>> shared_of_blocks;
unsigned first_block = 0;  // of the cluster, along x

unsigned warps() { return (blockDim.x + kWarp - 1) / kWarp; }
unsigned first_lane() { return current - threadIdx.x % kWarp; }
unsigned lanes() { return std::min(kWarp, blockDim.x - (threadIdx.x - threadIdx.x % kWarp)); }

void meet_warp() { of_warps[fibers[current].block * warps() + threadIdx.x / kWarp].meet(lanes()); }

void start_thread() {
  running(running_params);
  fibers[current].finished = true;
  _longjmp(scheduler, 1);
}

bool can_run(const Fiber& fiber) {
  const bool in_block = fiber.came_at != of_blocks[fiber.block].times;
  const bool in_cluster = !fiber.waits_for_cluster || fiber.cluster_at != of_cluster.times;
  return !fiber.finished && in_block && in_cluster && (fiber.waits_for_zero == nullptr || *fiber.waits_for_zero == 0);
}

// One warp goes on up to a barrier of the block before the next begins: what was missing there would be seen. Its
// threads in turn; false where all of them wait.
bool run_warp(unsigned block, unsigned first) {
  bool ran = false;
  for (unsigned i = first; i < std::min(first + kWarp, blockDim.x); ++i) {
    threadIdx.x = emulated_reverse ? blockDim.x - 1 - i : i;
    current = block * blockDim.x + threadIdx.x;
    if (!can_run(fibers[current])) continue;
    blockIdx.x = first_block + block;
    let_run(fibers[current]);
    ran = true;
  }
  return ran;
}

// All warps, each up to a barrier; false where all of them wait.
bool run_block(unsigned block) {
  bool ran = false;
  for (unsigned first = 0; first < blockDim.x; first += kWarp) {
    while (run_warp(block, first)) ran = true;
  }
  return ran;
}

void make_fibers(unsigned blocks) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  fibers.clear();
  fibers.resize(blocks * blockDim.x);
  while (stacks.size() < fibers.size()) stacks.emplace_back(new char[kStackBytes]);
  for (unsigned i = 0; i < fibers.size(); ++i) {
    Fiber& fiber = fibers[i];
    fiber.block = i / blockDim.x;
    getcontext(&fiber.beginning);
    fiber.beginning.uc_stack.ss_sp = stacks[i].get();
    fiber.beginning.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.beginning, start_thread, 0);
  }
}

// Each block as far as it gets without the others, then the next. False where threads wait for ever.
bool run_cluster(unsigned blocks, unsigned shared_bytes) {
  make_fibers(blocks);
  of_blocks.assign(blocks, {});
  of_warps.assign(blocks * warps(), {});
  of_cluster = {};
  shared_of_blocks.assign(blocks, std::vector<unsigned char>(shared_bytes, 0xff));  // as fp32: NaN
  first_block = blockIdx.x;
  for (bool ran = true; ran;) {
    ran = false;
    for (unsigned i = 0; i < blocks; ++i) {
      while (run_block(emulated_reverse ? blocks - 1 - i : i)) ran = true;
    }
  }
  blockIdx.x = first_block;
  return std::all_of(fibers.begin(), fibers.end(), [](const Fiber& fiber) { return fiber.finished; });
}

int run_grid(Run kernel, const Index& grid, unsigned cluster, unsigned threads, unsigned shared_bytes,
             const void* params) {
  running = kernel;
  running_params = params;
  static std::map<Run, bool> reverse;
  emulated_reverse = reverse[running];
  reverse[running] = !emulated_reverse;
  blockDim.x = threads;
  gridDim = grid;
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < grid.x; blockIdx.x += cluster) {
        if (!run_cluster(cluster, shared_bytes)) return kHangs;
      }
    }
  }
  return 0;
}

}  // namespace

EmulatedKernel::EmulatedKernel(const char* cubin, const char* symbol, Run run) { cubins()[cubin][symbol] = run; }

void __syncthreads() {
  Meeting& meeting = of_blocks[fibers[current].block];
  fibers[current].came_at = meeting.times;
  meeting.meet(blockDim.x);
}

void emulated_cluster_arrive() {
  fibers[current].cluster_at = of_cluster.times;
  of_cluster.arrive(fibers.size());
}

void emulated_cluster_wait() {
  Fiber& fiber = fibers[current];
  fiber.waits_for_cluster = true;
  while (fiber.cluster_at == of_cluster.times) give_way();
  fiber.waits_for_cluster = false;
}

void emulated_await_zero(const unsigned long long* number) {
  Fiber& fiber = fibers[current];
  fiber.waits_for_zero = number;
  while (*number != 0) give_way();
  fiber.waits_for_zero = nullptr;
}

unsigned char* emulated_dynamic_shared(int block) {
  return shared_of_blocks[block < 0 ? fibers[current].block : block].data();
}

unsigned emulated_cluster_size() { return static_cast<unsigned>(shared_of_blocks.size()); }

unsigned long long emulated_shuffle(unsigned long long value, int from) {
  fibers[current].exchanged = value;
  meet_warp();
  const bool there = from >= 0 && from < static_cast<int>(lanes());
  const unsigned long long received = there ? fibers[first_lane() + from].exchanged : value;
  meet_warp();
  return received;
}

extern "C" {

int cuInit(unsigned) { return 0; }
int cuGetErrorName(int status, const char** out) {
  return *out = status == kHangs ? "EMULATED_HANG" : "EMULATED_NOT_FOUND", 0;
}
int cuGetErrorString(int status, const char** out) {
  return *out = status == kHangs ? "threads wait for ever" : "no emulated kernel of that name", 0;
}
int cuDeviceGet(int* out, int) { return *out = 0, 0; }
int cuDevicePrimaryCtxRetain(void** out, int) { return *out = &fibers, 0; }
int cuCtxGetCurrent(void** out) { return *out = current_context, 0; }
int cuCtxPushCurrent_v2(void* context) { return current_context = context, 0; }
int cuCtxPopCurrent_v2(void** out) { return *out = current_context, current_context = nullptr, 0; }
int cuFuncGetAttribute(int* out, int, void*) { return *out = 0, 0; }
int cuFuncSetAttribute(void*, int, int) { return 0; }
int cuTensorMapEncodeTiled(hylo::TensorMap* out, int type, unsigned, void* tensor, const unsigned long long* sizes,
                           const unsigned long long* strides, const unsigned* box, const unsigned*, int, int swizzle, int,
                           int) {
  hylo::EmulatedMap map{static_cast<const unsigned char*>(tensor), 1 << type, swizzle != 0};
  for (int i = 0; i < 4; ++i) {
    map.sizes[i] = static_cast<long long>(sizes[i]);
    map.box[i] = static_cast<int>(box[i]);
    map.strides[i] = i > 0 ? static_cast<long long>(strides[i - 1]) : map.bytes;
    if (i > 0 && strides[i - 1] % 16 != 0) return kInvalid;
    if (box[i] > 256) return kInvalid;
  }
  if (reinterpret_cast<unsigned long long>(tensor) % 16 != 0 || box[0] * map.bytes % 16 != 0) return kInvalid;
  memcpy(out, &map, sizeof(map));
  return 0;
}
int cuModuleLoadData(void** out, const void* image) {
  const auto found = cubins().find(static_cast<const char*>(image));
  if (found == cubins().end()) return kNotFound;
  return *out = &found->second, 0;
}
int cuModuleGetFunction(void** out, void* module, const char* symbol) {
  const auto& kernels = *static_cast<const Kernels*>(module);
  const auto found = kernels.find(symbol);
  if (found == kernels.end()) return kNotFound;
  return *out = reinterpret_cast<void*>(found->second), 0;
}
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned,
                   unsigned shared_bytes, void*, void** arguments, void**) {
  return run_grid(reinterpret_cast<Run>(function), {x, y, z}, 1, threads, shared_bytes, arguments[0]);
}
int cuLaunchKernelEx(const LaunchConfig* launch, void* function, void** arguments, void**) {
  const Index grid = {launch->grid[0], launch->grid[1], launch->grid[2]};
  unsigned cluster = 1;
  for (unsigned i = 0; i < launch->attributes; ++i) {
    const LaunchAttribute& attribute = launch->attribute[i];
    if (attribute.id == kClusterDims) cluster = attribute.cluster[0];
    if (attribute.id != kClusterDims && attribute.id != kEarly) return kInvalid;
  }
  if (grid.x % cluster != 0) return kInvalid;
  return run_grid(reinterpret_cast<Run>(function), grid, cluster, launch->threads[0], launch->shared_bytes,
                  arguments[0]);
}
int cuOccupancyMaxActiveClusters(int* clusters, void*, const LaunchConfig*) {
  return *clusters = kResident, 0;
}
}
