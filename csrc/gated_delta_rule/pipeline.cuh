// What a pass over the chunks of a sequence reads: which chunks a block runs through, and the ring of stages in shared
// memory that a warp of its own fills.
#pragma once

#include "common/copy_engine.cuh"
#include "gated_delta_rule/chunks.cuh"

namespace hylo::gated_delta_rule {

// The chunks a block runs through, of a sequence's, from `first` on; results count within [begin, end). A pass that goes
// back starts with the chunk before `first`.
struct Range {
  int first, begin, end;
  __device__ __forceinline__ bool empty() const { return end < begin; }
};

__device__ __forceinline__ float log_bound(const Params& p, int chunk, int head) {
  const long long index = static_cast<long long>(chunk) * p.heads + head;
  return *reinterpret_cast<const float*>(p.records + index * kRecordSize + kRecordBound);
}

// A long sequence is cut into segments that run beside each other. Each starts from an empty state as many chunks early
// as the decays need to make what came before negligible. Where they decay too slowly at any of the cuts, the block at
// the pass's start runs the whole sequence and the others nothing. Called by whole warps; lane i looks at cut i, where
// segment i begins; a pass that goes back ends segment i - 1 there.
template <bool kBack>
__device__ __forceinline__ Range range_of(const Params& p, int first_chunk, int chunks, int head, int segment) {
  const int each = (chunks + p.segments - 1) / p.segments;
  const int cut = lane() * each;
  int start = cut;
  bool negligible = cut == 0 || cut >= chunks;
  if (lane() < p.segments && !negligible) {
    float bound = 0.0f;
    int left = kMaxWarmUp;
    while (!negligible && left-- > 0) {
      bound += log_bound(p, first_chunk + (kBack ? start : start - 1), head);
      start += kBack ? 1 : -1;
      negligible = bound < p.negligible || start == (kBack ? chunks : 0);
    }
  }
  const bool cuttable = __all_sync(kAllLanes, negligible || lane() >= p.segments);
  // The last segment has no cut behind it, and 32 segments have no lane for one.
  const int cut_lane = kBack ? segment + 1 : segment;
  const int from = __shfl_sync(kAllLanes, start, cut_lane & 31);
  if (!uniform(cuttable)) return segment == 0 ? Range{kBack ? chunks : 0, 0, chunks} : Range{0, 0, -1};
  const int begin = segment * each, end = begin + each < chunks ? begin + each : chunks;
  if (begin >= chunks && segment > 0) return {0, 0, -1};
  return {!kBack ? from : end == chunks ? chunks : from, begin, end};
}

// One stage of the ring: tiles of keys and of queries, 64 columns of K each, of values, A, P, factors.
template <Pass kPass, int kK, int kChains>
struct Stage {
  static constexpr int kTiles = kK / kTile;
  static constexpr bool kReadsQueries = kPass != kStates;
  static constexpr int kSize = stage_size(kPass, kK, kChains);
  static constexpr int kBytes = stage_bytes(kPass, kK, kChains);

  unsigned char* base;

  __device__ __forceinline__ unsigned char* keys() const { return base; }
  __device__ __forceinline__ unsigned char* queries() const { return base + kTiles * kTileSize; }
  __device__ __forceinline__ unsigned char* values(int i) const {
    return base + ((kReadsQueries ? 2 : 1) * kTiles + i) * kTileSize;
  }
  __device__ __forceinline__ unsigned char* inverse() const { return values(kChains); }
  __device__ __forceinline__ unsigned char* scores() const { return inverse() + kTileSize; }
  __device__ __forceinline__ const float* factors(Factor which) const {
    const unsigned char* all = inverse() + (kReadsQueries ? 2 : 1) * kTileSize;
    return reinterpret_cast<const float*>(all) + which * kChunk;
  }
};

template <Pass kPass, int kK, int kChains>
__device__ __forceinline__ void load_stage(const Params& p, const Stage<kPass, kK, kChains>& stage, Barrier& full,
                                           const Chunk& chunk, long long record, int head, int first_value) {
  using Inputs = Stage<kPass, kK, kChains>;
  full.arrive_expecting(Inputs::kBytes);
#pragma unroll
  for (int i = 0; i < Inputs::kTiles; ++i) {
    copy_box(stage.keys() + i * kTileSize, p.k, full, i * kTile, head / p.group, chunk.begin, chunk.batch);
  }
  const unsigned char* from = p.records + record * kRecordSize;
  if constexpr (Inputs::kReadsQueries) {
#pragma unroll
    for (int i = 0; i < Inputs::kTiles; ++i) {
      copy_box(stage.queries() + i * kTileSize, p.q, full, i * kTile, head / p.group, chunk.begin, chunk.batch);
    }
    copy_in(stage.inverse(), from, kRecordFactors + kFactorsSize, full);
  } else {
    copy_in(stage.inverse(), from, kTileSize, full);
    copy_in(stage.inverse() + kTileSize, from + kRecordFactors, kFactorsSize, full);
  }
#pragma unroll
  for (int i = 0; i < kChains; ++i) {
    copy_box(stage.values(i), p.v, full, first_value + i * kTile, head, chunk.begin, chunk.batch);
  }
}

// A stage of inputs, that one thread fills and others empty. All lanes say so: of one lane that speaks for its warp
// compute-sanitizer's racecheck does not see that the others are done.
struct Handover {
  Barrier full, empty;

  __device__ __forceinline__ void init(int emptiers) {
    full.init(1);
    empty.init(emptiers);
  }
};

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
