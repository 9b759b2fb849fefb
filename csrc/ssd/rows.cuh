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

// Decays of one head between the tokens of a warp's rows, one block of 16, and those of an accumulator's columns. The
// factors to a block are 0 for tokens not before it, so products of them serve all columns but those of the block itself.
//
// kWarp: which of the four warps it is, where each has code of its own, or kAnyWarp. Its own is faster, but large code
// four times over does not stay in the instruction cache.
constexpr int kAnyWarp = -1;

template <int kWarp>
class Decays {
 public:
  __device__ __forceinline__ explicit Decays(const Factors& factors)
      : factors_(factors),
        warp_(kWarp == kAnyWarp ? uniform(warp_of_four()) : kWarp),
        sum_{factors.row(kSum, row_token(0)), factors.row(kSum, row_token(1))} {}

  // Whether columns 8 block to 8 block + 7 are of the same 16 tokens as the rows. The same for all lanes.
  __device__ __forceinline__ bool same(int block) const { return block / 2 == warp(); }
  // Whether they are known to be later ones.
  static __device__ __forceinline__ constexpr bool later(int block) { return kWarp != kAnyWarp && block / 2 > kWarp; }
  __device__ __forceinline__ int warp() const { return kWarp == kAnyWarp ? warp_ : kWarp; }
  __device__ __forceinline__ const Factors& factors() const { return factors_; }

  // From a column's token through a row's, or the other way round, where they are of the same 16. Masked by choice: where
  // time runs backwards the exponential overflows.
  template <bool kRowsRead>
  __device__ __forceinline__ float2 between(int block, int row) const {
    const int column = 8 * block + 2 * (lane() % 4), token = row_token(row);
    const float2 sum = factors_.columns(kSum, block);
    const float low = exp2_fast(kRowsRead ? sum_[row] - sum.x : sum.x - sum_[row]);
    const float high = exp2_fast(kRowsRead ? sum_[row] - sum.y : sum.y - sum_[row]);
    const bool first = kRowsRead ? column <= token : column >= token;
    const bool second = kRowsRead ? column < token : column + 1 >= token;
    return make_float2(first ? low : 0.0f, second ? high : 0.0f);
  }

 private:
  const Factors factors_;
  const int warp_;
  const float sum_[2];
};

// Packs an accumulator whose rows are tokens that read and whose columns are those that wrote, times step and decay.
// kStepped: whether the factors to a block have the step in them.
template <class T, bool kStepped, int kWarp>
__device__ __forceinline__ void weigh_readers(Word (&weights)[4][4], const float (&scores)[32], const Factors& factors) {
  const Decays<kWarp> decays(factors);
  const bool any = decays.warp() > 0;
  const auto to_block = static_cast<Factor>(kToBlock1 + (any ? decays.warp() - 1 : 0));
  const float in_block[2] = {any ? factors.row(kInBlock, row_token(0)) : 0.0f,
                             any ? factors.row(kInBlock, row_token(1)) : 0.0f};
#pragma unroll
  for (int block = 0; block < 8; ++block) {
    Word* const to = weights[block / 2] + 2 * (block % 2);
    if (decays.later(block)) {
      to[0] = to[1] = 0;
      continue;
    }
    const float2 step = factors.columns(kStep, block);
    float2 written = factors.columns(to_block, block);
    if constexpr (!kStepped) written.x *= step.x, written.y *= step.y;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float2 weight = make_float2(in_block[row] * written.x, in_block[row] * written.y);
      if (decays.same(block)) {
        weight = decays.template between<true>(block, row);
        weight.x *= step.x, weight.y *= step.y;
      }
      const int at = 4 * block + 2 * row;
      to[row] = wgmma::pack<T>(scores[at] * weight.x, scores[at + 1] * weight.y);
    }
  }
}

// The same with code of its own for each warp.
template <class T, bool kStepped>
__device__ __forceinline__ void weigh_readers_by_warp(Word (&weights)[4][4], const float (&scores)[32],
                                                      const Factors& factors) {
  switch (uniform(warp_of_four())) {
    case 0: return weigh_readers<T, kStepped, 0>(weights, scores, factors);
    case 1: return weigh_readers<T, kStepped, 1>(weights, scores, factors);
    case 2: return weigh_readers<T, kStepped, 2>(weights, scores, factors);
    default: return weigh_readers<T, kStepped, 3>(weights, scores, factors);
  }
}

}  // namespace hylo::ssd
