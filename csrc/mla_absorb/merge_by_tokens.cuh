// How a block's results become one by tokens, where each warpgroup has sums of all latents over tiles of its own.
#pragma once

#include "mla_absorb/merge.cuh"

namespace hylo::mla_absorb {

template <class T, int kR, int kE, int kN, bool kScaled, bool kFp8>
class MergerByTokens : Merger<T, kR, kE, kN, kScaled, kFp8> {
 public:
  using Base = Merger<T, kR, kE, kN, kScaled, kFp8>;
  using Attending = Attention<T, kR, kE, kN, kScaled>;
  using Base::blocks_, Base::kFours, Base::kMerged, Base::kRounds, Base::rows_, Base::thread_;

  // results: results_size bytes, which nobody needs until all attending threads have left their totals.
  __device__ __forceinline__ MergerByTokens(const Params& p, int group, unsigned char* results, unsigned char* received,
                                            Shared<kN, false>& shared)
      : Base(p, received, shared.neighbours, shared.total, shared),
        group_(group),
        results_(reinterpret_cast<float*>(results)),
        shared_(shared) {}

  // is_first: of the run's pieces; the cluster's blocks have met already.
  __device__ __forceinline__ void run(Attending& attending, const Piece& piece, bool is_first) {
    attending.leave_totals();
    sync_attending();
    float weights[kN / 4];
#pragma unroll
    for (int c = 0; c < kN / 4; ++c) weights[c] = exp2_fast(attending.top(c) - top_of_groups(Attending::column_of(c)));
    if (thread_ < kN) shared_.total[thread_] = block_total(thread_);
    if (blocks_ == 1) {
      merge_alone(attending, piece, weights);
    } else {
      merge_in_cluster(attending, piece, weights, is_first);
    }
    this->finish(piece);
  }

 private:
  // What the block has is all there is. As many query rows at once as there is room for, where a cluster's blocks would send
  // what they have, too.
  __device__ __forceinline__ void merge_alone(const Attending& attending, const Piece& piece,
                                              const float (&weights)[kN / 4]) const {
    if (kLeavesSums && piece.pieces > 1) {
      leave_sums(attending, piece, weights);
      return;
    }
#pragma unroll
    for (int first = 0; first < kN; first += kAlone) {
      put<kAlone>(attending, weights, first);
      each_result(least_of(rows_ - first, kAlone), [&](int n, int latent, const float4& numbers) {
        this->keep(piece, first + n, latent, numbers);
      });
      sync_attending();  // the next ones, or weights, take their place
    }
  }

  __device__ __forceinline__ void merge_in_cluster(const Attending& attending, const Piece& piece,
                                                   const float (&weights)[kN / 4], bool is_first) {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      put<kMerged>(attending, weights, round * kMerged);
      this->open(round, is_first && round == 0);
      each_result(this->rows_of(round), [&](int n, int latent, const float4& numbers) {
        this->deliver(round, n, latent, numbers);
      });
      sync_attending();  // the next ones, or weights, take their place
      this->merge_blocks(piece, round);
      if (round + 1 < kRounds || !piece.ends) cluster_arrive();  // what was received has been read
    }
  }

  __device__ __forceinline__ float top_of_groups(int n) const {
    return fmaxf(shared_.top[0][n], shared_.top[1][n]);
  }

  __device__ __forceinline__ Total block_total(int n) const {
    float sums[kGroups];
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const auto& totals = shared_.totals[group];
      const float sum = totals[0][n] + totals[1][n] + totals[2][n] + totals[3][n];
      sums[group] = __fmul_rn(sum, exp2_fast(shared_.top[group][n] - top_of_groups(n)));
    }
    return {top_of_groups(n), __fadd_rn(sums[0], sums[1])};
  }

  // Where the block's result is, of a query row of those merged at once and a latent. Lanes that store meet no bank twice, and
  // four latents lie side by side.
  static constexpr int kRow = Attending::kWide * kTile;  // of results
  static constexpr int kRoom = results_size(Base::kDims, kMerged) + received_size(Base::kDims, kMerged);
  static constexpr int kAlone = kN * kRow * 4 <= kRoom ? kN : kMerged;
  // Of many rows over a cache in fp8, threads have no registers left for where each sum goes.
  static constexpr bool kLeavesSums = kAlone == kN && !(kFp8 && kN > 32);
  __device__ __forceinline__ float* result(int n, int latent) const {
    return results_ + n * kRow + (latent ^ (n / 2 % 4 * 8));
  }

  // The warpgroups' sum for some query rows: of every other tile of latents each adds what it has to what the other left. It
  // is the same whichever of them had which tiles of tokens.
  template <int kRows>
  __device__ __forceinline__ void put(const Attending& attending, const float (&weights)[kN / 4], int first) const {
    put_others<kRows>(attending, weights, first);
    each_part<kRows, true>(attending, weights, first, [](float* at, float number, int, int) {
      *at = __fadd_rn(number, *at);
    });
    sync_attending();
  }
  template <int kRows>
  __device__ __forceinline__ void put_others(const Attending& attending, const float (&weights)[kN / 4],
                                             int first) const {
    each_part<kRows, false>(attending, weights, first, [](float* at, float number, int, int) { *at = number; });
    sync_attending();
  }

  // The same of all rows, to memory at once: eight lanes store eight latents that lie side by side, which is what the second
  // cache takes as a whole.
  __device__ __forceinline__ void leave_sums(const Attending& attending, const Piece& piece,
                                             const float (&weights)[kN / 4]) const {
    put_others<kN>(attending, weights, 0);
    float* const left = this->left_row(piece, Attending::column_of(0)) + attending.latent(0, 0);
    each_part<kN, true>(attending, weights, 0, [&](const float* at, float number, int row, int latent) {
      left[row * kR + latent] = __fadd_rn(number, *at);
    });
    if (thread_ < rows_) this->leave_total(piece, thread_, shared_.total[thread_]);
  }

  // Calls f(where the block's result is, the warpgroup's part of it, query row, latent) for what a thread has of some query
  // rows, in the tiles of latents that its warpgroup adds up, or in the others; row and latent from the thread's first on.
  template <int kRows, bool kOwn, class F>
  __device__ __forceinline__ void each_part(const Attending& attending, const float (&weights)[kN / 4], int first,
                                            const F& f) const {
    // All of a thread's columns have one n / 2 % 4, so that its places differ by what is known at compile time. Where
    // accumulators leave no registers for two of them, each is found anew.
    float* const rows[2] = {result(Attending::column_of(0), attending.latent(0, 0)),
                            result(Attending::column_of(0), attending.latent(0, 1))};
#pragma unroll
    for (int tile = 0; tile < Attending::kWide; ++tile) {
      if ((tile % kGroups == group_) != kOwn || !attending.has_latents(tile)) continue;
#pragma unroll
      for (int c = 0; c < kRows / 4; ++c) {
        const int all = first / 4 + c, row = c / 2 * 8 + c % 2;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float* const at = kN <= 32 ? rows[r] + row * kRow + tile * kTile
                                     : result(Attending::column_of(c), attending.latent(tile, r));
          f(at, __fmul_rn(attending.o[tile][Attending::at(all, r)], weights[all]), row, tile * kTile + 8 * r);
        }
      }
    }
  }

  // Calls f(query row of those merged at once, latent, four from there on) for what a thread has of so many rows.
  template <class F>
  __device__ __forceinline__ void each_result(int rows, const F& f) const {
    const int all = rows * kFours;
#pragma unroll 1
    for (int four = thread_; four < all; four += kAttending) {
      const int n = four / kFours, latent = four % kFours * 4;
      f(n, latent, *reinterpret_cast<const float4*>(result(n, latent)));
    }
  }

  const int group_;
  float* const results_;  // of rows merged at once, [rows, latents in whole tiles]
  Shared<kN, false>& shared_;
};

}  // namespace hylo::mla_absorb
