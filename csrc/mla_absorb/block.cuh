// What the warps of a block share, and the pieces of work that each of them goes through.
#pragma once

#include "common/divider.cuh"
#include "mla_absorb/neighbours.cuh"
#include "mla_absorb/params.h"
#include "mla_absorb/work.cuh"

namespace hylo::mla_absorb {

template <int kN>
struct Shared {
  Handover stages[kMaxStages];
  Handover queries[2];
  Meeting merged, read;  // a block's results are there; and have been read by all
  Run run;                        // of the block's cluster
  int last;                       // whether this block's piece is the last to arrive
  int units[kMaxBatch / 32];      // of 32 sequences each
  float tops[kGroups][4][kN], totals[kGroups][4][kN];  // of warps
  float top[kGroups][kN];                              // that weights are relative to
  float block_top[kN], block_total[kN];  // read by neighbours
};

__device__ __forceinline__ long long integer(const Integers& of, long long i) {
  const long long at = i * of.stride;
  return of.wide ? static_cast<const long long*>(of.data)[at] : static_cast<const int*>(of.data)[at];
}

__device__ __forceinline__ Sequence sequence_at(const Params& p, int b) {
  const long long start = p.starts.data == nullptr ? 0 : integer(p.starts, b);
  return sequence_of(integer(p.lengths, b), start, p.capacity, p.fixed);
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

__device__ __forceinline__ int units_at(const Params& p, int b) { return b < p.batch ? sequence_at(p, b).units : 0; }

// The run of this block's cluster, but for the sequence that it begins with.
__device__ __forceinline__ Run run_of(const Params& p, int total) {
  const int share = share_of(total, p.clusters, p.alone, p.least, p.fixed);
  const long long begin = static_cast<long long>(static_cast<int>(blockIdx.x) / cluster_size()) * share;
  Run run{};
  run.begin = run.unit = least_of(begin, total);
  run.last = least_of(begin + share, total);
  run.share = share;
  return run;
}

// That sequence, given the first of the 32 that it is one of, and the units before those.
__device__ __forceinline__ void begin_with(Run& run, const Params& p, int first, int passed) {
  const int b = first + lane();
  run.b = first + count_before(units_at(p, b), b < p.batch, run.unit, passed);
  run.first_unit = passed;
}

// Each warp by itself.
__device__ __forceinline__ Run find_run_of_few(const Params& p) {
  Run run = run_of(p, __reduce_add_sync(kAllLanes, units_at(p, lane())));
  begin_with(run, p, 0, 0);
  return run;
}

// All warps count, 32 sequences at a time, and one goes through the counts.
template <int kN>
__device__ __forceinline__ Run find_run_of_many(const Params& p, Shared<kN>& shared) {
  const int sets = cut(p.batch, 32);
  for (int set = threadIdx.x / 32; set < sets; set += kThreads / 32) {
    const int units = __reduce_add_sync(kAllLanes, units_at(p, 32 * set + lane()));
    if (lane() == 0) shared.units[set] = units;
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    int total = 0;
    for (int i = lane(); i < sets; i += 32) total += shared.units[i];
    Run run = run_of(p, __reduce_add_sync(kAllLanes, total));
    int passed = 0, set = 0;
    for (int before = 32; before == 32 && set < sets; set += before) {
      const int i = set + lane();
      before = count_before(i < sets ? shared.units[i] : 0, i < sets, run.unit, passed);
    }
    begin_with(run, p, 32 * set, passed);
    if (lane() == 0) shared.run = run;
  }
  __syncthreads();
  return shared.run;
}

// Calls f(piece, its place among the cluster's) for each piece of the run.
template <class F>
__device__ __forceinline__ void each_piece(const Params& p, Run run, const F& f) {
  const int size = cluster_size();
  for (int i = 0; run.unit < run.last; ++i) {
    const Sequence sequence = sequence_at(p, run.b);
    f(take(run, sequence, size, p.fixed), i);
  }
}

__device__ __forceinline__ int token_of(const Piece& piece, const Turns& turns, int i) {
  return piece.first + (turns.first + i * cluster_size()) * kTokens;
}

}  // namespace hylo::mla_absorb
