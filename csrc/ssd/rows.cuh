// Where a warpgroup's accumulator of 64 tokens has its rows, and the decays between tokens as weights of it.
#pragma once

#include "common/chunks.cuh"
#include "common/copy_engine.cuh"
#include "common/wgmma.cuh"
#include "ssd/traits.cuh"

namespace hylo::ssd {

__device__ __forceinline__ int warp_of_four() { return threadIdx.x / 32 % 4; }

// The token of one of this thread's two rows.
__device__ __forceinline__ int row_token(int row) { return 16 * warp_of_four() + lane() / 4 + 8 * row; }

// This lane's row address within a tile, for moves of rows along an accumulator's rows (columns 16 i to 16 i + 15), and
// for transposed ones of rows 16 i to 16 i + 15.
__device__ __forceinline__ int straight_row(int i) {
  return wgmma::swizzled(16 * warp_of_four() + lane() % 16, 2 * i + lane() / 16);
}
__device__ __forceinline__ int transposed_row(int i) {
  return wgmma::swizzled(16 * i + 8 * (lane() / 16) + lane() % 8, 2 * warp_of_four() + lane() / 8 % 2);
}

// Over the four lanes that have the columns of a row.
__device__ __forceinline__ float sum_over_quad(float value) {
  value += __shfl_xor_sync(kAllLanes, value, 1);
  return value + __shfl_xor_sync(kAllLanes, value, 2);
}

// Rows of the factors, for the tokens along an accumulator's columns or its rows.
struct Factors {
  const float* at;

  __device__ __forceinline__ float2 columns(Factor which, int block) const {
    return *reinterpret_cast<const float2*>(at + which * kChunk + 8 * block + 2 * (lane() % 4));
  }
  __device__ __forceinline__ float row(Factor which, int token) const { return at[which * kChunk + token]; }
  __device__ __forceinline__ float whole() const { return row(kFromStart, kChunk - 1); }
  __device__ __forceinline__ float to_end(int token) const {
    return exp2_fast(row(kSum, kChunk - 1) - row(kSum, token));
  }
};

// Packs an accumulator whose rows are tokens that read and whose columns are those that wrote, times step and decay; a
// warp has the rows of one block of 16. Masked by choice: what is no number stays out. kStepped: whether the factors to
// a block have the step in them.
template <class T, bool kStepped, int kWarp>
__device__ __forceinline__ void weigh_readers(Word (&weights)[4][4], const float (&scores)[32], const Factors& factors) {
  const int first = row_token(0);
  const float in_block[2] = {factors.row(kInBlock, first), factors.row(kInBlock, first + 8)};
  const float sum[2] = {factors.row(kSum, first), factors.row(kSum, first + 8)};
#pragma unroll
  for (int block = 0; block < 8; ++block) {
    Word* const to = weights[block / 2] + 2 * (block % 2);
    if (block / 2 > kWarp) {
      to[0] = to[1] = 0;
    } else if (block / 2 < kWarp) {
      float2 to_block = factors.columns(static_cast<Factor>(kToBlock1 - 1 + kWarp), block);
      if constexpr (!kStepped) {
        const float2 step = factors.columns(kStep, block);
        to_block.x *= step.x, to_block.y *= step.y;
      }
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        to[row] = wgmma::pack<T>(scores[4 * block + 2 * row] * (in_block[row] * to_block.x),
                                 scores[4 * block + 2 * row + 1] * (in_block[row] * to_block.y));
      }
    } else {
      const float2 written = factors.columns(kSum, block), step = factors.columns(kStep, block);
      const int column = 8 * block + 2 * (lane() % 4);
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const int token = first + 8 * row;
        const float low = scores[4 * block + 2 * row] * step.x * exp2_fast(sum[row] - written.x);
        const float high = scores[4 * block + 2 * row + 1] * step.y * exp2_fast(sum[row] - written.y);
        to[row] = wgmma::pack<T>(column <= token ? low : 0.0f, column < token ? high : 0.0f);
      }
    }
  }
}

template <class T, bool kStepped>
__device__ __forceinline__ void weigh_readers(Word (&weights)[4][4], const float (&scores)[32], const Factors& factors) {
  switch (uniform(warp_of_four())) {
    case 0: return weigh_readers<T, kStepped, 0>(weights, scores, factors);
    case 1: return weigh_readers<T, kStepped, 1>(weights, scores, factors);
    case 2: return weigh_readers<T, kStepped, 2>(weights, scores, factors);
    default: return weigh_readers<T, kStepped, 3>(weights, scores, factors);
  }
}

}  // namespace hylo::ssd
