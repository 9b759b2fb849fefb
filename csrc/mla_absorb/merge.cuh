// How results become one: those of a block's warpgroups, then of a cluster's blocks, each of which is sent a part of
// all of them and merges it, then of a sequence's pieces, by the blocks whose piece is the last to arrive. Always in the
// same order, whoever comes first, so that the same inputs give the same bits.
#pragma once

#include "common/cluster.cuh"
#include "mla_absorb/attend.cuh"

namespace hylo::mla_absorb {

constexpr int kAllAttend = 1 + kGroups;  // a barrier
static_assert(kGroups == 2, "two are added either way round; more would need an order");

__device__ __forceinline__ void sync_attending() { sync_threads(kAllAttend, kAttending); }

// Four latents of a query row, and the total of its weights that they are relative to.
struct Part {
  Total total;
  float4 numbers;
};

__device__ __forceinline__ Part nothing() { return {{kNoTop, 0.0f}, make_float4(0.0f, 0.0f, 0.0f, 0.0f)}; }

// Adds the first `count` of some parts.
template <int kTogether>
__device__ __forceinline__ void add(Part& all, const Part (&parts)[kTogether], int count) {
  float most = all.total.top;
#pragma unroll
  for (int i = 0; i < kTogether; ++i) most = i < count ? fmaxf(most, parts[i].total.top) : most;
  const float kept = exp2_fast(all.total.top - most);
  all = {{most, all.total.sum * kept},
         make_float4(all.numbers.x * kept, all.numbers.y * kept, all.numbers.z * kept, all.numbers.w * kept)};
#pragma unroll
  for (int i = 0; i < kTogether; ++i) {
    const float weight = i < count ? exp2_fast(parts[i].total.top - most) : 0.0f;
    all.total.sum += weight * parts[i].total.sum;
    all.numbers.x += weight * parts[i].numbers.x;
    all.numbers.y += weight * parts[i].numbers.y;
    all.numbers.z += weight * parts[i].numbers.z;
    all.numbers.w += weight * parts[i].numbers.w;
  }
}

// Some results at once: the j-th is that of `count` parts load(j, i). Those of so many i are on their way together.
template <int kTogether, int kResults, class F>
__device__ __forceinline__ void merge(Part (&all)[kResults], int count, const F& load) {
#pragma unroll
  for (int j = 0; j < kResults; ++j) all[j] = nothing();
#pragma unroll 1
  for (int first = 0; first < count; first += kTogether) {
    Part parts[kResults][kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
#pragma unroll
      for (int j = 0; j < kResults; ++j) parts[j][i] = load(j, first + i < count ? first + i : first);
    }
#pragma unroll
    for (int j = 0; j < kResults; ++j) add(all[j], parts[j], count - first);
  }
}

// What both ways of attending share. A block has results of its query rows, round by round, which it `deliver`s.
template <class T, int kR, int kE, int kN, bool kScaled, bool kFp8 = false>
class Merger {
 public:
  static constexpr Dims kDims{kR, kE, kN, kScaled, kFp8};
  static constexpr int kMerged = room(kDims).merged, kRounds = merging_rounds(kDims);
  static constexpr int kFours = kR / 4, kAll = kMerged * kFours;  // fours of latents, of a row and of a round
  static_assert(kN % kMerged == 0 && kMerged % 8 == 0, "rounds take whole blocks of an accumulator");
  static_assert(kAll % kMaxCluster == 0, "each block of a cluster has as many");

  // received: received_size bytes. neighbours: totals of the cluster's blocks, sent by them.
  __device__ __forceinline__ Merger(const Params& p, unsigned char* received, Total (*neighbours)[kN], Total* total,
                                    SharedByAll& shared)
      : p_(p),
        thread_(threadIdx.x),
        rank_(cluster_rank()),
        blocks_(cluster_size()),
        part_(kAll >> p.cluster_shift),
        received_(reinterpret_cast<float4*>(received)),
        neighbours_(neighbours),
        total_(total),
        shared_(shared) {
    const int left = p.tokens * p.heads - static_cast<int>(blockIdx.y) * kN;
    rows_ = left < kN ? left : kN;
  }

 protected:
  // Query rows of a round, as far as they exist.
  __device__ __forceinline__ int rows_of(int round) const {
    const int left = rows_ - round * kMerged;
    return left < 0 ? 0 : left < kMerged ? left : kMerged;
  }
  // Fours of a round, of which each block of the cluster has `part_` in a row.
  __device__ __forceinline__ int fours_here(int round) const {
    const int left = rows_of(round) * kFours - rank_ * part_;
    return left < 0 ? 0 : left < part_ ? left : part_;
  }

  // Sends go out once all have read what came in the round before, and bytes are expected no sooner: by rows no barrier of the
  // block lies between two rounds, and a phase without bytes would be over before all warps have seen the end of the one
  // before.
  __device__ __forceinline__ void open(int round, bool have_met) const {
    if (!have_met) cluster_wait();
    if (thread_ == 0) {
      const int fours = fours_here(round) + (second_ != 0 ? fours_here(1) : 0);
      shared_.mailbox.expect(blocks_ * (fours * 16 + (round == 0 ? rows_ * 8 : 0)));
    }
    __syncwarp();
#pragma unroll 1
    for (int i = thread_; round == 0 && i < rows_ << p_.cluster_shift; i += kAttending) {
      const int n = i >> p_.cluster_shift;
      shared_.mailbox.send(&neighbours_[rank_][n], i & (blocks_ - 1), total_[n]);
    }
  }

  // Four latents of the n-th query row of a round to the block of the cluster that merges them.
  __device__ __forceinline__ void deliver(const Piece& piece, int round, int n, int latent,
                                          const float4& numbers) const {
    if (blocks_ == 1) {
      const Total total = total_[round * kMerged + n];
      store(piece, round * kMerged + n, latent, {total, numbers}, latent == 0);
      return;
    }
    const int four = n * kFours + latent / 4, to = (four << p_.cluster_shift) / kAll;
    shared_.mailbox.send(inbox(round) + rank_ * part_ + four - to * part_, to, numbers);
  }

  // The whole query row n of a round, where a block merges rows as a whole.
  __device__ __forceinline__ Place row_there(int round, int n) const {
    static_assert(kAll / kMaxCluster % kFours == 0 || !by_rows(kDims), "rows are cut between blocks");
    const int first = (n - round * kMerged) * kFours, to = (first << p_.cluster_shift) / kAll;
    return shared_.mailbox.place(inbox(round) + rank_ * part_ + first - to * part_, to);
  }

  // What all blocks of the cluster have sent, once it is there.
  __device__ __forceinline__ void merge_blocks(const Piece& piece, int round) {
    shared_.mailbox.await(received_rounds_++ & 1);
    if (second_ != 0) merge_received(piece, 0);
    merge_received(piece, round);
    __syncwarp();
  }

  // Whether the second round comes with the first: then it has a place of its own, so many fours from that one's. 0: it
  // does not.
  __device__ __forceinline__ void merge_together(int second) { second_ = second; }
  __device__ __forceinline__ float4* inbox(int round) const { return received_ + (round > 0 ? second_ : 0); }

  // What all pieces of the sequence left, if this is the last of them.
  __device__ __forceinline__ void finish(const Piece& piece) const {
    if (piece.pieces == 1 || !is_last(piece)) return;
#pragma unroll 1
    for (int round = 0; round < kRounds; ++round) {
      if (piece.pieces == 2) {
        merge_few<2>(piece, round);
      } else if (piece.pieces == 3) {
        merge_few<3>(piece, round);
      } else {
        merge_each(piece, round);
      }
    }
  }

  // Calls f(query row, its first latent, four) for each of this block's fours of a round.
  template <class F>
  __device__ __forceinline__ void each_four(int round, const F& f) const {
    const int here = fours_here(round);
#pragma unroll 1
    for (int i = thread_; i < here; i += kAttending) {
      const int four = of_tile(round, i);
      f(row_of(four), latent_of(four), i);
    }
  }
  // Among all fours of the tile's query rows, the block's i-th of a round.
  __device__ __forceinline__ int of_tile(int round, int i) const { return round * kAll + rank_ * part_ + i; }
  static __device__ __forceinline__ int row_of(int four) { return static_cast<int>(static_cast<Word>(four) / kFours); }
  static __device__ __forceinline__ int latent_of(int four) { return four % kFours * 4; }

  __device__ __forceinline__ void merge_received(const Piece& piece, int round) const {
    each_four(round, [&](int n, int latent, int i) {
      const auto received = [&](int, int block) {
        return Part{neighbours_[block][n], inbox(round)[block * part_ + i]};
      };
      Part all[1];
      merge<8>(all, blocks_, received);
      store(piece, n, latent, all[0], latent == 0 || i == 0);
    });
  }

  __device__ __forceinline__ void store(const Piece& piece, int n, int latent, const Part& all, bool first) const {
    if (piece.pieces == 1) {
      send(piece, n, latent, all);
    } else {
      leave(piece, n, latent, all, first);
    }
  }

  // For the last of the sequence's pieces. first: of the block's, in the query row.
  __device__ __forceinline__ void leave(const Piece& piece, int n, int latent, const Part& all, bool first) const {
    *reinterpret_cast<float4*>(left_row(piece, n) + latent) = all.numbers;
    if (first) leave_total(piece, n, all.total);
  }
  __device__ __forceinline__ float* left_row(const Piece& piece, int n) const {
    return partial(piece.slot(piece.index)) + n * kR;
  }
  __device__ __forceinline__ void leave_total(const Piece& piece, int n, const Total& total) const {
    totals(piece.slot(piece.index))[n] = total;
  }

  __device__ __forceinline__ void send(const Piece& piece, int n, int latent, const Part& all) const {
    const long long row = row_of_o(piece, n);
    send_four(static_cast<T*>(p_.o) + row * kR + latent, all.numbers, share_of_one(all.total.sum));
    if (latent == 0) send_lse(row, all.total);
  }
  __device__ __forceinline__ long long row_of_o(const Piece& piece, int n) const {
    const int of_sequence = static_cast<int>(blockIdx.y) * kN + n;
    return static_cast<long long>(piece.b) * (p_.tokens * p_.heads) + of_sequence;
  }
  // What numbers of that total are multiplied by.
  static __device__ __forceinline__ float share_of_one(float total) { return total == 0.0f ? 1.0f : reciprocal_fast(total); }
  static __device__ __forceinline__ void send_four(T* to, const float4& numbers, float factor) {
    *reinterpret_cast<uint2*>(to) = {wgmma::pack<T>(numbers.x * factor, numbers.y * factor),
                                     wgmma::pack<T>(numbers.z * factor, numbers.w * factor)};
  }
  __device__ __forceinline__ void send_lse(long long row, const Total& total) const {
    constexpr float kLn2 = 0.69314718055994531f;
    if (p_.lse == nullptr) return;
    p_.lse[row] = total.sum == 0.0f ? -__int_as_float(0x7f800000) : (total.top + log2f(total.sum)) * kLn2;
  }

 private:
  // --- pieces ---

  // Rows of latents, then the maxima and sums, as each block of the cluster has them.
  __device__ __forceinline__ float* partial(int slot) const {
    const long long at = static_cast<long long>(blockIdx.y) * p_.slots + slot;
    return p_.partial + at * partial_size(kDims, blocks_);
  }
  __device__ __forceinline__ Total* totals(int slot) const {
    return reinterpret_cast<Total*>(partial(slot) + kN * kR) + rank_ * kN;
  }
  __device__ __forceinline__ void load(Part& part, int slot, int four, bool exists) const {
    load_written(part.total, totals(slot) + row_of(four), exists);
    load_written(part.numbers, reinterpret_cast<const float4*>(partial(slot)) + four, exists);
  }

  // Whether all others of the sequence are there.
  __device__ __forceinline__ bool is_last(const Piece& piece) const {
    sync_attending();  // all have stored what they merged
    if (thread_ == 0) {
      const long long sequence = static_cast<long long>(blockIdx.y) * p_.slots + piece.slot(0);
      shared_.last = draws_last(p_.tickets + sequence * blocks_ + rank_, piece.pieces);
    }
    sync_attending();
    return shared_.last;
  }

  // Accumulators' registers are free by now: a multiprocessor reads fastest with some 16 fours of each thread on their
  // way. Of few pieces these are of several results.
  template <int kPieces>
  __device__ __forceinline__ void merge_few(const Piece& piece, int round) const {
    constexpr int kResults = kPieces == 2 ? 8 : 4;
    const int here = fours_here(round);
#pragma unroll 1
    for (int first = thread_; first < here; first += kResults * kAttending) {
      Part all[kResults];
      merge<kPieces>(all, kPieces, [&](int j, int i) {
        const int four = first + j * kAttending;
        Part part{};
        load(part, piece.slot(i), of_tile(round, four), four < here);
        return part;
      });
#pragma unroll
      for (int j = 0; j < kResults; ++j) {
        if (first + j * kAttending < here) send(piece, of_tile(round, first + j * kAttending), all[j]);
      }
    }
  }

  __device__ __forceinline__ void merge_each(const Piece& piece, int round) const {
    each_four(round, [&](int, int, int i) {
      const int four = of_tile(round, i);
      Part all[1];
      merge<8>(all, piece.pieces, [&](int, int of) {
        Part part{};
        load(part, piece.slot(of), four, true);
        return part;
      });
      send(piece, four, all[0]);
    });
  }
  __device__ __forceinline__ void send(const Piece& piece, int four, const Part& all) const {
    send(piece, row_of(four), latent_of(four), all);
  }

 protected:
  const Params& p_;
  const int thread_, rank_, blocks_;

 private:
  const int part_;  // fours of a round that a block merges
  int rows_;        // of this tile
  int received_rounds_ = 0, second_ = 0;
  float4* const received_;  // of this block's part, [blocks_, part_]
  Total (*const neighbours_)[kN];
  Total* const total_;
  SharedByAll& shared_;
};

// By tokens: each warpgroup has sums of all latents over tiles of its own.
template <class T, int kR, int kE, int kN, bool kScaled, bool kFp8>
class MergerByTokens : Merger<T, kR, kE, kN, kScaled, kFp8> {
 public:
  using Base = Merger<T, kR, kE, kN, kScaled, kFp8>;
  using Attending = Attention<T, kR, kE, kN, kScaled>;
  using Base::blocks_, Base::kFours, Base::kMerged, Base::kRounds, Base::thread_;

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
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      put(attending, weights, round);
      if (blocks_ > 1) this->open(round, is_first && round == 0);
      pass_on(piece, round);
      sync_attending();  // the next ones, or weights, take their place
      if (blocks_ == 1) continue;
      this->merge_blocks(piece, round);
      if (round + 1 < kRounds || !piece.ends) cluster_arrive();  // what was received has been read
    }
    this->finish(piece);
  }

 private:
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

  // Where the block's result is, of a query row of the round and a latent. Lanes that store meet no bank twice, and four
  // latents lie side by side.
  static constexpr int kRow = Attending::kWide * kTile;  // of results
  __device__ __forceinline__ float* result(int n, int latent) const {
    return results_ + n * kRow + (latent ^ (n / 2 % 4 * 8));
  }

  // The warpgroups' sum for a round's query rows: of every other tile of latents each adds what it has to what the other
  // left. It is the same whichever of them had which tiles of tokens.
  __device__ __forceinline__ void put(const Attending& attending, const float (&weights)[kN / 4], int round) const {
    put<false>(attending, weights, round);
    sync_attending();
    put<true>(attending, weights, round);
    sync_attending();
  }
  template <bool kAdds>
  __device__ __forceinline__ void put(const Attending& attending, const float (&weights)[kN / 4], int round) const {
    // All of a thread's columns have one n / 2 % 4, so that its places differ by what is known at compile time. Where
    // accumulators leave no registers for two of them, each is found anew.
    float* const rows[2] = {result(Attending::column_of(0), attending.latent(0, 0)),
                            result(Attending::column_of(0), attending.latent(0, 1))};
#pragma unroll
    for (int tile = 0; tile < Attending::kWide; ++tile) {
      if ((tile % kGroups == group_) != kAdds || !attending.has_latents(tile)) continue;
#pragma unroll
      for (int c = 0; c < kMerged / 4; ++c) {
        const int all = round * (kMerged / 4) + c;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float* const to = kN <= 32 ? rows[r] + (c / 2 * 8 + c % 2) * kRow + tile * kTile
                                     : result(Attending::column_of(c), attending.latent(tile, r));
          const float number = __fmul_rn(attending.o[tile][Attending::at(all, r)], weights[all]);
          *to = kAdds ? __fadd_rn(number, *to) : number;
        }
      }
    }
  }

  __device__ __forceinline__ void pass_on(const Piece& piece, int round) const {
    const int all = this->rows_of(round) * kFours;
#pragma unroll 1
    for (int four = thread_; four < all; four += kAttending) {
      const int n = four / kFours, latent = four % kFours * 4;
      this->deliver(piece, round, n, latent, *reinterpret_cast<const float4*>(result(n, latent)));
    }
  }

  const int group_;
  float* const results_;  // of a round, [kMerged, latents in whole tiles]
  Shared<kN, false>& shared_;
};

}  // namespace hylo::mla_absorb
