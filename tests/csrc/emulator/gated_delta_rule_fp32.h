// What the units of the chunked fp32 kernels share when they are compiled for the CPU, with the same -DHYLO_ names as
// for the GPU. All variants are linked into one library, so a kernel gets a name of its variant's.
#pragma once

#include "device.h"

#include <vector_types.h>

#undef __shared__
#define __shared__  // dynamic, all of it: the array that a kernel declares is its namespace's
namespace hylo::gated_delta_rule::fp32_chunk {
static float4 shared[227 * 1024 / sizeof(float4)];
}

#define HYLO_JOIN_NOW(a, b) a##b
#define HYLO_JOIN(a, b) HYLO_JOIN_NOW(a, b)
#define HYLO_REGISTER(symbol, kernel)                                                                          \
  static const EmulatedKernel HYLO_JOIN(registered_at_, __LINE__)(HYLO_NAME, symbol, [](const void* params) { \
    hylo::gated_delta_rule::fp32_chunk::kernel(                                                               \
        *static_cast<const hylo::gated_delta_rule::fp32_chunk::Params*>(params));                             \
  });
