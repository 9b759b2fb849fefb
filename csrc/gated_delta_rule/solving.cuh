// Gated delta rule, chunked: the passes that make their records themselves. A translation unit of its own: the build
// passes HYLO_T and HYLO_K as in kernel.cuh, of which K is at most 128.
#include "gated_delta_rule/pass.cuh"

namespace hylo::gated_delta_rule {

extern "C" __global__ void __launch_bounds__(pass_threads(kSolvingOutputs, 1), pass_blocks(kSolvingOutputs, HYLO_K, 1))
    gated_delta_rule_fwd_kernel_solving_o(const __grid_constant__ Params p) {
  extern __shared__ unsigned char shared[];
  pass<HYLO_T, kSolvingOutputs, HYLO_K, 1>(p, aligned(shared));
}

extern "C" __global__ void __launch_bounds__(pass_threads(kSolvingStates, 1), pass_blocks(kSolvingStates, HYLO_K, 1))
    gated_delta_rule_bwd_kernel_solving_states(const __grid_constant__ Params p) {
  extern __shared__ unsigned char shared[];
  pass<HYLO_T, kSolvingStates, HYLO_K, 1>(p, aligned(shared));
}

}  // namespace hylo::gated_delta_rule
