// Of a variant of the chunked forward the kernel that convolves b and c, compiled for the CPU with the same -DHYLO_ names
// as for the GPU.
#include "device.h"

#include "ssd/mix.cuh"

static const EmulatedKernel registered(HYLO_NAME, "ssd_fwd_kernel_mix", [](const void* params) {
  hylo::ssd::mix<hylo::HYLO_T>(*static_cast<const hylo::ssd::MixParams*>(params), emulated_dynamic_shared(-1));
});
