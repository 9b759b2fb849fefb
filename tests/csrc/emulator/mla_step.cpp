// Both kernels of one variant of the decode step, compiled for the CPU with the same -DHYLO_ names as for the GPU.
#include "device.h"

#define HYLO_JOIN_NOW(a, b) a##b
#define HYLO_JOIN(a, b) HYLO_JOIN_NOW(a, b)

constexpr const char *kQueries = "mla_step_fwd_kernel_queries", *kValues = "mla_step_fwd_kernel_values";
#define mla_step_fwd_kernel_queries HYLO_JOIN(HYLO_SYMBOL, _queries)  // all variants are linked into one library
#define mla_step_fwd_kernel_values HYLO_JOIN(HYLO_SYMBOL, _values)
#include "mla_step/kernel.cuh"

static const EmulatedKernel queries(HYLO_NAME, kQueries, [](const void* params) {
  mla_step_fwd_kernel_queries(*static_cast<const hylo::mla_step::QueriesParams*>(params));
});
static const EmulatedKernel values(HYLO_NAME, kValues, [](const void* params) {
  mla_step_fwd_kernel_values(*static_cast<const hylo::mla_step::ValuesParams*>(params));
});
