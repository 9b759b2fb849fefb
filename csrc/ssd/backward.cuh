// State-space duality, backward: the states and their gradients, and the sums over chunks. A translation unit of its own:
// the build passes HYLO_T (type of x, b, c and o: bf16, fp16) and HYLO_K (64, 128, 256: the least with room for K).
#include "ssd/gradients_traits.cuh"
#include "ssd/pass.cuh"
#include "ssd/vectors.cuh"

extern "C" __global__ void __launch_bounds__(32 * hylo::ssd::kVectorWarps)
    ssd_bwd_kernel_vectors(const __grid_constant__ hylo::ssd::VectorsParams p) {
  hylo::ssd::sum_vectors(p);
}

extern "C" __global__ void __launch_bounds__(hylo::ssd::pass_threads(hylo::ssd::kStates, HYLO_K), 1)
    ssd_bwd_kernel_states(const __grid_constant__ hylo::ssd::PassParams p) {
  extern __shared__ unsigned char shared[];
  hylo::ssd::pass<hylo::HYLO_T, hylo::ssd::kStates, HYLO_K>(p, hylo::aligned(shared));
}
