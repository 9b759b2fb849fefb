// One variant of the decode kernel of a whole block, compiled for the CPU with the same -DHYLO_ names as for the GPU.
#include "device.h"

constexpr const char* kSymbol = "ssd_fwd_kernel_mamba2_step";
#define ssd_fwd_kernel_mamba2_step HYLO_SYMBOL  // all variants are linked into one library
#include "ssd/mamba2_step.cuh"

static const EmulatedKernel registered(HYLO_NAME, kSymbol, [](const void* params) {
  ssd_fwd_kernel_mamba2_step(*static_cast<const hylo::ssd::Mamba2StepParams*>(params));
});
