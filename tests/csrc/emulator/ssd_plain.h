// What the units of ssd's plain kernels share when they are compiled for the CPU, with the same -DHYLO_ names as for the
// GPU. All variants are linked into one library, so a kernel gets a name of its variant's.
#pragma once

#include "device.h"

#include <vector_functions.h>

#include "ssd/gradients_traits.cuh"
#include "ssd/vectors.cuh"

#undef __shared__
#define __shared__  // dynamic, from here on: the array that a kernel declares is its namespace's
namespace hylo::ssd::plain {
static float4 shared[227 * 1024 / sizeof(float4)];
}

#define HYLO_JOIN_NOW(a, b) a##b
#define HYLO_JOIN(a, b) HYLO_JOIN_NOW(a, b)
#define HYLO_REGISTER(symbol, kernel, params)                                                                 \
  static const EmulatedKernel HYLO_JOIN(registered_at_, __LINE__)(HYLO_NAME, symbol, [](const void* given) { \
    using namespace hylo::ssd::plain;                                                                         \
    kernel(*static_cast<const hylo::ssd::params*>(given));                                                    \
  });
