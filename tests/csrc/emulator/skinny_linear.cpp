// One variant of the products of few rows, compiled for the CPU with the same -DHYLO_ names as for the GPU.
#include "device.h"

constexpr const char* kSymbol = "skinny_linear_fwd_kernel_y";
#define skinny_linear_fwd_kernel_y HYLO_SYMBOL  // all variants are linked into one library
#include "skinny_linear/kernel.cuh"

static const EmulatedKernel registered(HYLO_NAME, kSymbol, [](const void* params) {
  skinny_linear_fwd_kernel_y(*static_cast<const hylo::skinny_linear::Params*>(params));
});
