// Gated delta rule in fp32, chunked forward, on the CUDA cores. A translation unit of its own: the build passes HYLO_K
// (key width).
#include "gated_delta_rule/fp32_pass.cuh"

namespace hylo::gated_delta_rule::fp32_chunk {

extern "C" __global__ void __launch_bounds__(kThreads, 2)
    gated_delta_rule_fwd_kernel_fp32_inverse(const __grid_constant__ Params p) {
  extern __shared__ float4 shared[];
  Inverse(p, reinterpret_cast<float*>(shared)).run(blockIdx.x, blockIdx.y);
}

extern "C" __global__ void __launch_bounds__(kThreads, pass_blocks(kOutputs, HYLO_K))
    gated_delta_rule_fwd_kernel_fp32_o(const __grid_constant__ Params p) {
  extern __shared__ float4 shared[];
  StatePass<kOutputs, HYLO_K>(p, reinterpret_cast<float*>(shared)).run();
}

}  // namespace hylo::gated_delta_rule::fp32_chunk
