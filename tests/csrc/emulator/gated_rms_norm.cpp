// One variant of the kernel, compiled for the CPU with the same -DHYLO_ names as for the GPU.
#include "device.h"

constexpr const char* kSymbol = "gated_rms_norm_fwd_kernel_y";
#define gated_rms_norm_fwd_kernel_y HYLO_SYMBOL  // all variants are linked into one library
#include "gated_rms_norm/kernel.cuh"

static const EmulatedKernel registered(HYLO_NAME, kSymbol, [](const void* params) {
  gated_rms_norm_fwd_kernel_y(*static_cast<const hylo::gated_rms_norm::Params*>(params));
});
