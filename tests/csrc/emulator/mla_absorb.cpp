// One variant of the decode kernel, compiled for the CPU with the same -DHYLO_ names as for the GPU.
#include "device.h"

constexpr const char* kSymbol = "mla_absorb_fwd_kernel_decode";
#define mla_absorb_fwd_kernel_decode HYLO_SYMBOL  // all variants are linked into one library
#include "mla_absorb/kernel.cuh"

static const EmulatedKernel registered(HYLO_NAME, kSymbol, [](const void* params) {
  mla_absorb_fwd_kernel_decode(*static_cast<const hylo::mla_absorb::Params*>(params));
});
