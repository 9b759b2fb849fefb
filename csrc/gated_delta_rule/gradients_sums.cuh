// Sums over tokens and over pairs of tokens for the gradients of gates and write strengths. A gate's is a sum over all
// pairs of a token before it and a token at or after it, and is summed in this form: the shorter one, a difference of
// sums, cancels.
#pragma once

#include "common/reduce.cuh"
#include "gated_delta_rule/chunks.cuh"

namespace hylo::gated_delta_rule {

// Each lane has two neighbouring tokens. x becomes the sums from each on to the last token of a run of kLanes lanes.
template <int kLanes>
__device__ __forceinline__ void sum_to_end(float (&x)[2]) {
  const int at = lane() % kLanes;
  float after = x[0] + x[1];
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) {
    const float other = __shfl_down_sync(kAllLanes, after, step, kLanes);
    if (at + step < kLanes) after += other;
  }
  const float next = __shfl_down_sync(kAllLanes, after, 1, kLanes);
  if (at + 1 < kLanes) x[1] += next;
  x[0] += x[1];
}

// x becomes the sums over all tokens before each.
__device__ __forceinline__ void sum_before(float (&x)[2]) {
  float through = x[0] + x[1];
#pragma unroll
  for (int step = 1; step < kWarpThreads; step *= 2) {
    const float other = __shfl_up_sync(kAllLanes, through, step);
    if (lane() >= step) through += other;
  }
  const float previous = __shfl_up_sync(kAllLanes, through, 1);
  const float first = x[0];
  x[0] = lane() == 0 ? 0.0f : previous;
  x[1] = x[0] + first;
}

// Over the four lanes that share an accumulator's row.
__device__ __forceinline__ float sum_columns(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

// Over the eight lanes that share an accumulator's columns, of four numbers; a lane gets the one with its lane() / 8.
__device__ __forceinline__ float sum_rows(const float (&x)[4]) {
  const bool second = lane() & 16;
  float a = second ? x[2] : x[0], b = second ? x[3] : x[1];
  a += __shfl_xor_sync(kAllLanes, second ? x[0] : x[2], 16);
  b += __shfl_xor_sync(kAllLanes, second ? x[1] : x[3], 16);
  const bool odd = lane() & 8;
  a = (odd ? b : a) + __shfl_xor_sync(kAllLanes, odd ? a : b, 8);
  return a + __shfl_xor_sync(kAllLanes, a, 4);
}

// A [16, 16] block on the diagonal of a matrix over pairs of tokens, one warp's part of an accumulator: element 2 h + e
// of row r is at lane() / 4 + 8 r and 8 h + 2 (lane() % 4) + e.
//
// Sums over the block's pairs (i, j) with i >= t > j, for the four t that are this thread's columns. This lane's rows
// only: `sum_rows` adds the others.
__device__ __forceinline__ void sum_across(const float (&pairs)[2][4], float (&out)[4]) {
  const int column = 2 * (lane() % 4);
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = 0.0f;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = lane() / 4 + 8 * r;
    float before = 0.0f;  // over the row's columns before 8 h, then before 8 h + column as well
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float through = pairs[r][2 * h] + pairs[r][2 * h + 1];
#pragma unroll
      for (int step = 1; step < 4; step *= 2) {
        const float other = __shfl_up_sync(kAllLanes, through, step, 4);
        if (lane() % 4 >= step) through += other;
      }
      const float previous = __shfl_up_sync(kAllLanes, through, 1, 4);
      const float until = lane() % 4 == 0 ? before : before + previous;
      if (row >= 8 * h + column) out[2 * h] += until;
      if (row > 8 * h + column) out[2 * h + 1] += until + pairs[r][2 * h];
      before += __shfl_sync(kAllLanes, through, 3, 4);
    }
  }
}

}  // namespace hylo::gated_delta_rule
