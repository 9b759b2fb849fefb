// Sums over pairs of tokens, one on each side of a third, in a fixed order.
#pragma once

#include "common/fp32_product.cuh"

namespace hylo {

constexpr int kTokenThreads = kProductThreads / kChunk;  // neighbours that have one token
static_assert(kTokenThreads == 4);

// Over four neighbours.
__device__ __forceinline__ float sum_neighbours(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// For token t = threadIdx.x / 4, to all four threads of it: the sum of pairs [i, j] with i >= t > j. `pairs` holds
// zeros on and above the diagonal, and is written over, as are four rows of `partial`. All terms of a token are added,
// none is taken away again: a difference of sums would cancel.
__device__ __forceinline__ float sum_pairs(const Tile<kChunk>& pairs, const Tile<kChunk>& partial) {
  const int column = threadIdx.x % kChunk, quarter = threadIdx.x / kChunk;
  constexpr int kRows = kChunk / kTokenThreads;
  float through = 0.0f;  // a column's sums from each row on first
  for (int i = kRows - 1; i >= 0; --i) {
    float& x = pairs.at(quarter * kRows + i, column);
    through += x;
    x = through;
  }
  partial.at(quarter, column) = through;
  __syncthreads();
  const int token = threadIdx.x / kTokenThreads, part = threadIdx.x % kTokenThreads;
  float sum = 0.0f;
  for (int j = part; j < token; j += kTokenThreads) {
    float below = pairs.at(token, j);
    for (int q = token / kRows + 1; q < kTokenThreads; ++q) below += partial.at(q, j);
    sum += below;
  }
  return sum_neighbours(sum);
}

}  // namespace hylo
