// What a decode step of latent attention has before and behind the attention itself: two launches around it. A
// translation unit of its own: the build passes HYLO_T (type of all tensors but cos and sin: bf16, fp16), HYLO_NOPE and
// HYLO_R.
#include "mla_step/append.cuh"
#include "mla_step/queries.cuh"
#include "mla_step/values.cuh"

// The first blocks rotate and append; their chain of loads is the longest.
extern "C" __global__ void __launch_bounds__(hylo::mla_step::kThreads)
    mla_step_fwd_kernel_queries(const __grid_constant__ hylo::mla_step::QueriesParams p) {
  using namespace hylo::mla_step;
  const int absorbing = static_cast<int>(blockIdx.x) - p.appending;
  if (absorbing < 0) {
    hylo::await_kernel_before();
    hylo::start_next_kernel();  // not before: see Expander::run
    Appender<hylo::HYLO_T>(p, static_cast<int>(blockIdx.x)).run();
    return;
  }
  const int warp = absorbing * (kThreads / 32) + static_cast<int>(threadIdx.x) / 32;
  const bool any = warp < p.share.warps;
  const Absorber<hylo::HYLO_T, HYLO_NOPE> absorber(p, any ? warp : 0);
  if (any) absorber.prefetch_weights();
  hylo::await_kernel_before();
  hylo::start_next_kernel();
  if (any) absorber.run();
}

extern "C" __global__ void __launch_bounds__(hylo::mla_step::kThreads)
    mla_step_fwd_kernel_values(const __grid_constant__ hylo::mla_step::ValuesParams p) {
  using namespace hylo::mla_step;
  hylo::start_next_kernel();
  const int warp = static_cast<int>(blockIdx.x) * (kThreads / 32) + static_cast<int>(threadIdx.x) / 32;
  if (warp < p.share.warps) Expander<hylo::HYLO_T, HYLO_R>(p, warp).run();
}
