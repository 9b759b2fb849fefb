// How results become one: those of a block's warpgroups, then of a cluster's blocks, each of which is sent a part of all
// of them and merges it, then of a sequence's pieces, by the blocks whose piece is the last to arrive. Always in the same
// order, whoever comes first, so that the same inputs give the same bits.
#pragma once

#include "common/cluster.cuh"
#include "mla_absorb/attend.cuh"

namespace hylo::mla_absorb {

constexpr int kAllAttend = 1 + kGroups;  // a barrier
static_assert(kGroups == 2, "two are added either way round; more would need an order");

__device__ __forceinline__ void sync_attending() { sync_threads(kAllAttend, kAttending); }

// Four latents of a query row, and the maximum and the sum of its weights that they are relative to.
struct Part {
  float top, total;
  float4 numbers;
};

// One of `count` that load(i) gives, so many of which are on their way together.
template <int kTogether, class F>
__device__ __forceinline__ Part merge(int count, const F& load) {
  Part all{kNoTop, 0.0f, make_float4(0.0f, 0.0f, 0.0f, 0.0f)};
  for (int first = 0; first < count; first += kTogether) {
    Part parts[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) parts[i] = load(first + i < count ? first + i : first);
    float most = all.top;
#pragma unroll
    for (int i = 0; i < kTogether; ++i) most = fmaxf(most, parts[i].top);
    const float kept = exp2_fast(all.top - most);
    all = {most, all.total * kept,
           make_float4(all.numbers.x * kept, all.numbers.y * kept, all.numbers.z * kept, all.numbers.w * kept)};
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const float weight = first + i < count ? exp2_fast(parts[i].top - most) : 0.0f;
      all.total += weight * parts[i].total;
      all.numbers.x += weight * parts[i].numbers.x;
      all.numbers.y += weight * parts[i].numbers.y;
      all.numbers.z += weight * parts[i].numbers.z;
      all.numbers.w += weight * parts[i].numbers.w;
    }
  }
  return all;
}

template <class T, int kR, int kE, int kN, bool kScaled>
class Merger {
 public:
  using Attending = Attention<T, kR, kE, kN, kScaled>;
  static constexpr Dims kDims{kR, kE, kN, kScaled};
  static constexpr int kMerged = room(kDims).merged, kRounds = merging_rounds(kDims);
  static constexpr int kStride = merged_stride(kDims);
  static constexpr int kFours = kR / 4, kAll = kMerged * kFours;  // fours of latents, of a row and of a round
  static_assert(kN % kMerged == 0 && kMerged % 8 == 0, "rounds take whole blocks of an accumulator");
  static_assert(kAll % kMaxCluster == 0, "each block of a cluster has as many");

  // results: results_size bytes.
  __device__ __forceinline__ Merger(const Params& p, int group, float* results, Shared<kN>& shared)
      : p_(p),
        group_(group),
        thread_(threadIdx.x),
        rank_(cluster_rank()),
        blocks_(cluster_size()),
        part_(kAll >> p.cluster_shift),
        results_(results),
        received_(reinterpret_cast<float4*>(results + kMerged * kStride)),
        shared_(shared) {
    const int left = p.tokens * p.heads - static_cast<int>(blockIdx.y) * kN;
    rows_ = left < kN ? left : kN;
  }

  __device__ __forceinline__ void run(Attending& attending, const Piece& piece) {
    attending.leave_totals();
    sync_attending();
    float weights[kN / 4];
#pragma unroll
    for (int c = 0; c < kN / 4; ++c) weights[c] = exp2_fast(attending.top(c) - top_of_groups(Attending::column_of(c)));
    if (thread_ < kN) leave_total();
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      if (round > 0) sync_attending();  // the last one's results have been read
      put(attending, weights, round);
      if (blocks_ > 1) exchange(round);
      merge_blocks(piece, round);
      if (blocks_ > 1 && (round + 1 < kRounds || !piece.ends)) cluster_arrive();  // what was received has been read
    }
    if (piece.pieces > 1 && is_last(piece)) {
#pragma unroll 1
      for (int round = 0; round < kRounds; ++round) merge_pieces(piece, round);
    }
  }

 private:
  __device__ __forceinline__ float top_of_groups(int n) const {
    return fmaxf(shared_.top[0][n], shared_.top[1][n]);
  }

  __device__ __forceinline__ void leave_total() const {
    float sums[kGroups];
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const auto& totals = shared_.totals[group];
      const float sum = totals[0][thread_] + totals[1][thread_] + totals[2][thread_] + totals[3][thread_];
      sums[group] = __fmul_rn(sum, exp2_fast(shared_.top[group][thread_] - top_of_groups(thread_)));
    }
    shared_.total[thread_] = {top_of_groups(thread_), __fadd_rn(sums[0], sums[1])};
  }

  // The warpgroups' sum of some query rows, as rows of latents. It is the same whichever of them had which tiles.
  __device__ __forceinline__ void put(const Attending& attending, const float (&weights)[kN / 4], int round) const {
    if (group_ == 1) put<false>(attending, weights, round);
    sync_attending();
    if (group_ == 0) put<true>(attending, weights, round);
    sync_attending();
  }
  template <bool kAdds>
  __device__ __forceinline__ void put(const Attending& attending, const float (&weights)[kN / 4], int round) const {
#pragma unroll
    for (int i = 0; i < Attending::kWide; ++i) {
      if (!attending.has_latents(i)) continue;
#pragma unroll
      for (int c = 0; c < kMerged / 4; ++c) {
        const int all = round * (kMerged / 4) + c;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float* const to = results_ + Attending::column_of(c) * kStride + attending.latent(i, r);
          const float number = __fmul_rn(attending.o[i][Attending::at(all, r)], weights[all]);
          *to = kAdds ? __fadd_rn(number, *to) : number;
        }
      }
    }
  }

  // Fours of latents of a round's query rows, as far as these exist; each block of the cluster has `part_` in a row.
  __device__ __forceinline__ int fours(int round) const {
    const int left = rows_ - round * kMerged;
    return (left < 0 ? 0 : left < kMerged ? left : kMerged) * kFours;
  }
  __device__ __forceinline__ int fours_here(int round) const {
    const int left = fours(round) - rank_ * part_;
    return left < 0 ? 0 : left < part_ ? left : part_;
  }
  __device__ __forceinline__ float4& result(int four) const {
    return *reinterpret_cast<float4*>(results_ + four / kFours * kStride + four % kFours * 4);
  }

  // Sends each block of the cluster its part of this block's results, and waits for all that come here.
  __device__ __forceinline__ void exchange(int round) {
    if (thread_ == 0) {
      shared_.mailbox.expect(blocks_ * (fours_here(round) * 16 + (round == 0 ? rows_ * 8 : 0)));
    }
    cluster_wait();  // until all have read what came in the round before
    const int all = fours(round);
    for (int i = thread_; i < all; i += kAttending) {
      const int to = (i << p_.cluster_shift) / kAll;
      shared_.mailbox.send(received_ + rank_ * part_ + i - to * part_, to, result(i));
    }
    for (int i = thread_; round == 0 && i < rows_ * blocks_; i += kAttending) {
      const int n = i >> p_.cluster_shift;
      const Total total = shared_.total[n];
      shared_.mailbox.send(&shared_.neighbours[rank_][n], i & (blocks_ - 1), total.top, total.sum);
    }
    shared_.mailbox.await(received_rounds_ & 1);
    ++received_rounds_;
  }

  // Calls f(query row, its first latent, four) for each of this block's fours of a round.
  template <class F>
  __device__ __forceinline__ void each_four(int round, const F& f) const {
    const int here = fours_here(round);
    for (int i = thread_; i < here; i += kAttending) {
      const int four = rank_ * part_ + i;
      f(round * kMerged + four / kFours, four % kFours * 4, i);
    }
  }

  __device__ __forceinline__ Part merged(int n, int i) const {
    const auto received = [&](int block) {
      const Total total = shared_.neighbours[block][n];
      return Part{total.top, total.sum, received_[block * part_ + i]};
    };
    if (blocks_ == 1) return {shared_.total[n].top, shared_.total[n].sum, result(i)};
    return blocks_ > 4 ? merge<8>(blocks_, received) : merge<4>(blocks_, received);
  }

  __device__ __forceinline__ void merge_blocks(const Piece& piece, int round) const {
    each_four(round, [&](int n, int latent, int i) {
      const Part all = merged(n, i);
      if (piece.pieces == 1) {
        send(piece, n, latent, all);
        return;
      }
      const int slot = piece.slot(piece.index);
      *reinterpret_cast<float4*>(partial(slot) + n * kR + latent) = all.numbers;
      if (latent == 0 || i == 0) {
        totals(slot)[n] = all.top;
        totals(slot)[kN + n] = all.total;
      }
    });
  }

  __device__ __forceinline__ void send(const Piece& piece, int n, int latent, const Part& all) const {
    const int of_sequence = static_cast<int>(blockIdx.y) * kN + n;
    const long long row = static_cast<long long>(piece.b) * (p_.tokens * p_.heads) + of_sequence;
    const float factor = all.total == 0.0f ? 1.0f : 1.0f / all.total;
    const uint2 packed{wgmma::pack<T>(all.numbers.x * factor, all.numbers.y * factor),
                       wgmma::pack<T>(all.numbers.z * factor, all.numbers.w * factor)};
    *reinterpret_cast<uint2*>(static_cast<T*>(p_.o) + row * kR + latent) = packed;
    if (latent == 0 && p_.lse != nullptr) {
      constexpr float kLn2 = 0.69314718055994531f;
      p_.lse[row] = all.total == 0.0f ? -__int_as_float(0x7f800000) : (all.top + log2f(all.total)) * kLn2;
    }
  }

  // --- pieces ---

  // Rows of latents, then the maxima and sums, as each block of the cluster has them.
  __device__ __forceinline__ float* partial(int slot) const {
    const long long at = static_cast<long long>(blockIdx.y) * p_.slots + slot;
    return p_.partial + at * partial_size(kDims, blocks_);
  }
  __device__ __forceinline__ float* totals(int slot) const { return partial(slot) + kN * kR + rank_ * 2 * kN; }

  // Whether all others of the sequence are there.
  __device__ __forceinline__ bool is_last(const Piece& piece) const {
    if (thread_ == 0) {
      const long long sequence = static_cast<long long>(blockIdx.y) * p_.slots + piece.slot(0);
      shared_.last = draws_last(p_.tickets + sequence * blocks_ + rank_, piece.pieces);
    }
    sync_attending();
    return shared_.last;
  }

  __device__ __forceinline__ void merge_pieces(const Piece& piece, int round) const {
    each_four(round, [&](int n, int latent, int) {
      send(piece, n, latent, merge<8>(piece.pieces, [&](int i) {
             const int slot = piece.slot(i);
             const float* const of_row = totals(slot) + n;
             return Part{load_written(of_row), load_written(of_row + kN),
                         load_four_written(partial(slot) + n * kR + latent)};
           }));
    });
  }

  const Params& p_;
  const int group_, thread_, rank_, blocks_;
  const int part_;  // fours of a round that a block merges
  int rows_;        // of this tile
  int received_rounds_ = 0;
  float* const results_;    // of a round, [kMerged, kStride]
  float4* const received_;  // of this block's part, [blocks_, part_]
  Shared<kN>& shared_;
};

}  // namespace hylo::mla_absorb
