// A stand-in for libcuda.so.1: the few calls that csrc/common/driver.cpp makes. A "cubin" is a kernel's name.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "device.h"

#include "common/copy_engine.cuh"

namespace {

using Run = void (*)(const void*);
constexpr int kInvalid = 1, kNotFound = 500, kHangs = 719, kEnded = 717;

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

using Kernels = std::map<std::string, Run>;  // of a cubin, by symbol

std::map<std::string, Kernels>& cubins() {
  static std::map<std::string, Kernels> all;
  return all;
}

// What `emulate` sets.
int resident = 3;         // clusters, that the driver says a GPU holds
unsigned at_once = 1;     // clusters that run at once, and so may wait for each other
bool time_flies = false;  // whether nobody waits longer than until the clock is looked at again
bool pauses = false;      // whether threads let others go ahead where it matters who comes first

void* current_context = nullptr;
jmp_buf scheduler;
Run running = nullptr;
const void* running_params = nullptr;

// Threads that meet: a fiber goes on when all of the group came.
struct Meeting {
  unsigned came = 0, times = 0;

  void arrive(unsigned size);
  void meet(unsigned size);
};

// A thread of one of the blocks that run together.
struct Fiber {
  ucontext_t beginning;
  jmp_buf place;  // where it goes on
  std::unique_ptr<char[]> stack;
  bool began = false;
  unsigned block;
  bool finished = false;
  unsigned long long exchanged = 0;
  const Meeting* waits_for = nullptr;
  unsigned came_at = 0;     // how often these had met when it came
  unsigned cluster_at = 0;  // how often the cluster had met when it came to its barrier last
  bool waits_for_cluster = false;
  const unsigned long long* waits_for_zero = nullptr;
  bool pauses = false;  // until nobody else can go on
};

struct Cluster {
  Index first;                // block; all are side by side along x
  std::vector<Fiber> fibers;  // by block, then by thread
  std::vector<Meeting> of_blocks, of_warps;
  Meeting of_all;
  std::vector<std::vector<unsigned char>> shared;  // of blocks
};

// The thread that runs, in its cluster, and what the clock says.
Cluster* cluster = nullptr;
unsigned current = 0, clock_now = 0;
bool reached_ended = false;  // whether a block put something into one that had ended

Fiber& fiber() { return cluster->fibers[current]; }

// A context begins a fiber; to and fro it goes by jumps, which make no system call.
void give_way() {
  if (_setjmp(fiber().place) == 0) _longjmp(scheduler, 1);
}
void let_run(Fiber& next) {
  if (_setjmp(scheduler) != 0) return;
  if (next.began) _longjmp(next.place, 1);
  next.began = true;
  setcontext(&next.beginning);
}

void pause() {
  fiber().pauses = true;
  while (fiber().pauses) give_way();
}

void Meeting::arrive(unsigned size) {
  if (++came < size) return;
  came = 0;
  ++times;
}
void Meeting::meet(unsigned size) {
  fiber().waits_for = this;
  fiber().came_at = times;
  arrive(size);
  while (times == fiber().came_at) give_way();
  fiber().waits_for = nullptr;
}

constexpr unsigned kWarp = 32;
unsigned warps() { return (blockDim.x + kWarp - 1) / kWarp; }
unsigned first_lane() { return current - threadIdx.x % kWarp; }
unsigned lanes() { return std::min(kWarp, blockDim.x - (threadIdx.x - threadIdx.x % kWarp)); }

void meet_warp() { cluster->of_warps[fiber().block * warps() + threadIdx.x / kWarp].meet(lanes()); }

void start_thread() {
  running(running_params);
  fiber().finished = true;
  _longjmp(scheduler, 1);
}

bool can_run(const Fiber& of) {
  const bool met = of.waits_for == nullptr || of.waits_for->times != of.came_at;
  const bool in_cluster = !of.waits_for_cluster || of.cluster_at != cluster->of_all.times;
  return !of.finished && !of.pauses && met && in_cluster &&
         (of.waits_for_zero == nullptr || *of.waits_for_zero == 0);
}

std::minstd_rand chance;  // the same numbers in each process

// One warp goes on up to a barrier of the block before the next begins: what was missing there would be seen. Its
// threads in turn; false where all of them wait.
bool run_warp(unsigned block, unsigned first, bool some_lanes = false) {
  bool ran = false;
  for (unsigned i = first; i < std::min(first + kWarp, blockDim.x); ++i) {
    threadIdx.x = emulated_reverse ? blockDim.x - 1 - i : i;
    current = block * blockDim.x + threadIdx.x;
    if (!can_run(fiber()) || (some_lanes && chance() % 4 == 0)) continue;
    blockIdx = cluster->first;
    blockIdx.x += block;
    let_run(fiber());
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

// Some warps of all blocks, or all, in any order, each up to a barrier; false where all of them wait.
bool run_some_warps(unsigned blocks, bool all) {
  std::vector<unsigned> order(blocks * warps());
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), chance);
  if (!all) order.resize(1 + chance() % order.size());
  bool ran = false;
  for (const unsigned i : order) ran = run_warp(i / warps(), i % warps() * kWarp, !all) || ran;
  return ran;
}

// Warps fall behind others by as much as chance will have it.
bool run_in_any_order(unsigned blocks) {
  bool ran_any = false;
  while (run_some_warps(blocks, false) || run_some_warps(blocks, true)) ran_any = true;
  return ran_any;
}

// Each block as far as it gets without the others, then the next.
bool run_cluster(Cluster& next) {
  bool ran_any = false;
  cluster = &next;
  const unsigned blocks = static_cast<unsigned>(next.of_blocks.size());
  if (emulated_reverse) return run_in_any_order(blocks);
  for (bool ran = true; ran;) {
    ran = false;
    for (unsigned i = 0; i < blocks; ++i) {
      while (run_block(i)) ran = ran_any = true;
    }
  }
  return ran_any;
}

std::vector<std::unique_ptr<char[]>> spare_stacks;

std::unique_ptr<Cluster> start_cluster(const Index& first, unsigned blocks, unsigned shared_bytes) {
  auto made = std::make_unique<Cluster>();
  made->first = first;
  made->fibers.resize(blocks * blockDim.x);
  for (unsigned i = 0; i < made->fibers.size(); ++i) {
    Fiber& of = made->fibers[i];
    of.block = i / blockDim.x;
    if (spare_stacks.empty()) spare_stacks.emplace_back(new char[kStackBytes]);
    of.stack = std::move(spare_stacks.back());
    spare_stacks.pop_back();
    getcontext(&of.beginning);
    of.beginning.uc_stack.ss_sp = of.stack.get();
    of.beginning.uc_stack.ss_size = kStackBytes;
    makecontext(&of.beginning, start_thread, 0);
  }
  made->of_blocks.assign(blocks, {});
  made->of_warps.assign(blocks * warps(), {});
  made->shared.assign(blocks, std::vector<unsigned char>(shared_bytes, 0xff));  // as fp32: NaN
  return made;
}

bool is_finished(const Cluster& of) {
  return std::all_of(of.fibers.begin(), of.fibers.end(), [](const Fiber& one) { return one.finished; });
}

// Of the cluster that runs.
bool has_ended(unsigned block) {
  const auto first = cluster->fibers.begin() + block * blockDim.x;
  return std::all_of(first, first + blockDim.x, [](const Fiber& one) { return one.finished; });
}

// Lets those go on that pause; false where nobody does.
bool end_pauses(const std::vector<std::unique_ptr<Cluster>>& all) {
  bool any = false;
  for (const auto& of : all) {
    for (Fiber& one : of->fibers) {
      any = any || one.pauses;
      one.pauses = false;
    }
  }
  return any;
}

// Clusters in the order of `firsts`, `at_once` of them together; false where threads wait for ever.
bool run_clusters(const std::vector<Index>& firsts, unsigned blocks, unsigned shared_bytes) {
  std::vector<std::unique_ptr<Cluster>> all;
  for (size_t next = 0; next < firsts.size() || !all.empty();) {
    while (next < firsts.size() && all.size() < at_once) {
      all.push_back(start_cluster(firsts[next++], blocks, shared_bytes));
    }
    bool ran = false;
    for (size_t i = 0; i < all.size(); ++i) {
      ran = run_cluster(*all[emulated_reverse ? all.size() - 1 - i : i]) || ran;
    }
    if (!ran && !end_pauses(all)) return false;
    for (const auto& of : all) {
      if (!is_finished(*of)) continue;
      for (Fiber& one : of->fibers) spare_stacks.push_back(std::move(one.stack));
    }
    all.erase(std::remove_if(all.begin(), all.end(), [](const auto& of) { return is_finished(*of); }), all.end());
  }
  return true;
}

int run_grid(Run kernel, const Index& grid, unsigned blocks, unsigned threads, unsigned shared_bytes,
             const void* params) {
  running = kernel;
  running_params = params;
  static std::map<Run, bool> reverse;
  emulated_reverse = reverse[running];
  reverse[running] = !emulated_reverse;
  blockDim.x = threads;
  gridDim = grid;
  std::vector<Index> firsts;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; x += blocks) firsts.push_back({x, y, z});
    }
  }
  reached_ended = false;
  if (!run_clusters(firsts, blocks, shared_bytes)) return kHangs;
  return reached_ended ? kEnded : 0;
}

}  // namespace

EmulatedKernel::EmulatedKernel(const char* cubin, const char* symbol, Run run) { cubins()[cubin][symbol] = run; }

void __syncthreads() {
  cluster->of_blocks[fiber().block].meet(blockDim.x);
}

void emulated_cluster_arrive() {
  fiber().cluster_at = cluster->of_all.times;
  cluster->of_all.arrive(cluster->fibers.size());
}

void emulated_cluster_wait() {
  fiber().waits_for_cluster = true;
  while (fiber().cluster_at == cluster->of_all.times) give_way();
  fiber().waits_for_cluster = false;
}

void emulated_await_zero(const unsigned long long* number) {
  fiber().waits_for_zero = number;
  while (*number != 0) give_way();
  fiber().waits_for_zero = nullptr;
}

unsigned emulated_clock() {
  constexpr unsigned kTick = 1 << 14, kLong = 1 << 30;
  if (!time_flies) pause();
  return clock_now += time_flies ? kLong : kTick;
}

void emulated_let_others_go_ahead() {
  if (pauses) pause();
}

unsigned char* emulated_dynamic_shared(int block) {
  if (block >= 0 && has_ended(block)) reached_ended = true;
  return cluster->shared[block < 0 ? fiber().block : block].data();
}

unsigned emulated_cluster_size() { return static_cast<unsigned>(cluster->shared.size()); }

unsigned long long emulated_shuffle(unsigned long long value, int from) {
  fiber().exchanged = value;
  meet_warp();
  const bool there = from >= 0 && from < static_cast<int>(lanes());
  const unsigned long long received = there ? cluster->fibers[first_lane() + from].exchanged : value;
  meet_warp();
  return received;
}

extern "C" {

// For tests: how many clusters the driver says are resident, how many run at once, and the two above. Until it is
// called again.
void emulate(int clusters, int together, int flies, int lets_go_ahead) {
  resident = clusters;
  at_once = static_cast<unsigned>(together);
  time_flies = flies != 0;
  pauses = lets_go_ahead != 0;
}

int cuInit(unsigned) { return 0; }
int cuGetErrorName(int status, const char** out) {
  return *out = status == kHangs ? "EMULATED_HANG" : status == kEnded ? "EMULATED_ENDED" : "EMULATED_NOT_FOUND", 0;
}
int cuGetErrorString(int status, const char** out) {
  return *out = status == kHangs   ? "threads wait for ever"
                : status == kEnded ? "a block put something into one that had ended"
                                   : "no emulated kernel of that name",
         0;
}
int cuDeviceGet(int* out, int) { return *out = 0, 0; }
int cuDevicePrimaryCtxRetain(void** out, int) { return *out = &running, 0; }
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
  return *clusters = resident, 0;
}
}
