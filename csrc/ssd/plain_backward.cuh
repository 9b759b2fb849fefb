// State-space duality on the CUDA cores, backward: all that needs no walk from chunk to chunk, and the sums over chunks.
// A translation unit of its own: the build passes HYLO_T as in plain_forward.cuh.
#include "ssd/gradients_traits.cuh"
#include "ssd/plain_collect.cuh"
#include "ssd/plain_ddt.cuh"
#include "ssd/vectors.cuh"

namespace hylo::ssd::plain {

extern "C" __global__ void __launch_bounds__(kThreads, 2) ssd_bwd_kernel_plain_dx(const __grid_constant__ Params p) {
  extern __shared__ float4 shared[];
  const int slice_count = slices(p.values);
  Collect<HYLO_T, kDX>(p, blockIdx.x / slice_count, blockIdx.x % slice_count, blockIdx.y,
                       reinterpret_cast<float*>(shared))
      .run();
}

extern "C" __global__ void __launch_bounds__(kThreads, 2) ssd_bwd_kernel_plain_db(const __grid_constant__ Params p) {
  extern __shared__ float4 shared[];
  const int slice_count = slices(p.width);
  Collect<HYLO_T, kDB>(p, blockIdx.x / slice_count, blockIdx.x % slice_count, blockIdx.y,
                       reinterpret_cast<float*>(shared))
      .run();
}

extern "C" __global__ void __launch_bounds__(kThreads, 2) ssd_bwd_kernel_plain_dc(const __grid_constant__ Params p) {
  extern __shared__ float4 shared[];
  const int slice_count = slices(p.width);
  Collect<HYLO_T, kDC>(p, blockIdx.x / slice_count, blockIdx.x % slice_count, blockIdx.y,
                       reinterpret_cast<float*>(shared))
      .run();
}

extern "C" __global__ void __launch_bounds__(kThreads) ssd_bwd_kernel_plain_ddt(const __grid_constant__ Params p) {
  const long long own = static_cast<long long>(blockIdx.x) * kGateWarps + threadIdx.x / 32;
  if (own < static_cast<long long>(p.chunks) * p.heads) {
    finish_gates(p, static_cast<int>(own / p.heads), static_cast<int>(own % p.heads));
  }
}

extern "C" __global__ void __launch_bounds__(32 * kVectorWarps)
    ssd_bwd_kernel_plain_vectors(const __grid_constant__ VectorsParams p) {
  sum_vectors(p);
}

}  // namespace hylo::ssd::plain
