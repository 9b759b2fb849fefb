// A stand-in for libcuda.so.1: the few calls that csrc/common/driver.cpp makes. A "cubin" is a kernel's name.
#include <ucontext.h>

#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "device.h"

namespace {

using Run = void (*)(const void*);
constexpr int kNotFound = 500;
constexpr size_t kStackBytes = 64 * 1024;

using Kernels = std::map<std::string, Run>;  // of a cubin, by symbol

std::map<std::string, Kernels>& cubins() {
  static std::map<std::string, Kernels> all;
  return all;
}

void* current_context = nullptr;
ucontext_t scheduler;
std::vector<ucontext_t> fibers;
std::vector<bool> finished;
std::vector<unsigned long long> exchange;
Run running = nullptr;
const void* running_params = nullptr;

// Threads that meet: a fiber goes on when all of the group came.
struct Meeting {
  unsigned came = 0, times = 0;

  void meet(unsigned size) {
    const unsigned now = times;
    if (++came == size) {
      came = 0;
      ++times;
      return;
    }
    while (times == now) swapcontext(&fibers[threadIdx.x], &scheduler);
  }
};
constexpr unsigned kWarp = 32;
Meeting of_block;
constexpr unsigned kNever = ~0u;
std::vector<unsigned> came_at;  // how often the block had met when each thread came to its barrier last
std::vector<Meeting> of_warps;

unsigned warp() { return threadIdx.x / kWarp; }
unsigned first_lane() { return warp() * kWarp; }

void meet_warp() { of_warps[warp()].meet(std::min(kWarp, blockDim.x - first_lane())); }

void start_thread() {
  running(running_params);
  finished[threadIdx.x] = true;
}

bool can_run(unsigned thread) { return !finished[thread] && came_at[thread] != of_block.times; }

// One warp goes on up to a barrier of the block before the next begins: what was missing there would be seen. Its threads
// in turn; false where all of them wait.
bool run_warp(unsigned first, unsigned threads) {
  bool ran = false;
  for (unsigned i = first; i < std::min(first + kWarp, threads); ++i) {
    threadIdx.x = emulated_reverse ? threads - 1 - i : i;
    if (!can_run(threadIdx.x)) continue;
    swapcontext(&scheduler, &fibers[threadIdx.x]);
    ran = true;
  }
  return ran;
}

void run_block(unsigned threads) {
  fibers.assign(threads, {});
  finished.assign(threads, false);
  exchange.assign(threads, 0);
  of_block = {};
  came_at.assign(threads, kNever);
  of_warps.assign((threads + kWarp - 1) / kWarp, {});
  std::vector<std::unique_ptr<char[]>> stacks;
  for (unsigned i = 0; i < threads; ++i) {
    stacks.emplace_back(new char[kStackBytes]);
    getcontext(&fibers[i]);
    fibers[i].uc_stack.ss_sp = stacks[i].get();
    fibers[i].uc_stack.ss_size = kStackBytes;
    fibers[i].uc_link = &scheduler;
    makecontext(&fibers[i], start_thread, 0);
  }
  for (bool ran = true; ran;) {
    ran = false;
    for (unsigned first = 0; first < threads; first += kWarp) {
      while (run_warp(first, threads)) ran = true;
    }
  }
}

}  // namespace

EmulatedKernel::EmulatedKernel(const char* cubin, const char* symbol, Run run) { cubins()[cubin][symbol] = run; }

void __syncthreads() {
  came_at[threadIdx.x] = of_block.times;
  of_block.meet(blockDim.x);
}

unsigned long long emulated_shuffle(unsigned long long value, int from) {
  exchange[threadIdx.x] = value;
  meet_warp();
  const bool there = from >= 0 && from < static_cast<int>(kWarp) && first_lane() + from < blockDim.x;
  const unsigned long long received = there ? exchange[first_lane() + from] : value;
  meet_warp();
  return received;
}

extern "C" {

int cuInit(unsigned) { return 0; }
int cuGetErrorName(int, const char** out) { return *out = "EMULATED_NOT_FOUND", 0; }
int cuGetErrorString(int, const char** out) { return *out = "no emulated kernel of that name", 0; }
int cuDeviceGet(int* out, int) { return *out = 0, 0; }
int cuDevicePrimaryCtxRetain(void** out, int) { return *out = &scheduler, 0; }
int cuCtxGetCurrent(void** out) { return *out = current_context, 0; }
int cuCtxPushCurrent_v2(void* context) { return current_context = context, 0; }
int cuCtxPopCurrent_v2(void** out) { return *out = current_context, current_context = nullptr, 0; }
int cuFuncGetAttribute(int* out, int, void*) { return *out = 0, 0; }
int cuFuncSetAttribute(void*, int, int) { return 0; }
int cuTensorMapEncodeTiled() { return kNotFound; }  // there is no copy engine here
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
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned, unsigned,
                   void*, void** arguments, void**) {
  running = reinterpret_cast<Run>(function);
  running_params = arguments[0];
  static std::map<Run, bool> reverse;
  emulated_reverse = reverse[running];
  reverse[running] = !emulated_reverse;
  blockDim.x = threads;
  gridDim = {x, y, z};
  for (blockIdx.z = 0; blockIdx.z < z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < x; ++blockIdx.x) run_block(threads);
    }
  }
  return 0;
}
}
