// Sums over neighbouring threads, in a fixed order: the same inputs give the same bits.
#pragma once

namespace hylo {

constexpr int kWarpThreads = 32;

// Total over each group of kThreads neighbours (a power of two), given to every thread of the group. Every thread of
// the block must call it. `s_partial` has one entry a warp of the block, and is free again on return.
template <int kThreads>
__device__ __forceinline__ float sum_over_threads(float value, float* s_partial) {
  constexpr int kLanes = kThreads < kWarpThreads ? kThreads : kWarpThreads;
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  if constexpr (kThreads > kWarpThreads) {
    constexpr int kWarps = kThreads / kWarpThreads;
    const int warp = threadIdx.x / kWarpThreads;
    if (threadIdx.x % kWarpThreads == 0) s_partial[warp] = value;
    __syncthreads();
    const int first = warp / kWarps * kWarps;
    value = 0.0f;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) value += s_partial[first + i];
    __syncthreads();
  }
  return value;
}

}  // namespace hylo
