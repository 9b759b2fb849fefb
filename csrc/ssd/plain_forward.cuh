// State-space duality on the CUDA cores: factors, states and outputs. A translation unit of its own: the build passes
// HYLO_T (type of x, b, c and o: bf16, fp16, fp32).
#include "ssd/plain_carry.cuh"
#include "ssd/plain_collect.cuh"
#include "ssd/plain_ends.cuh"

namespace hylo::ssd::plain {

extern "C" __global__ void __launch_bounds__(kThreads) ssd_fwd_kernel_plain_factors(const __grid_constant__ Params p) {
  const long long own = static_cast<long long>(blockIdx.x) * kGateWarps + threadIdx.x / 32;
  if (own < static_cast<long long>(p.chunks) * p.heads) {
    MakeFactors(p, static_cast<int>(own / p.heads), static_cast<int>(own % p.heads)).run();
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 3)
    ssd_fwd_kernel_plain_ends(const __grid_constant__ Params p) {
  extern __shared__ float4 shared[];
  const int slice_count = slices(p.values);
  Ends<HYLO_T>(p, blockIdx.x / slice_count, blockIdx.x % slice_count, blockIdx.y, static_cast<Direction>(blockIdx.z),
               reinterpret_cast<float*>(shared))
      .run();
}

extern "C" __global__ void __launch_bounds__(kCarryThreads)
    ssd_fwd_kernel_plain_carry(const __grid_constant__ Params p) {
  carry_chunks(p, blockIdx.x % p.sequences, blockIdx.x / p.sequences, blockIdx.y, static_cast<Direction>(blockIdx.z));
}

extern "C" __global__ void __launch_bounds__(kThreads, 2) ssd_fwd_kernel_plain_o(const __grid_constant__ Params p) {
  extern __shared__ float4 shared[];
  const int slice_count = slices(p.values);
  Collect<HYLO_T, kO>(p, blockIdx.x / slice_count, blockIdx.x % slice_count, blockIdx.y,
                      reinterpret_cast<float*>(shared))
      .run();
}

}  // namespace hylo::ssd::plain
