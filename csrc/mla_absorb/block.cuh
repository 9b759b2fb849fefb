// What the warps of a block share, and the pieces of work that each of them goes through.
#pragma once

#include "common/cluster.cuh"
#include "common/divider.cuh"
#include "mla_absorb/neighbours.cuh"
#include "mla_absorb/params.h"
#include "mla_absorb/work.cuh"

namespace hylo::mla_absorb {

// Named barriers: 0 is __syncthreads', each warpgroup that attends has its own from 1 on, both together the next.
constexpr int kBarriers = 8;

// sync_threads. A build with HYLO_MEET_TWICE is for racecheck, which loses sight of a barrier that is used again and again
// (docs/mla_absorb.md): the same threads meet once more, at another barrier.
__device__ __forceinline__ void meet(int barrier, int threads) {
  sync_threads(barrier, threads);
#ifdef HYLO_MEET_TWICE
  sync_threads(kBarriers + barrier, threads);
#endif
}

// What a block finds when its piece of a sequence has arrived: not all others have; all have; all have, but some blocks
// had gone before that.
enum Found { kSomeMissing, kAllThere, kSomeGone };

// The counts of a ticket, where blocks merge a sequence together: pieces that have arrived, blocks that have gone before
// all had, and those that need no ticket any more.
enum Counts { kArrived = 0, kGone = 10, kDone = 20 };
__device__ __forceinline__ int so_many(int ticket, Counts which) { return ticket >> which & kMostTogether; }

struct SharedByAll {
  Handover stages[kMaxStages];  // by rows, parts of them; behind them, what rows in fp8 come to
  Handover queries[2];
  Mailbox mailbox;  // results of the cluster's blocks
  Run run;                        // of the block's cluster
  Found found;
  Count units[kMaxBatch / 32];    // of 32 sequences each
};

template <int kN, bool kByRows>
struct Shared : SharedByAll {
  float tops[kGroups][4][kN], totals[kGroups][4][kN];  // of warps
  float top[kGroups][kN];                              // that weights are relative to
  Total total[kN];                   // of the block
  Total neighbours[kMaxCluster][kN];  // of the cluster's blocks, sent by them
};

// Lengths and tables: as they are while the kernel before may still write them, or as it left them.
enum Moment { kSoFar, kFinal };

template <Moment kAt>
__device__ __forceinline__ long long integer(const Integers& of, long long i) {
  const long long at = i * of.stride;
  const auto* const wide = static_cast<const long long*>(of.data);
  const auto* const narrow = static_cast<const int*>(of.data);
  if constexpr (kAt == kSoFar) return of.wide ? load_so_far(wide + at) : load_so_far(narrow + at);
  return of.wide ? wide[at] : narrow[at];
}

template <Moment kAt>
__device__ __forceinline__ Sequence sequence_at(const Params& p, int b) {
  const long long start = p.starts.data == nullptr ? 0 : integer<kAt>(p.starts, b);
  return sequence_of(integer<kAt>(p.lengths, b), start, p.capacity, p.cut);
}

// Inclusive, over a warp.
__device__ __forceinline__ int sums_up_to(int value) {
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int before = __shfl_up_sync(kAllLanes, value, offset);
    if (lane() >= offset) value += before;
  }
  return value;
}

// How many of a warp's numbers, in order, come to no more than `unit` with all before them; `passed` grows by those.
__device__ __forceinline__ int count_before(int value, bool exists, int unit, int& passed) {
  const int sum = passed + sums_up_to(exists ? value : 0);
  const int before = __popc(__ballot_sync(kAllLanes, exists && sum <= unit));
  const int up_to = __shfl_sync(kAllLanes, sum, before > 0 ? before - 1 : 0);
  if (before > 0) passed = up_to;
  return before;
}

__device__ __forceinline__ int units_at(const Params& p, int b) {
  return b < p.batch ? sequence_at<kFinal>(p, b).units : 0;
}

// Over a warp.
__device__ __forceinline__ Count count_of(int total, int most) {
  return {static_cast<int>(__reduce_add_sync(kAllLanes, total)), __reduce_max_sync(kAllLanes, most)};
}

__device__ __forceinline__ Run run_here(const Params& p, const Count& units) {
  const int share = share_of(units, p.batch, p.clusters, p.least, p.cut);
  return run_of(static_cast<int>(blockIdx.x) >> p.cluster_shift, share, units.total);
}

// Takes the sequence that a run begins with from the 32 that begin with `first`, given the units of the lane's one of
// them; false where it is none of them. run.first_unit are the units of all before, and grow.
__device__ __forceinline__ bool begin_with(Run& run, const Params& p, int first, int units) {
  const int before = count_before(units, first + lane() < p.batch, run.unit, run.first_unit);
  run.b = first + before;
  return before < 32;
}

// What a block begins with: its first piece, and the run that goes on after it.
struct First {
  Run run;
  Piece piece;

  __device__ __forceinline__ bool exists() const { return piece.pieces > 0; }
};

template <int kN>
struct Shared<kN, true> : SharedByAll {
  Barrier weighed[kMostRowStages];       // a stage's weights are there
  float2 tops[kMostRowStages][128];      // that they are relative to, of a thread's two rows
  float totals[kGroups][kN];
  Total total[kN];
  First at[kGroups][4];                  // of a warp
};

__device__ __forceinline__ First first_of(const Params& p, const Run& run, const Sequence& sequence) {
  First first{run, {}};
  if (run.unit < run.last) first.piece = take(first.run, sequence, p.batch, p.cluster_shift, p.cut);
  return first;
}

// The tokens that count of up to kForeseen sequences, the lane's of each 32.
struct Ends {
  static constexpr int kSets = kForeseen / 32;
  int start[kSets], end[kSets];
};

template <Moment kAt>
__device__ __forceinline__ Ends ends_of_few(const Params& p) {
  Ends ends{};
#pragma unroll
  for (int set = 0; set < Ends::kSets; ++set) {
    if (32 * set + lane() >= p.batch) continue;
    const Sequence sequence = sequence_at<kAt>(p, 32 * set + lane());
    ends.start[set] = sequence.start;
    ends.end[set] = sequence.end;
  }
  return ends;
}

// Whether they are the same, for all lanes.
__device__ __forceinline__ bool same(const Ends& a, const Ends& b) {
  int differs = 0;
#pragma unroll
  for (int set = 0; set < Ends::kSets; ++set) differs |= (a.start[set] ^ b.start[set]) | (a.end[set] ^ b.end[set]);
  return __ballot_sync(kAllLanes, differs != 0) == 0;
}

// Each warp by itself.
__device__ __forceinline__ First first_of_few(const Params& p, const Ends& ends) {
  int units[Ends::kSets], total = 0, most = 0;
#pragma unroll
  for (int set = 0; set < Ends::kSets; ++set) {
    const bool exists = 32 * set + lane() < p.batch;
    units[set] = exists ? sequence_of(ends.end[set], ends.start[set], p.capacity, p.cut).units : 0;
    total += units[set];
    most = max(most, units[set]);
  }
  Run run = run_here(p, count_of(total, most));
  int start = 0, end = 0;
  bool found = false;
#pragma unroll
  for (int set = 0; set < Ends::kSets; ++set) {
    if (found) continue;
    found = begin_with(run, p, 32 * set, units[set]);
    start = __shfl_sync(kAllLanes, ends.start[set], run.b % 32);
    end = __shfl_sync(kAllLanes, ends.end[set], run.b % 32);
  }
  return first_of(p, run, sequence_of(end, start, p.capacity, p.cut));
}

// All warps count, 32 sequences at a time, and one goes through the counts.
template <int kThreads>
__device__ __forceinline__ First first_of_many(const Params& p, SharedByAll& shared) {
  const int sets = ceil_div(p.batch, 32);
#pragma unroll 1
  for (int set = threadIdx.x / 32; set < sets; set += kThreads / 32) {
    const int units = units_at(p, 32 * set + lane());
    const Count count = count_of(units, units);
    if (lane() == 0) shared.units[set] = count;
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    Count count{};
    for (int i = lane(); i < sets; i += 32) {
      count.total += shared.units[i].total;
      count.most = max(count.most, shared.units[i].most);
    }
    Run run = run_here(p, count_of(count.total, count.most));
    int set = 0;
    for (int before = 32; before == 32 && set < sets; set += before) {
      const int i = set + lane();
      before = count_before(i < sets ? shared.units[i].total : 0, i < sets, run.unit, run.first_unit);
    }
    begin_with(run, p, 32 * set, units_at(p, 32 * set + lane()));
    if (lane() == 0) shared.run = run;
  }
  __syncthreads();
  const Run run = shared.run;
  return first_of(p, run, run.unit < run.last ? sequence_at<kFinal>(p, run.b) : Sequence{});
}

// Calls f(piece, its place among the cluster's) for each piece of the run, which has one at least.
template <class F>
__device__ __forceinline__ void each_piece(const Params& p, First at, const F& f) {
#pragma unroll 1
  for (int i = 0;; ++i) {
    f(at.piece, i);
    if (at.piece.ends) return;
    at.piece = take(at.run, sequence_at<kFinal>(p, at.run.b), p.batch, p.cluster_shift, p.cut);
  }
}

// The same for a warp whose registers are all taken: what is between pieces is kept in shared memory.
template <class F>
__device__ __forceinline__ void each_piece_from(const Params& p, const First& first, First& kept, const F& f) {
  if (lane() == 0) kept = first;
  __syncwarp();
#pragma unroll 1
  while (true) {
    f(kept.piece);
    if (kept.piece.ends) return;
    First next = kept;
    next.piece = take(next.run, sequence_at<kFinal>(p, next.run.b), p.batch, p.cluster_shift, p.cut);
    __syncwarp();
    if (lane() == 0) kept = next;
    __syncwarp();
  }
}

// What a warp is at, in the place of counts, which nobody needs once all know what they begin with.
__device__ __forceinline__ First& kept_here(SharedByAll& shared) {
  static_assert(threads_of(true) / 32 * sizeof(First) <= sizeof(shared.units), "one for each warp");
  return reinterpret_cast<First*>(shared.units)[threadIdx.x / 32];
}

// Either of the two. kKept: a warp has few registers, or all of them are taken.
template <bool kKept, class F>
__device__ __forceinline__ void each_piece_either(const Params& p, const First& first, SharedByAll& shared, const F& f) {
  if constexpr (kKept) {
    int i = 0;
    each_piece_from(p, first, kept_here(shared), [&](const Piece& piece) { f(piece, i++); });
  } else {
    each_piece(p, first, f);
  }
}

// For warps that merge nothing, after each piece: blocks of a cluster meet before each round of merging, with all
// warps. By tokens they come to the first meeting ahead of the piece; by rows both rounds of a run's last one are one.
template <int kRounds, bool kByRows>
__device__ __forceinline__ void pass_meetings(const Piece& piece) {
  if (cluster_size() == 1) return;
  __syncwarp();
  const int rounds = kByRows && piece.ends ? 1 : kRounds;
#pragma unroll 1
  for (int round = 1; round <= rounds; ++round) {
    if (kByRows) cluster_arrive();
    cluster_wait();
    if (!kByRows && (round < rounds || !piece.ends)) cluster_arrive();
  }
}

__device__ __forceinline__ Turns turns_here(const Params& p, const Piece& piece) {
  return turns_of(piece, cluster_rank(), p.cluster_shift);
}

__device__ __forceinline__ int token_of(const Params& p, const Piece& piece, const Turns& turns, int i) {
  return piece.first + (turns.first + (i << p.cluster_shift)) * kTokens;
}

}  // namespace hylo::mla_absorb
