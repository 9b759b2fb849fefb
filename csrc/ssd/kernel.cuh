// State-space duality, forward. A translation unit of its own: the build passes HYLO_T (type of x, b, c and o: bf16,
// fp16) and HYLO_K (64, 128, 256: the least that has room for K).
#include "ssd/carry.cuh"
#include "ssd/pass.cuh"

extern "C" __global__ void __launch_bounds__(hylo::ssd::pass_threads(hylo::ssd::kEnds, HYLO_K), 1)
    ssd_fwd_kernel_ends(const __grid_constant__ hylo::ssd::PassParams p) {
  extern __shared__ unsigned char shared[];
  hylo::ssd::pass<hylo::HYLO_T, hylo::ssd::kEnds, HYLO_K>(p, hylo::aligned(shared));
}

#if HYLO_K <= 128  // a wider state leaves no registers to convolve with
extern "C" __global__ void __launch_bounds__(128) ssd_fwd_kernel_mix(const __grid_constant__ hylo::ssd::MixParams p) {
  extern __shared__ unsigned char shared[];
  hylo::ssd::mix<hylo::HYLO_T>(p, hylo::aligned(shared));
}

extern "C" __global__ void __launch_bounds__(hylo::ssd::pass_threads(hylo::ssd::kMixedEnds, HYLO_K), 1)
    ssd_fwd_kernel_mixed_ends(const __grid_constant__ hylo::ssd::PassParams p) {
  extern __shared__ unsigned char shared[];
  hylo::ssd::pass<hylo::HYLO_T, hylo::ssd::kMixedEnds, HYLO_K>(p, hylo::aligned(shared));
}
#endif

extern "C" __global__ void __launch_bounds__(hylo::ssd::kCarryThreads)
    ssd_fwd_kernel_carry(const __grid_constant__ hylo::ssd::PassParams p) {
  hylo::ssd::carry(p.common);
}

extern "C" __global__ void __launch_bounds__(hylo::ssd::pass_threads(hylo::ssd::kOutputs, HYLO_K), 1)
    ssd_fwd_kernel_o(const __grid_constant__ hylo::ssd::PassParams p) {
  extern __shared__ unsigned char shared[];
  hylo::ssd::pass<hylo::HYLO_T, hylo::ssd::kOutputs, HYLO_K>(p, hylo::aligned(shared));
}
