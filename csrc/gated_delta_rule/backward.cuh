// Gated delta rule, the chunked backward's first pass. A translation unit of its own: the build passes HYLO_T and
// HYLO_K as in kernel.cuh.
#include "gated_delta_rule/pass.cuh"

namespace hylo::gated_delta_rule {

extern "C" __global__ void __launch_bounds__(pass_threads(kStates, 1), pass_blocks(kStates, HYLO_K, 1))
    gated_delta_rule_bwd_kernel_states(const __grid_constant__ Params p) {
  extern __shared__ unsigned char shared[];
  pass<HYLO_T, kStates, HYLO_K, 1>(p, aligned(shared));
}

}  // namespace hylo::gated_delta_rule
