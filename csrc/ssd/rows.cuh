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
// factors to a block are 0 for tokens not before it, so products of them serve all columns but those of the block itself:
// these eight numbers of a thread are made beforehand and chosen, since a branch for each would keep loads and arithmetic
// of different columns apart.
//
// kWarp: which of the four warps it is, where each has code of its own, or kAnyWarp. Its own is faster, but large code
// four times over does not stay in the instruction cache.
// kRowsRead: whether rows are tokens that read and columns those that write, or the other way round.
constexpr int kAnyWarp = -1;

template <int kWarp, bool kRowsRead>
class Decays {
 public:
  __device__ __forceinline__ explicit Decays(const Factors& factors)
      : factors_(factors),
        warp_(kWarp == kAnyWarp ? uniform(warp_of_four()) : kWarp),
        sum_{factors.row(kSum, row_token(0)), factors.row(kSum, row_token(1))} {
    if constexpr (kWarp == kAnyWarp) {
#pragma unroll
      for (int i = 0; i < 4; ++i) own_[i / 2][i % 2] = between(i / 2, i % 2);
    }
  }

  __device__ __forceinline__ int warp() const { return kWarp == kAnyWarp ? warp_ : kWarp; }
  // Whether columns 8 block to 8 block + 7 are known to be later ones than the rows.
  static __device__ __forceinline__ constexpr bool later(int block) { return kWarp != kAnyWarp && block / 2 > kWarp; }

  // Of the warp's own 16 tokens, for its columns 8 block to 8 block + 7.
  __device__ __forceinline__ float2 own(int block, int row) const {
    return kWarp == kAnyWarp ? own_[block][row] : between(block, row);
  }

  // What is among the same 16 tokens, or else.
  __device__ __forceinline__ float2 choose(int block, const float2& own, const float2& other) const {
    const bool same = block / 2 == warp();
    return make_float2(same ? own.x : other.x, same ? own.y : other.y);
  }

 private:
  // Masked by choice: where time runs backwards the exponential overflows.
  __device__ __forceinline__ float2 between(int block, int row) const {
    const float of_row = sum_[row];
    // Counted from the warp's first token; from the chunk's where the comparisons, the same for each of a loop's chunks,
    // would otherwise be kept in registers that are not there.
    const int columns_from = kWarp == kAnyWarp ? 0 : kBlock * warp(), from = kWarp == kAnyWarp ? 0 : kBlock * warp_of_four();
    const int column = columns_from + 8 * block + 2 * (lane() % 4), token = from + lane() / 4 + 8 * row;
    const float2 of_columns = factors_.columns(kSum, 2 * warp() + block);
    const float low = exp2_fast(kRowsRead ? of_row - of_columns.x : of_columns.x - of_row);
    const float high = exp2_fast(kRowsRead ? of_row - of_columns.y : of_columns.y - of_row);
    const bool first = kRowsRead ? column <= token : column >= token;
    const bool second = kRowsRead ? column < token : column + 1 >= token;
    return make_float2(first ? low : 0.0f, second ? high : 0.0f);
  }

  const Factors factors_;
  const int warp_;
  const float sum_[2];
  float2 own_[2][2];
};

// Packs an accumulator whose rows are tokens that read and whose columns are those that wrote, times step and decay.
// kStepped: whether the factors to a block have the step in them.
template <class T, bool kStepped, int kWarp>
__device__ __forceinline__ void weigh_readers(Word (&weights)[4][4], const float (&scores)[32], const Factors& factors) {
  const Decays<kWarp, true> decays(factors);
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
      const float2 own = decays.own(block % 2, row);
      const float2 weight = decays.choose(block, make_float2(own.x * step.x, own.y * step.y),
                                          make_float2(in_block[row] * written.x, in_block[row] * written.y));
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
