// How a row of width V is spread over threads: constexpr functions of the dims, for the host and the kernel alike.
#pragma once

#include "common/portable.h"

namespace hylo::gated_rms_norm {

constexpr int kWarp = 32;
constexpr int kElementsPerThread = 16;  // of x and of the gate, held in registers as fp32
constexpr int kMinBlock = 128;
constexpr int kMaxWidth = 1024 * kElementsPerThread;

HYLO_HOST_DEVICE constexpr int next_power_of_two(int n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

// One vector a thread up to a warp, then more vectors a thread, then more warps.
HYLO_HOST_DEVICE constexpr int threads_per_row(int width, int vector, int elements = kElementsPerThread) {
  if (width > kWarp * elements) return next_power_of_two(ceil_div(width, elements));
  const int wanted = next_power_of_two(ceil_div(width, vector));
  return wanted < kWarp ? wanted : kWarp;
}

HYLO_HOST_DEVICE constexpr int block_threads(int width, int vector, int elements = kElementsPerThread) {
  const int row = threads_per_row(width, vector, elements);
  return row < kMinBlock ? kMinBlock : row;
}

HYLO_HOST_DEVICE constexpr int rows_per_block(int width, int vector, int elements = kElementsPerThread) {
  return block_threads(width, vector, elements) / threads_per_row(width, vector, elements);
}

HYLO_HOST_DEVICE constexpr int vectors_per_thread(int width, int vector, int elements = kElementsPerThread) {
  return ceil_div(ceil_div(width, vector), threads_per_row(width, vector, elements));
}

// --- backward: as many blocks as the multiprocessors hold, each walking over rows

// Threads keep a row, ask for the next one, and keep their columns' weights and what these gain: 32 bytes of each
// tensor. Of wider rows they keep only the gains, and read the row twice.
constexpr int kMaxKeptWidth = 4096;
constexpr int kKeptBytes = 32;
constexpr int kDweightColumns = 32;  // of a block that adds up the gains
constexpr int kDweightThreads = 1024;

HYLO_HOST_DEVICE constexpr bool reads_twice(int width) { return width > kMaxKeptWidth; }

// Elements of one access: such threads have few registers.
HYLO_HOST_DEVICE constexpr int backward_vector(int width, int vector) {
  return reads_twice(width) && vector > 4 ? 4 : vector;
}

// Of an element in a register, which 16-bit ones share where they come in pairs.
HYLO_HOST_DEVICE constexpr int register_bytes(int vector, int element_bytes) {
  return vector == 1 ? 4 : element_bytes;
}

// The most that a thread has of a row.
HYLO_HOST_DEVICE constexpr int backward_elements(int width, int vector, int element_bytes) {
  return reads_twice(width) ? kElementsPerThread : kKeptBytes / register_bytes(vector, element_bytes);
}

// Of a multiprocessor, which has registers for so many threads.
HYLO_HOST_DEVICE constexpr int backward_blocks(int width, int vector, int element_bytes, int weight_bytes) {
  const int most = backward_elements(width, vector, element_bytes);
  const bool many = vectors_per_thread(width, vector, most) * vector > 8;
  const bool wide = register_bytes(vector, many ? weight_bytes : element_bytes) == 4;
  const int kept = many ? (wide ? 384 : 512) : (wide ? 512 : 768);
  return (reads_twice(width) ? 1024 : kept) / block_threads(width, vector, most);
}

}  // namespace hylo::gated_rms_norm
