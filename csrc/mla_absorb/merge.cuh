// How results become one: those of a block's warpgroups (merge_by_tokens.cuh, rows.cuh), then of a cluster's blocks, each of
// which is sent a part of all of them and merges it, then of a sequence's pieces: few by the blocks whose piece is the last to
// arrive, many by all blocks that have one together. Always in the same order, whoever comes first, so that the same inputs
// give the same bits.
#pragma once

#include "common/cluster.cuh"
#include "common/packed.cuh"
#include "mla_absorb/attend.cuh"

namespace hylo::mla_absorb {

constexpr int kAllAttend = 1 + kGroups;  // a barrier
static_assert(kGroups == 2, "two are added either way round; more would need an order");

__device__ __forceinline__ void sync_attending() { meet(kAllAttend, kAttending); }

// Some fours of latents of a query row, and the total of its weights that they are relative to.
template <int kWide>
struct Parts {
  Total total;
  float4 numbers[kWide];
};
using Part = Parts<1>;

template <int kWide = 1>
__device__ __forceinline__ Parts<kWide> nothing() {
  return {{kNoTop, 0.0f}, {}};
}

template <int kWide>
__device__ __forceinline__ Parts<kWide> from_lane(const Parts<kWide>& part, int from) {
  const auto get = [&](float number) { return __shfl_sync(kAllLanes, number, from); };
  Parts<kWide> got{{get(part.total.top), get(part.total.sum)}, {}};
#pragma unroll
  for (int k = 0; k < kWide; ++k) {
    const float4& v = part.numbers[k];
    got.numbers[k] = make_float4(get(v.x), get(v.y), get(v.z), get(v.w));
  }
  return got;
}

// Adds the first `count` of some parts.
template <int kTogether, int kWide>
__device__ __forceinline__ void add(Parts<kWide>& all, const Parts<kWide> (&parts)[kTogether], int count) {
  float most = all.total.top;
#pragma unroll
  for (int i = 0; i < kTogether; ++i) most = i < count ? fmaxf(most, parts[i].total.top) : most;
  const float kept = exp2_fast(all.total.top - most);
  all.total = {most, all.total.sum * kept};
#pragma unroll
  for (int k = 0; k < kWide; ++k) {
    float4& v = all.numbers[k];
    v = make_float4(v.x * kept, v.y * kept, v.z * kept, v.w * kept);
  }
#pragma unroll
  for (int i = 0; i < kTogether; ++i) {
    const float weight = i < count ? exp2_fast(parts[i].total.top - most) : 0.0f;
    all.total.sum += weight * parts[i].total.sum;
#pragma unroll
    for (int k = 0; k < kWide; ++k) {
      const float4& v = parts[i].numbers[k];
      all.numbers[k].x += weight * v.x;
      all.numbers[k].y += weight * v.y;
      all.numbers[k].z += weight * v.z;
      all.numbers[k].w += weight * v.w;
    }
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

// The same of one result of many parts: load(part, i) fills in the i-th, or leaves it alone where there is none. Two sets
// are on their way: as one has been added, it is asked for anew.
template <int kSet, int kWide, class F>
__device__ __forceinline__ Parts<kWide> merge_in_turn(int count, const F& load) {
  Parts<kWide> all = nothing<kWide>(), sets[2][kSet] = {};
  const auto fetch = [&](Parts<kWide> (&set)[kSet], int first) {
#pragma unroll
    for (int i = 0; i < kSet; ++i) load(set[i], first + i);
  };
  fetch(sets[0], 0);
  fetch(sets[1], kSet);
#pragma unroll 1
  for (int first = 0; first < count; first += 2 * kSet) {
#pragma unroll
    for (int set = 0; set < 2; ++set) {
      add(all, sets[set], count - first - set * kSet);
      fetch(sets[set], first + (set + 2) * kSet);
    }
  }
  return all;
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
  __device__ __forceinline__ void deliver(int round, int n, int latent, const float4& numbers) const {
    const int four = n * kFours + latent / 4, to = (four << p_.cluster_shift) / kAll;
    shared_.mailbox.send(inbox(round) + rank_ * part_ + four - to * part_, to, numbers);
  }

  // The same of query row n where there is no cluster: nothing is left to be merged.
  __device__ __forceinline__ void keep(const Piece& piece, int n, int latent, const float4& numbers) const {
    store(piece, n, latent, {total_[n], {numbers}}, latent == 0);
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

  // What all pieces of the sequence left, or a share of it, once all are there.
  __device__ __forceinline__ void finish(const Piece& piece) const {
    if (piece.pieces == 1) return;
    sync_attending();  // all have stored what they merged
    if (thread_ == 0) shared_.found = piece.shares > 1 ? await_others(piece) : arrive(piece);
    sync_attending();
    const Found found = shared_.found;
    if (piece.pieces > kFewPieces) {
      merge_many(piece, found);
    } else if (found == kAllThere) {
      merge_few(piece);
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
        return Part{neighbours_[block][n], {inbox(round)[block * part_ + i]}};
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

  // For the last of the sequence's pieces. first: of the block's, in the query row. Plain C++ had become four stores of a word
  // each, which the second cache takes at a quarter of the speed.
  __device__ __forceinline__ void leave(const Piece& piece, int n, int latent, const Part& all, bool first) const {
    store_words(left_row(piece, n) + latent, pack_words<fp32>(&all.numbers[0].x));
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
    send_four(static_cast<T*>(p_.o) + row * kR + latent, all.numbers[0], share_of_one(all.total.sum));
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
  // Fours of one row, so far apart.
  template <int kWide>
  __device__ __forceinline__ void load(Parts<kWide>& part, int slot, int four, int apart, bool exists) const {
    load_written(part.total, totals(slot) + row_of(four), exists);
    const float4* const from = reinterpret_cast<const float4*>(partial(slot)) + four;
#pragma unroll
    for (int k = 0; k < kWide; ++k) load_written(part.numbers[k], from + k * apart, exists);
  }

  __device__ __forceinline__ int* ticket(int slot) const {
    const long long at = static_cast<long long>(blockIdx.y) * p_.slots + slot;
    return p_.tickets + at * blocks_ + rank_;
  }

  // Where the last to arrive merges all.
  __device__ __forceinline__ Found arrive(const Piece& piece) const {
    return draws_last(ticket(piece.slot(0)), piece.pieces) ? kAllThere : kSomeMissing;
  }

  // Where each block merges a share. It waits for the others, who wait for nobody before they arrive, but not for long: they
  // may not even have begun, for want of the place that this one takes. If it goes, it says so, so that the last to arrive
  // merges its share, too; unless that one has come meanwhile.
  __device__ __forceinline__ Found await_others(const Piece& piece) const {
    int* const all = ticket(piece.slot(0));
    const int before = add_to(all, 1 << kArrived);
    if (so_many(before, kArrived) == piece.pieces - 1) return so_many(before, kGone) > 0 ? kSomeGone : kAllThere;
    if (piece.index >= piece.shares) return kSomeMissing;
    const Word begin = cycles();
    do {
      if (so_many(read_ticket(all), kArrived) == piece.pieces) return kAllThere;
    } while (cycles() - begin < kPatience);
    *ticket(piece.slot_of_share(piece.index)) = 1;
    return so_many(add_to(all, 1 << kGone), kArrived) == piece.pieces ? kAllThere : kSomeMissing;
  }

  // Of those that merge together who is done last leaves zeros behind. Where nobody has gone, that is said ahead of merging,
  // to hide the answer's way.
  __device__ __forceinline__ void merge_many(const Piece& piece, Found found) const {
    int before = 0;
    if (piece.shares > 1 && thread_ == 0 && found != kSomeGone) {
      before = add_loosely(ticket(piece.slot(0)), 1 << kDone);
    }
    if (found != kSomeMissing) merge_shares(piece, found);
    if (found == kSomeGone) {
      sync_attending();  // nobody looks at others' tickets any more
      if (thread_ == 0) before = add_to(ticket(piece.slot(0)), 1 << kDone);
    }
    if (thread_ == 0 && so_many(before, kDone) == piece.pieces - 1) clear(piece, so_many(before, kGone) > 0);
  }

  __device__ __forceinline__ void clear(const Piece& piece, bool some_gone) const {
    *ticket(piece.slot(0)) = 0;
    if (!some_gone) return;
    __threadfence();  // what they said is there
    for (int share = 0; share < piece.shares; ++share) *ticket(piece.slot_of_share(share)) = 0;
  }

  __device__ __forceinline__ void merge_few(const Piece& piece) const {
    if (piece.pieces == 2) {
      merge_fours<2, 8>(piece, 2, 0, fours_of_block());
    } else {
      merge_fours<3, 4>(piece, 3, 0, fours_of_block());
    }
  }

  // Some of the block's fours, each by one thread. Accumulators' registers are free by now: a multiprocessor reads fastest with
  // some 16 fours of each thread on their way. Of few pieces these are of several results.
  template <int kTogether, int kResults>
  __device__ __forceinline__ void merge_fours(const Piece& piece, int pieces, int begin, int end) const {
#pragma unroll 1
    for (int first = begin + thread_; first < end; first += kResults * kAttending) {
      int fours[kResults];  // of the tile's
#pragma unroll
      for (int j = 0; j < kResults; ++j) {
        const int mine = first + j * kAttending;
        fours[j] = mine < end ? of_tile(mine) : kNone;
      }
      Part all[kResults];
      merge<kTogether>(all, pieces, [&](int j, int i) {
        Part part{};
        load(part, piece.slot(i), fours[j], 0, fours[j] != kNone);
        return part;
      });
#pragma unroll
      for (int j = 0; j < kResults; ++j) {
        if (fours[j] != kNone) send(piece, fours[j], all[j]);
      }
    }
  }
  static constexpr int kNone = -1;

  // The block's own share and those of the gone. One who goes just now may find that all are there and merge his as well:
  // both write the same.
  __device__ __forceinline__ void merge_shares(const Piece& piece, Found found) const {
    const int own = piece.shares > 1 ? piece.index : 0;
#pragma unroll 1
    for (int share = found == kSomeGone ? 0 : own; share < piece.shares; ++share) {
      if (share == own || uniform(read_ticket(ticket(piece.slot_of_share(share)))) != 0) merge_share(piece, share);
      if (found != kSomeGone) return;
    }
  }

  // A share is of whole units of fours, none of which is of two rows, where rows let it. Of few pieces one thread has all of a
  // four on their way at once, where lanes that each have some would load in rounds.
  static constexpr int kUnit = kFours % 32 == 0 && kAll % (32 * kMaxCluster) == 0 ? 32 : 1;
  __device__ __forceinline__ void merge_share(const Piece& piece, int share) const {
    constexpr int kSomePieces = 8, kResults = by_rows(kDims) ? 4 : 2;
    const int units = fours_of_block() / kUnit;
    const int begin = units * share / piece.shares * kUnit, end = units * (share + 1) / piece.shares * kUnit;
    if (piece.pieces <= kSomePieces) {
      merge_fours<4, kResults>(piece, piece.pieces, begin, end);
    } else {
      merge_by_lanes(piece, begin, end);
    }
  }

  // A lane takes two fours of one row, for which it looks at totals once. Of fewer fours than the block has threads for, several
  // lanes merge the same ones, each every so many-th piece.
  __device__ __forceinline__ void merge_by_lanes(const Piece& piece, int begin, int end) const {
    constexpr int kWide = kUnit > 1 ? 2 : 1, kMostShift = 4, kSomeMore = kAttending / 8;
    constexpr int kSet = (by_rows(kDims) ? 8 : 6) / kWide;  // more would spill
    int shift = kWide - 1;
    while (shift < kMostShift && (end - begin) / kWide << (shift + 1) <= kAttending + kSomeMore) ++shift;
    const int wide = 32 >> shift, group = lane() / wide;
    const int count = (piece.pieces - group + (1 << shift) - 1) >> shift;
#pragma unroll 1
    for (int first = begin + thread_ / 32 * kWide * wide; first < end; first += kAttending * kWide >> shift) {
      const int mine = first + lane() % wide, four = of_tile(mine < end ? mine : end - 1);
      auto merged = merge_in_turn<kSet, kWide>(count, [&](Parts<kWide>& part, int i) {
        const int of = group + (i << shift);
        load(part, piece.slot(of), four, wide, of < piece.pieces);
      });
#pragma unroll 1
      for (int offset = wide; offset < 32; offset *= 2) {
        const Parts<kWide> other[1] = {from_lane(merged, lane() ^ offset)};
        add(merged, other, 1);
      }
      if (group != 0 || mine >= end) continue;
#pragma unroll
      for (int k = 0; k < kWide; ++k) send(piece, four + k * wide, {merged.total, {merged.numbers[k]}});
    }
  }

  // The block's fours of all rounds, and the i-th of them among all of the tile's.
  __device__ __forceinline__ int fours_of_block() const {
    int all = 0;
#pragma unroll
    for (int round = 0; round < kRounds; ++round) all += fours_here(round);
    return all;
  }
  __device__ __forceinline__ int of_tile(int i) const {
    int round = 0;
#pragma unroll 1
    for (; round + 1 < kRounds && i >= fours_here(round); ++round) i -= fours_here(round);
    return of_tile(round, i);
  }
  __device__ __forceinline__ void send(const Piece& piece, int four, const Part& all) const {
    send(piece, row_of(four), latent_of(four), all);
  }

 protected:
  const Params& p_;
  const int thread_, rank_, blocks_;
  int rows_;  // of this tile

 private:
  const int part_;  // fours of a round that a block merges
  int received_rounds_ = 0, second_ = 0;
  float4* const received_;  // of this block's part, [blocks_, part_]
  Total (*const neighbours_)[kN];
  Total* const total_;
  SharedByAll& shared_;
};

}  // namespace hylo::mla_absorb
