// Gated delta rule, chunked forward. A translation unit of its own: the build passes HYLO_T (type of q, k, v and o: bf16
// or fp16), HYLO_K (key width) and HYLO_WG (warpgroups of a block of the state pass, 64 columns of V each).
#include "gated_delta_rule/inverse.cuh"
#include "gated_delta_rule/output.cuh"

namespace hylo::gated_delta_rule {

// Tiles are swizzled by address bits, so they start at multiples of 1024.
__device__ __forceinline__ unsigned char* aligned(unsigned char* shared) {
  return shared + (-shared_address(shared) & 1023);
}

}  // namespace hylo::gated_delta_rule

extern "C" __global__ void __launch_bounds__(hylo::gated_delta_rule::kInverseThreads)
    gated_delta_rule_fwd_kernel_inverse(const __grid_constant__ hylo::gated_delta_rule::Params p) {
  extern __shared__ unsigned char shared[];
  hylo::gated_delta_rule::inverse<hylo::HYLO_T, HYLO_K>(p, hylo::gated_delta_rule::aligned(shared));
}

extern "C" __global__ void __launch_bounds__(hylo::gated_delta_rule::output_threads(HYLO_WG), 1)
    gated_delta_rule_fwd_kernel_o(const __grid_constant__ hylo::gated_delta_rule::Params p) {
  extern __shared__ unsigned char shared[];
  hylo::gated_delta_rule::output<hylo::HYLO_T, HYLO_K, HYLO_WG>(p, hylo::gated_delta_rule::aligned(shared));
}
