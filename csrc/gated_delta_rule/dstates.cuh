// Gated delta rule, the chunked backward's second pass, from the last chunk to the first. A translation unit of its
// own: the build passes HYLO_T and HYLO_K as in kernel.cuh, and HYLO_CHAINS (of a block, 64 columns of V each).
#include "gated_delta_rule/pass.cuh"

namespace hylo::gated_delta_rule {

extern "C" __global__ void __launch_bounds__(pass_threads(kGradients, HYLO_CHAINS),
                                             pass_blocks(kGradients, HYLO_K, HYLO_CHAINS))
    gated_delta_rule_bwd_kernel_dstates(const __grid_constant__ Params p) {
  extern __shared__ unsigned char shared[];
  pass<HYLO_T, kGradients, HYLO_K, HYLO_CHAINS>(p, aligned(shared));
}

}  // namespace hylo::gated_delta_rule
