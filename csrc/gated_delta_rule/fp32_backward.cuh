// Gated delta rule in fp32, chunked backward, on the CUDA cores. A translation unit of its own: the build passes HYLO_K
// as in fp32_forward.cuh.
#include "gated_delta_rule/fp32_gradients.cuh"
#include "gated_delta_rule/fp32_pass.cuh"

namespace hylo::gated_delta_rule::fp32_chunk {

extern "C" __global__ void __launch_bounds__(kThreads, pass_blocks(kStates, HYLO_K))
    gated_delta_rule_bwd_kernel_fp32_states(const __grid_constant__ Params p) {
  extern __shared__ float4 shared[];
  StatePass<kStates, HYLO_K>(p, reinterpret_cast<float*>(shared)).run();
}

extern "C" __global__ void __launch_bounds__(kThreads, pass_blocks(kGradients, HYLO_K))
    gated_delta_rule_bwd_kernel_fp32_dstates(const __grid_constant__ Params p) {
  extern __shared__ float4 shared[];
  StatePass<kGradients, HYLO_K>(p, reinterpret_cast<float*>(shared)).run();
}

extern "C" __global__ void __launch_bounds__(kThreads, 2)
    gated_delta_rule_bwd_kernel_fp32_dscores(const __grid_constant__ Params p) {
  extern __shared__ float4 shared[];
  ScoreGradients(p, blockIdx.x, blockIdx.y, reinterpret_cast<float*>(shared)).run();
}

extern "C" __global__ void __launch_bounds__(kThreads, 2)
    gated_delta_rule_bwd_kernel_fp32_dqk(const __grid_constant__ Params p) {
  extern __shared__ float4 shared[];
  const int slices = (p.common.keys + kSlice - 1) / kSlice;
  float* place = reinterpret_cast<float*>(shared);
  TokenGradients(p, blockIdx.x / slices, blockIdx.x % slices, blockIdx.y, place).run();
}

}  // namespace hylo::gated_delta_rule::fp32_chunk
