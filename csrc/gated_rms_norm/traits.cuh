// How a row of width V is spread over threads: constexpr functions of the dims, for the host and the kernel alike.
#pragma once

#include "common/portable.h"

namespace hylo::gated_rms_norm {

constexpr int kWarp = 32;
constexpr int kElementsPerThread = 16;  // of x and of the gate, held in registers as fp32
constexpr int kMinBlock = 128;
constexpr int kMaxWidth = 1024 * kElementsPerThread;

HYLO_HOST_DEVICE constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

HYLO_HOST_DEVICE constexpr int next_power_of_two(int n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

// One vector a thread up to a warp, then more vectors a thread, then more warps.
HYLO_HOST_DEVICE constexpr int threads_per_row(int width, int vector) {
  if (width > kWarp * kElementsPerThread) return next_power_of_two(ceil_div(width, kElementsPerThread));
  const int wanted = next_power_of_two(ceil_div(width, vector));
  return wanted < kWarp ? wanted : kWarp;
}

HYLO_HOST_DEVICE constexpr int block_threads(int width, int vector) {
  const int row = threads_per_row(width, vector);
  return row < kMinBlock ? kMinBlock : row;
}

HYLO_HOST_DEVICE constexpr int rows_per_block(int width, int vector) {
  return block_threads(width, vector) / threads_per_row(width, vector);
}

HYLO_HOST_DEVICE constexpr int vectors_per_thread(int width, int vector) {
  return ceil_div(ceil_div(width, vector), threads_per_row(width, vector));
}

}  // namespace hylo::gated_rms_norm
