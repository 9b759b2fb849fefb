// One variant of the decode kernel, compiled for the CPU with the same -DHYLO_ names as for the GPU.
#include "device.h"

constexpr const char* kSymbol = "ssd_fwd_kernel_step";
#define ssd_fwd_kernel_step HYLO_SYMBOL  // all variants are linked into one library
#include "ssd/step.cuh"

static const EmulatedKernel registered(HYLO_NAME, kSymbol, [](const void* params) {
  ssd_fwd_kernel_step(*static_cast<const hylo::ssd::StepParams*>(params));
});
