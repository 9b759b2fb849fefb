// What a pass over the chunks of a sequence reads: which chunks a block runs through, and the ring of stages in shared
// memory that a warp of its own fills.
#pragma once

#include "common/copy_engine.cuh"
#include "gated_delta_rule/chunks.cuh"

namespace hylo::gated_delta_rule {

// The chunks a block runs through, of a sequence's, from `first` on; results count within [begin, end). A pass that
// goes back starts with the chunk before `first`.
struct Range {
  int first, begin, end;
  __device__ __forceinline__ bool empty() const { return end < begin; }
};

// How many chunks the segment that begins at a cut walks first (_cuts); -1 where the gates are too slow.
template <bool kBack>
__device__ __forceinline__ int walk_at(const Params& p, int sequence, int head, int cut) {
  return p.cuts[((static_cast<long long>(sequence) * p.heads + head) * p.segments + cut) * 2 + kBack];
}

// Whether a head's sequence can be cut, in both directions. Called by whole warps.
__device__ __forceinline__ bool cuttable(const Params& p, int sequence, int head) {
  const bool one = lane() == 0 || lane() >= p.segments ||
                   (walk_at<false>(p, sequence, head, lane()) >= 0 && walk_at<true>(p, sequence, head, lane()) >= 0);
  return uniform(__all_sync(kAllLanes, one));
}

// Called by whole warps.
__device__ __forceinline__ bool taken(const Params& p, int sequence, int head) {
  return p.takes == kAll || cuttable(p, sequence, head) == (p.takes == kCuttable);
}
__device__ __forceinline__ bool cut_here(const Params& p, int sequence, int head) {
  return p.pieces > 1 && cuttable(p, sequence, head);
}

// A long sequence is cut into segments that run beside each other. Each starts from an empty state as many chunks early
// as the decays need to make what came before negligible. Where they decay too slowly at any of the cuts, the block at
// the pass's start runs the whole sequence and the others nothing. A pass that goes back ends segment i - 1 where
// segment i begins. Called by whole warps.
template <bool kBack>
__device__ __forceinline__ Range range_of(const Params& p, int sequence, int chunks, int head, int segment, bool cut) {
  if (!cut) return segment == 0 ? Range{kBack ? chunks : 0, 0, chunks} : Range{0, 0, -1};
  const int each = (chunks + p.segments - 1) / p.segments;
  const int begin = segment * each, end = begin + each < chunks ? begin + each : chunks;
  if (begin >= chunks && segment > 0) return {0, 0, -1};
  if (kBack) return {end == chunks ? chunks : end + walk_at<true>(p, sequence, head, segment + 1), begin, end};
  return {segment == 0 ? 0 : begin - walk_at<false>(p, sequence, head, segment), begin, end};
}

// Whether a record is there, said between blocks of one launch. Records come and go by the copy engine.
__device__ __forceinline__ void say_ready(int* ready) {
  asm volatile("fence.proxy.async.global;\n\tst.release.gpu.global.s32 [%0], 1;" ::"l"(ready) : "memory");
}
// Waits for the first of at most `count` flags so far apart, and returns for how many of them, from the first on, it is
// so. One look at several: each takes about as long as a chunk.
__device__ __forceinline__ int await_ready(const int* ready, int apart, int count) {
  constexpr int kLook = 8;
  int found = 0;
  while (found == 0) {
    int there[kLook];
#pragma unroll
    for (int i = 0; i < kLook; ++i) {
      there[i] = 0;
      if (i < count) {
        const int* flag = ready + static_cast<long long>(i) * apart;
        asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(there[i]) : "l"(flag) : "memory");
      }
    }
#pragma unroll
    for (int i = 0; i < kLook; ++i) found += found == i && there[i] != 0;
  }
  asm volatile("fence.acq_rel.gpu;\n\tfence.proxy.async.global;" ::: "memory");
  return found;
}

// One stage of the ring: tiles of keys and of queries, 64 columns of K each, and of values, and what is used of a
// record: of its own where the pass reads records, or where a solver leaves it.
template <Pass kPass, int kK, int kChains>
struct Stage {
  static constexpr int kTiles = kK / kTile;
  static constexpr bool kSolves = solves(kPass);
  static constexpr bool kReadsQueries = reads_queries(kPass);
  // Whether queries (and P) come and go apart from all else, since others than the chain need them, and longer. Where
  // there are three stages that gains nothing.
  static constexpr bool kApart = kSolves || (makes_outputs(kPass) && stages(kPass, kK, kChains) < 3);
  static constexpr int kSize = stage_size(kPass, kK, kChains);
  static constexpr int kTokensBytes = (kTiles + kChains + (kSolves ? 0 : 1)) * kTileSize + (kSolves ? 0 : kFactorsSize);
  static constexpr int kQueriesBytes = (kTiles + (kSolves ? 0 : 1)) * kTileSize + (kSolves ? 0 : kFactorsRow);

  // Who waits for what.
  struct Barriers {
    Handover tokens, queries;

    __device__ __forceinline__ void init() {
      constexpr int kSolver = kSolves ? kSolverThreads : 0, kOutputs = makes_outputs(kPass) ? 128 * kChains : 0;
      tokens.init(kReadsQueries && !kApart ? 2 : 1, 128 * kChains + kSolver + (kApart ? 0 : kOutputs));
      if constexpr (kApart) queries.init(1, kOutputs + kSolver);
    }
    __device__ __forceinline__ Handover& of_queries() { return kApart ? queries : tokens; }
  };

  unsigned char* base;
  unsigned char* record;   // a solver's, with
  Handover* solved;        // its barriers
  int record_turn;         // and how often it was used before

  __device__ __forceinline__ unsigned char* keys() const { return base; }
  __device__ __forceinline__ unsigned char* values(int i) const { return base + (kTiles + i) * kTileSize; }
  __device__ __forceinline__ unsigned char* inverse() const {
    return kSolves ? record + kRecordInverse : values(kChains);
  }
  __device__ __forceinline__ unsigned char* queries() const { return values(kChains + (kSolves ? 0 : 1)); }
  __device__ __forceinline__ unsigned char* scores() const {
    return kSolves ? record + kRecordScores : queries() + kTiles * kTileSize;
  }
  __device__ __forceinline__ float* all_factors() const {
    return reinterpret_cast<float*>(kSolves ? record + kRecordFactors
                                            : base + stage_tiles(kPass, kK, kChains) * kTileSize);
  }
  __device__ __forceinline__ const float* factors(Factor which) const { return all_factors() + which * kChunk; }
  // From the chunk's start, as it comes with the queries.
  __device__ __forceinline__ float* from_start() const {
    return all_factors() + (kSolves ? int{kFromStart} : kFactors) * kChunk;
  }

  __device__ __forceinline__ void await_record() const {
    if constexpr (kSolves) solved->full.wait(record_turn & 1);
  }
  __device__ __forceinline__ void release_record() const {
    if constexpr (kSolves) solved->empty.arrive();
  }
};

// Keys, values, and of a record what the chain needs.
template <Pass kPass, int kK, int kChains>
__device__ __forceinline__ void load_tokens(const Params& p, const Stage<kPass, kK, kChains>& stage, Barrier& full,
                                            const Chunk& chunk, const unsigned char* record, int head,
                                            int first_value) {
  using Inputs = Stage<kPass, kK, kChains>;
  full.arrive_expecting(Inputs::kTokensBytes);
#pragma unroll
  for (int i = 0; i < Inputs::kTiles; ++i) {
    copy_box(stage.keys() + i * kTileSize, p.k, full, i * kTile, head / p.group, chunk.begin, chunk.batch);
  }
#pragma unroll
  for (int i = 0; i < kChains; ++i) {
    copy_box(stage.values(i), p.v, full, first_value + i * kTile, head, chunk.begin, chunk.batch);
  }
  if constexpr (!Inputs::kSolves) {
    copy_in(stage.inverse(), record + kRecordInverse, kTileSize, full);
    copy_in(stage.all_factors(), record + kRecordFactors, kFactorsSize, full);
  }
}

// Queries, and of a record what is used with them.
template <Pass kPass, int kK, int kChains>
__device__ __forceinline__ void load_queries(const Params& p, const Stage<kPass, kK, kChains>& stage, Barrier& full,
                                             const Chunk& chunk, const unsigned char* record, int head) {
  using Inputs = Stage<kPass, kK, kChains>;
  full.arrive_expecting(Inputs::kQueriesBytes);
#pragma unroll
  for (int i = 0; i < Inputs::kTiles; ++i) {
    copy_box(stage.queries() + i * kTileSize, p.q, full, i * kTile, head / p.group, chunk.begin, chunk.batch);
  }
  if constexpr (!Inputs::kSolves) {
    copy_in(stage.scores(), record + kRecordScores, kTileSize, full);
    copy_in(stage.from_start(), record + kRecordFactors + kFromStart * kFactorsRow, kFactorsRow, full);
  }
}

// Named barriers between a chain and whoever takes what it leaves in shared memory: kTakers threads. Of the four that
// both name, those who come with `arrive` wait for nobody.
template <int kTakers>
struct Handing {
  enum Barrier { kStateReady = 1, kStateFree, kResultReady, kResultFree, kAmongTakers, kAmongChain };
  int first;  // barriers of chains before

  __device__ __forceinline__ explicit Handing(int chain) : first(chain * kAmongChain) {}
  __device__ __forceinline__ void sync(Barrier barrier) const { sync_threads(first + barrier, 128 + kTakers); }
  __device__ __forceinline__ void arrive(Barrier barrier) const { arrive_threads(first + barrier, 128 + kTakers); }
  __device__ __forceinline__ void sync_takers() const { sync_threads(first + kAmongTakers, kTakers); }
  __device__ __forceinline__ void sync_chain() const { sync_threads(first + kAmongChain, 128); }
};

}  // namespace hylo::gated_delta_rule
