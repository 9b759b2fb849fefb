// A stand-in for libcuda.so.1: the few calls that csrc/common/driver.cpp makes. A "cubin" is a kernel's name.
#include <ucontext.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "device.h"

namespace {

using Run = void (*)(const void*);
constexpr int kNotFound = 500;
constexpr size_t kStackBytes = 64 * 1024;

std::map<std::string, Run>& kernels() {
  static std::map<std::string, Run> all;
  return all;
}

void* current_context = nullptr;
ucontext_t scheduler;
std::vector<ucontext_t> fibers;
std::vector<bool> finished;
std::vector<float> exchange;
Run running = nullptr;
const void* running_params = nullptr;

void start_thread() {
  running(running_params);
  finished[threadIdx.x] = true;
}

void run_block(unsigned threads) {
  fibers.assign(threads, {});
  finished.assign(threads, false);
  exchange.assign(threads, 0.0f);
  std::vector<std::unique_ptr<char[]>> stacks;
  for (unsigned i = 0; i < threads; ++i) {
    stacks.emplace_back(new char[kStackBytes]);
    getcontext(&fibers[i]);
    fibers[i].uc_stack.ss_sp = stacks[i].get();
    fibers[i].uc_stack.ss_size = kStackBytes;
    fibers[i].uc_link = &scheduler;
    makecontext(&fibers[i], start_thread, 0);
  }
  while (!finished[0]) {
    for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) swapcontext(&scheduler, &fibers[threadIdx.x]);
  }
}

}  // namespace

EmulatedKernel::EmulatedKernel(const char* name, void (*run)(const void*)) { kernels()[name] = run; }

void __syncthreads() { swapcontext(&fibers[threadIdx.x], &scheduler); }

float __shfl_xor_sync(unsigned, float value, int offset) {
  exchange[threadIdx.x] = value;
  __syncthreads();
  const float received = exchange[threadIdx.x ^ offset];
  __syncthreads();
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
  const auto found = kernels().find(static_cast<const char*>(image));
  if (found == kernels().end()) return kNotFound;
  return *out = reinterpret_cast<void*>(found->second), 0;
}
int cuModuleGetFunction(void** out, void* module, const char*) { return *out = module, 0; }
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned, unsigned,
                   void*, void** arguments, void**) {
  running = reinterpret_cast<Run>(function);
  running_params = arguments[0];
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
