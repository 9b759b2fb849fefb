// One variant of the backward's kernels, compiled for the CPU with the same -DHYLO_ names as for the GPU.
#include "device.h"

#define HYLO_JOIN_(a, b) a##b
#define HYLO_JOIN(a, b) HYLO_JOIN_(a, b)

// All variants are linked into one library.
#define gated_rms_norm_bwd_kernel_norm_first HYLO_JOIN(HYLO_SYMBOL, _norm_first)
#define gated_rms_norm_bwd_kernel_gate_first HYLO_JOIN(HYLO_SYMBOL, _gate_first)
#define gated_rms_norm_bwd_kernel_dweight HYLO_JOIN(HYLO_SYMBOL, _dweight)
#include "gated_rms_norm/backward.cuh"

using hylo::gated_rms_norm::BackwardParams;
using hylo::gated_rms_norm::DweightParams;

static const EmulatedKernel kernels[] = {
    {HYLO_NAME, "gated_rms_norm_bwd_kernel_norm_first",
     [](const void* params) { gated_rms_norm_bwd_kernel_norm_first(*static_cast<const BackwardParams*>(params)); }},
    {HYLO_NAME, "gated_rms_norm_bwd_kernel_gate_first",
     [](const void* params) { gated_rms_norm_bwd_kernel_gate_first(*static_cast<const BackwardParams*>(params)); }},
    {HYLO_NAME, "gated_rms_norm_bwd_kernel_dweight",
     [](const void* params) { gated_rms_norm_bwd_kernel_dweight(*static_cast<const DweightParams*>(params)); }},
};
