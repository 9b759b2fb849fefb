// The gradients of what a head has one number of (d, dt_bias, a), as sums of their parts. In fp64: there are thousands of
// parts of either sign, and adding them is all that this kernel does.
#pragma once

#include "common/dependent.cuh"
#include "ssd/gates.cuh"

namespace hylo::ssd {

// A block for 32 heads of one of them. Each warp sums up every so many rows, then the first one adds that up: the order
// is always the same.
__device__ __forceinline__ void sum_vectors(const VectorsParams& p) {
  __shared__ double of_warps[kVectorWarps][32];
  await_kernel_before();
  const int head = 32 * blockIdx.x + lane(), which = blockIdx.y, warp = threadIdx.x / 32;
  const int rows = p.chunks + (which == kPartOfRate ? p.more : 0);
  double sum = 0.0;
  if (head < p.heads) {
    const float* const parts = p.parts + static_cast<long long>(which) * p.chunks * p.heads + head;
#pragma unroll 4
    for (int row = warp; row < rows; row += kVectorWarps) sum += parts[static_cast<long long>(row) * p.heads];
  }
  of_warps[warp][lane()] = sum;
  __syncthreads();
  if (warp > 0 || head >= p.heads || p.sums[which].data == nullptr) return;
#pragma unroll
  for (int other = 1; other < kVectorWarps; ++other) sum += of_warps[other][lane()];
  store_number(p.sums[which].type, p.sums[which].data, head, static_cast<float>(sum));
}

}  // namespace hylo::ssd
