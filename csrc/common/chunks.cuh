// Which tokens a chunk has: sequences one a batch entry, or packed into one row with bounds on the device. What is asked
// of a kernel's parameters: cu_seqlens [N + 1] or null, sequences N, tokens T of a row.
#pragma once

#include "common/fast_math.cuh"
#include "common/portable.h"

namespace hylo {

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int lane() { return threadIdx.x & 31; }

// The same number in all lanes, which the compiler then knows: branches on it stay out of the way of wgmma.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(kAllLanes, value, 0); }

__device__ __forceinline__ int chunks_of(int tokens) { return (tokens + kChunk - 1) / kChunk; }

// A sequence: which, the batch entry and token where it starts, and its tokens.
struct Sequence {
  int index;
  int batch;
  int begin;
  int tokens;
};

template <class P>
__device__ __forceinline__ Sequence sequence_at(const P& p, int n) {
  if (p.cu_seqlens == nullptr) return {n, n, 0, p.tokens};
  const int begin = uniform(p.cu_seqlens[n]);
  return {n, 0, begin, uniform(p.cu_seqlens[n + 1]) - begin};
}

// The index of a sequence's first chunk among all. Called by whole warps.
template <class P>
__device__ __forceinline__ int first_chunk(const P& p, int sequence) {
  if (p.cu_seqlens == nullptr) return sequence * chunks_of(p.tokens);
  int before = 0;
  for (int n = lane(); n < sequence; n += 32) before += chunks_of(p.cu_seqlens[n + 1] - p.cu_seqlens[n]);
  return __reduce_add_sync(kAllLanes, before);
}

// The tokens of one chunk; none where the chunk does not exist.
struct Chunk {
  int sequence;
  int batch;
  int begin;
  int tokens;  // at most kChunk
};

__device__ __forceinline__ Chunk chunk_of(const Sequence& sequence, int index) {
  const int left = sequence.tokens - index * kChunk;
  return {sequence.index, sequence.batch, sequence.begin + index * kChunk, left < kChunk ? left : kChunk};
}

// Called by whole warps; every warp finds the same.
template <class P>
__device__ __forceinline__ Chunk chunk_at(const P& p, int index) {
  if (p.cu_seqlens == nullptr) {
    const int each = chunks_of(p.tokens);
    return chunk_of(sequence_at(p, index / each), index % each);
  }
  for (int base = 0; base < p.sequences; base += 32) {
    const int n = base + lane();
    const int count = n < p.sequences ? chunks_of(p.cu_seqlens[n + 1] - p.cu_seqlens[n]) : 0;
    int through = count;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(kAllLanes, through, step);
      if (lane() >= step) through += other;
    }
    const unsigned reached = __ballot_sync(kAllLanes, index < through);
    if (reached != 0) {
      const int owner = __ffs(reached) - 1;
      const int within = index - __shfl_sync(kAllLanes, through - count, owner);
      return chunk_of(sequence_at(p, base + owner), within);
    }
    index -= __shfl_sync(kAllLanes, through, 31);
  }
  return {};
}

}  // namespace hylo
