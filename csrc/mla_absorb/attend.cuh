// A warpgroup that attends to tiles of the cache, each read twice where it lies:
//
//   S^T [64 tokens, N] = keys [64, R + E] queries^T
//   O^T [R, N]         = sum of latents^T [R, 64] P^T, where P = 2^(S - top)
//
// Tokens and latents are what tensor cores take 64 of, so few query rows cost little. `top` need not be the maximum: it
// follows where a score is 2^8 times what it stands for, and sums keep their precision.
#pragma once

#include "mla_absorb/block.cuh"
#include "mla_absorb/products.cuh"

namespace hylo::mla_absorb {

// Stands for the maximum of nothing. Finite, so that differences are never those of two infinities.
constexpr float kNoTop = -1e38f;
constexpr float kTolerance = 8.0f;

// Zeros in a tile's rows of tokens that do not count, by one of 128 threads.
__device__ __forceinline__ void clear_rows(const Piece& piece, int token, unsigned char* keys, int tiles, int thread) {
  for (int i = thread; i < kTokens * 8; i += 128) {
    const int row = i / 8;
    if (token + row >= piece.start && token + row < piece.end) continue;
    for (int tile = 0; tile < tiles; ++tile) {
      *reinterpret_cast<uint4*>(keys + tile * kTileSize + i * 16) = make_uint4(0, 0, 0, 0);
    }
  }
}

template <class T, int kR, int kE, int kN, bool kScaled>
class Attention {
 public:
  static constexpr Dims kDims{kR, kE, kN, kScaled};
  static constexpr int kWide = tiles_of(kR);     // tiles of latents
  static constexpr int kColumns = kN / 4;        // query rows that a thread has numbers of
  static constexpr int kKeyWidth = kR + kE;

  // weights: weights_size bytes of this warpgroup.
  __device__ __forceinline__ Attention(const Params& p, int group, unsigned char* weights, Shared<kN, false>& shared)
      : p_(p), group_(group), warp_(uniform(threadIdx.x / 32 % 4)), weights_(weights), shared_(shared) {
    if constexpr (kScaled) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int n = row_of(c), column = kKeyWidth + (n - n / p_.by_heads * p_.heads) / p_.by_group;
        factors_[c] = column / kTile * kTileSize + wgmma::swizzled(lane() / 4, column % kTile / 8) + column % 8 * 2;
      }
    }
  }

  // The query row, among all tokens' heads, of a thread's column 2 j + e.
  __device__ __forceinline__ int row_of(int c) const { return static_cast<int>(blockIdx.y) * kN + column_of(c); }
  static __device__ __forceinline__ int column_of(int c) { return c / 2 * 8 + 2 * (lane() % 4) + c % 2; }

  __device__ __forceinline__ void start() {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) top_[c] = kNoTop, total_[c] = 0.0f;
#pragma unroll
    for (int i = 0; i < kWide; ++i) {
#pragma unroll
      for (int j = 0; j < kN / 2; ++j) o[i][j] = 0.0f;
    }
  }

  // keys: a stage of the ring, that holds the tile of tokens from `token` on.
  __device__ __forceinline__ void run(const Piece& piece, int token, unsigned char* keys,
                                      const unsigned char* queries) {
    const bool ends = token < piece.start || token + kTokens > piece.end;
    if (ends) clear_others(piece, token, keys);
    float s[kN / 2];
    score(s, keys, queries);
    scale(s, keys);
    if (ends || (p_.causal && token + kTokens > piece.end - p_.tokens + 1)) mask(s, piece, token);
    if (any_of_threads(1 + group_, 128, exceeds(s))) raise(s);
    weigh(s);
    fence_async();
    sync();
    add(keys);
  }

  // Sums of this thread's warp, and what they are relative to, for `merge`.
  __device__ __forceinline__ void leave_totals() {
    over_rows(total_, 0.0f, [](float x, float y) { return x + y; },
              [&](int n, float sum) { shared_.totals[group_][warp_][n] = sum; });
    if (warp_ != 0 || lane() >= 4) return;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) shared_.top[group_][column_of(c)] = top_[c];
  }

  // The register of a column and of one of a thread's two rows.
  static __device__ __forceinline__ constexpr int at(int c, int r) { return c / 2 * 4 + 2 * r + c % 2; }
  __device__ __forceinline__ float top(int c) const { return top_[c]; }
  // The latent of an accumulator's row, of a thread's two.
  __device__ __forceinline__ int latent(int i, int r) const { return kTile * i + 16 * warp_ + lane() / 4 + 8 * r; }
  // Whether a warp's part of a tile is of latents.
  __device__ __forceinline__ bool has_latents(int i) const {
    return kR % kTile == 0 || i < kR / kTile || kTile * i + 16 * warp_ < kR;
  }

  float o[kWide][kN / 2];  // accumulators: 64 latents by N query rows

 private:
  __device__ __forceinline__ void sync() const { meet(1 + group_, 128); }

  // Puts together what the eight lanes that share columns have of each, and calls f(query row, all of it) in one of them:
  // lanes pass on half of their columns, then half of the rest.
  template <class Op, class F>
  __device__ __forceinline__ void over_rows(const float (&of_lane)[kColumns], float nothing, const Op& op,
                                            const F& f) const {
#pragma unroll
    for (int first = 0; first < kColumns; first += 8) {
      float v[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = first + i < kColumns ? of_lane[first + i] : nothing;
#pragma unroll
      for (int left = 4; left > 0; left /= 2) {
        const bool upper = (lane() & 4 * left) != 0;
#pragma unroll
        for (int i = 0; i < left; ++i) {
          const float kept = upper ? v[i + left] : v[i], passed = upper ? v[i] : v[i + left];
          v[i] = op(kept, __shfl_xor_sync(kAllLanes, passed, 4 * left));
        }
      }
      const int c = first + lane() / 4;
      if (c < kColumns) f(column_of(c), v[0]);
    }
  }

  // Zeros instead of rows that do not count: a weight of 0 times a NaN is NaN.
  __device__ __forceinline__ void clear_others(const Piece& piece, int token, unsigned char* keys) const {
    clear_rows(piece, token, keys, key_tiles(kDims), threadIdx.x % 128);
    fence_async();
    sync();
  }

  __device__ __forceinline__ void score(float (&s)[kN / 2], const unsigned char* keys,
                                        const unsigned char* queries) const {
    const DoubleWord left = wgmma::descriptor_k_major(shared_address(keys));
    const DoubleWord right = wgmma::descriptor_k_major(shared_address(queries));
    wgmma::fence();
#pragma unroll
    for (int i = 0; i < kKeyWidth / 16; ++i) {
      const int step = i % 4 * wgmma::kNextKMajor;
      multiply<T, wgmma::kAlongK>(s, left + (i / 4 * (kTileSize >> 4) + step),
                                  right + (i / 4 * (kN * 128 >> 4) + step), i > 0);
    }
    wgmma::commit();
    wgmma::wait<0>();
    wgmma::pin(s);
  }

  __device__ __forceinline__ void scale(float (&s)[kN / 2], const unsigned char* keys) const {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float factor = p_.scale;
        if constexpr (kScaled) {
          factor *= to_float(*reinterpret_cast<const T*>(keys + factors_[c] + (16 * warp_ + 8 * r) * 128));
        }
        s[at(c, r)] *= factor;
      }
    }
  }

  __device__ __forceinline__ void mask(float (&s)[kN / 2], const Piece& piece, int token) const {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int causal_end = piece.end - p_.tokens + 1 + row_of(c) / p_.by_heads;
      const int end = p_.causal && causal_end < piece.end ? causal_end : piece.end;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int mine = token + 16 * warp_ + lane() / 4 + 8 * r;
        if (mine < piece.start || mine >= end) s[at(c, r)] = -__int_as_float(0x7f800000);
      }
    }
  }

  __device__ __forceinline__ bool exceeds(const float (&s)[kN / 2]) const {
    bool any = false;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const float most = top_[c] + kTolerance;
      any |= s[at(c, 0)] > most || s[at(c, 1)] > most;
    }
    return any;
  }

  // Makes `top` the maximum so far.
  __device__ __forceinline__ void raise(const float (&s)[kN / 2]) {
    float tops[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) tops[c] = fmaxf(s[at(c, 0)], s[at(c, 1)]);
    over_rows(tops, kNoTop, [](float x, float y) { return fmaxf(x, y); },
              [&](int n, float top) { shared_.tops[group_][warp_][n] = top; });
    sync();
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      float most = top_[c];
#pragma unroll
      for (int warp = 0; warp < 4; ++warp) most = fmaxf(most, shared_.tops[group_][warp][column_of(c)]);
      const float kept = exp2_fast(top_[c] - most);
      top_[c] = most;
      total_[c] *= kept;
#pragma unroll
      for (int i = 0; i < kWide; ++i) {
#pragma unroll
        for (int r = 0; r < 2; ++r) o[i][at(c, r)] *= kept;
      }
    }
  }

  // Weights, from registers that hold tokens by query rows to a tile whose rows are query rows.
  __device__ __forceinline__ void weigh(float (&s)[kN / 2]) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      s[at(c, 0)] = exp2_fast(s[at(c, 0)] - top_[c]);
      s[at(c, 1)] = exp2_fast(s[at(c, 1)] - top_[c]);
      total_[c] += s[at(c, 0)] + s[at(c, 1)];
    }
    unsigned char* const to = weights_ + wgmma::swizzled(lane() / 16 * 8 + lane() % 8, 2 * warp_ + lane() / 8 % 2);
#pragma unroll
    for (int i = 0; i < kN / 16; ++i) {
      Word packed[4];
      wgmma::pack_operand<T>(packed, s, i);
      store_transposed(to + i * 16 * 128, packed);
    }
    if constexpr (kN % 16 != 0) {
      constexpr int kLast = kN / 2 - 4;
      store_two_transposed(to + kN / 16 * 16 * 128, wgmma::pack<T>(s[kLast], s[kLast + 1]),
                           wgmma::pack<T>(s[kLast + 2], s[kLast + 3]));
    }
  }

  __device__ __forceinline__ void add(const unsigned char* keys) {
    const DoubleWord left = wgmma::descriptor_n_major(shared_address(keys), kTileSize);
    const DoubleWord right = wgmma::descriptor_k_major(shared_address(weights_));
    wgmma::fence();
#pragma unroll
    for (int i = 0; i < kWide; ++i) {
#pragma unroll
      for (int k = 0; k < kTokens / 16; ++k) {
        multiply<T, wgmma::kAlongMN>(o[i], left + (i * (kTileSize >> 4) + k * wgmma::kNextNMajor),
                                     right + k * wgmma::kNextKMajor, true);
      }
    }
    wgmma::commit();
    wgmma::wait<0>();
#pragma unroll
    for (int i = 0; i < kWide; ++i) wgmma::pin(o[i]);
  }

  const Params& p_;
  const int group_, warp_;
  unsigned char* const weights_;
  Shared<kN, false>& shared_;
  float top_[kColumns], total_[kColumns];
  int factors_[kScaled ? kColumns : 1];  // where key scales of the thread's columns lie in a stage, for row lane / 4
};

}  // namespace hylo::mla_absorb
