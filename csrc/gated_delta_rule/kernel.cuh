// Gated delta rule, chunked forward. A translation unit of its own: the build passes HYLO_T (type of q, k, v and o: bf16
// or fp16), HYLO_K (key width) and HYLO_CHAINS (of a block of the pass, 64 columns of V each).
#include "gated_delta_rule/inverse.cuh"
#include "gated_delta_rule/pass.cuh"

extern "C" __global__ void __launch_bounds__(hylo::gated_delta_rule::kInverseThreads)
    gated_delta_rule_fwd_kernel_inverse(const __grid_constant__ hylo::gated_delta_rule::Params p) {
  extern __shared__ unsigned char shared[];
  hylo::gated_delta_rule::inverse<hylo::HYLO_T, HYLO_K>(p, hylo::gated_delta_rule::aligned(shared));
}

extern "C" __global__ void __launch_bounds__(hylo::gated_delta_rule::pass_threads(hylo::gated_delta_rule::kOutputs, HYLO_CHAINS),
                                             hylo::gated_delta_rule::pass_blocks(HYLO_K, HYLO_CHAINS))
    gated_delta_rule_fwd_kernel_o(const __grid_constant__ hylo::gated_delta_rule::Params p) {
  extern __shared__ unsigned char shared[];
  hylo::gated_delta_rule::pass<hylo::HYLO_T, hylo::gated_delta_rule::kOutputs, HYLO_K, HYLO_CHAINS>(
      p, hylo::gated_delta_rule::aligned(shared));
}
