// One variant of the decode kernel, compiled for the CPU with the same -DHYLO_ names as for the GPU.
#include "device.h"

constexpr const char* kSymbol = "gated_delta_rule_fwd_kernel_step";
#define gated_delta_rule_fwd_kernel_step HYLO_SYMBOL  // all variants are linked into one library
#include "gated_delta_rule/step.cuh"

static const EmulatedKernel registered(HYLO_NAME, kSymbol, [](const void* params) {
  gated_delta_rule_fwd_kernel_step(*static_cast<const hylo::gated_delta_rule::StepParams*>(params));
});
