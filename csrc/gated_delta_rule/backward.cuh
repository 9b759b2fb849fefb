// Gated delta rule, the two passes of the chunked backward. A translation unit of its own: the build passes HYLO_T, HYLO_K
// and HYLO_CHAINS as in kernel.cuh.
#include "gated_delta_rule/pass.cuh"

extern "C" __global__ void __launch_bounds__(hylo::gated_delta_rule::pass_threads(hylo::gated_delta_rule::kStates, HYLO_CHAINS),
                                             hylo::gated_delta_rule::pass_blocks(HYLO_K, HYLO_CHAINS))
    gated_delta_rule_bwd_kernel_states(const __grid_constant__ hylo::gated_delta_rule::Params p) {
  extern __shared__ unsigned char shared[];
  hylo::gated_delta_rule::pass<hylo::HYLO_T, hylo::gated_delta_rule::kStates, HYLO_K, HYLO_CHAINS>(
      p, hylo::gated_delta_rule::aligned(shared));
}

extern "C" __global__ void __launch_bounds__(hylo::gated_delta_rule::pass_threads(hylo::gated_delta_rule::kGradients, HYLO_CHAINS),
                                             hylo::gated_delta_rule::pass_blocks(HYLO_K, HYLO_CHAINS))
    gated_delta_rule_bwd_kernel_dstates(const __grid_constant__ hylo::gated_delta_rule::Params p) {
  extern __shared__ unsigned char shared[];
  hylo::gated_delta_rule::pass<hylo::HYLO_T, hylo::gated_delta_rule::kGradients, HYLO_K, HYLO_CHAINS>(
      p, hylo::gated_delta_rule::aligned(shared));
}
