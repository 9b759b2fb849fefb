// Gated delta rule, chunked forward. A translation unit of its own: the build passes HYLO_T (type of q, k, v and o:
// bf16 or fp16) and HYLO_K (key width).
#include "gated_delta_rule/cuts.cuh"
#include "gated_delta_rule/pass.cuh"

namespace hylo::gated_delta_rule {

extern "C" __global__ void __launch_bounds__(kCutsThreads)
    gated_delta_rule_fwd_kernel_cuts(const __grid_constant__ Params p) {
  Cut<HYLO_T>(p).run();
}

extern "C" __global__ void __launch_bounds__(kSolverThreads)
    gated_delta_rule_fwd_kernel_inverse(const __grid_constant__ Params p) {
  extern __shared__ unsigned char shared[];
  Maker<HYLO_T, HYLO_K>(p, aligned(shared), blockIdx.y, gridDim.x, 0).run(blockIdx.x);
}

extern "C" __global__ void __launch_bounds__(pass_threads(kOutputs, 1), pass_blocks(kOutputs, HYLO_K, 1))
    gated_delta_rule_fwd_kernel_o(const __grid_constant__ Params p) {
  extern __shared__ unsigned char shared[];
  pass<HYLO_T, kOutputs, HYLO_K, 1>(p, aligned(shared));
}

}  // namespace hylo::gated_delta_rule
