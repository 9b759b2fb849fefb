// Gated delta rule, one token: a head's state is read once, updated in registers and written once. A translation unit of
// its own: the build passes HYLO_T (type of q, k, v and o), HYLO_S (of the state), HYLO_W (of g and beta) and HYLO_K.
//
// Columns of the state are independent, so a block takes a few of them and all K rows. With R = S^T k and Q = S^T q of
// the state as it was, delta = beta (v - decay R) and o = scale (decay Q + (k.q) delta): one sum over rows gives both.

#include "common/dtype.cuh"
#include "common/reduce.cuh"
#include "gated_delta_rule/step_params.h"
#include "gated_delta_rule/step_traits.cuh"

namespace hylo::gated_delta_rule {

constexpr int kStepWarps = kStepThreads / kWarpThreads;

// Sums over the rows that a block's threads hold, given to all of them.
template <int kSize>
__device__ __forceinline__ void sum_over_rows(float (&sums)[kSize], float (*s_partial)[kStepAcross][kSize]) {
  const int across = threadIdx.x % kStepAcross, warp = threadIdx.x / kWarpThreads;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
#pragma unroll
    for (int step = kStepAcross; step < kWarpThreads; step *= 2) sums[i] += __shfl_xor_sync(~0u, sums[i], step);
    if (threadIdx.x % kWarpThreads < kStepAcross) s_partial[warp][across][i] = sums[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    sums[i] = 0.0f;
#pragma unroll
    for (int w = 0; w < kStepWarps; ++w) sums[i] += s_partial[w][across][i];
  }
}

template <class T, class S, class W, int kK>
__device__ __forceinline__ void step(const StepParams& p) {
  constexpr int kWidth = 16 / sizeof(S);
  constexpr int kRows = kK / kStepRows;
  __shared__ float s_k[kK], s_q[kK], s_dot[kStepWarps];
  __shared__ float s_partial[kStepWarps][kStepAcross][2 * kWidth];
  const int head = blockIdx.y;
  const long long batch = blockIdx.z;
  const int column = blockIdx.x * step_columns(sizeof(S)) + threadIdx.x % kStepAcross * kWidth;
  const int first_row = threadIdx.x / kStepAcross;

  T* o = static_cast<T*>(p.o) + (batch * gridDim.y + head) * p.values + column;
  long long row = batch;
  if (p.indices != nullptr) {
    row = p.wide_indices ? static_cast<const long long*>(p.indices)[batch] : static_cast<const int*>(p.indices)[batch];
    if (row < 0) {  // padding
      const float zeros[kWidth] = {};
      if (first_row == 0) store(o, zeros);
      return;
    }
  }

  S* state = static_cast<S*>(p.state) + row * p.state_b + head * p.state_h + column;
  float r_state[kRows][kWidth];
#pragma unroll
  for (int i = 0; i < kRows; ++i) load(r_state[i], state + static_cast<long long>(first_row + i * kStepRows) * p.values);

  const T* g_q = static_cast<const T*>(p.q) + batch * p.q_b + head / p.group * p.q_h;
  const T* g_k = static_cast<const T*>(p.k) + batch * p.k_b + head / p.group * p.k_h;
  float dot = 0.0f;
  for (int i = threadIdx.x; i < kK; i += kStepThreads) {
    s_q[i] = to_float(g_q[i]);
    s_k[i] = to_float(g_k[i]);
    dot += s_q[i] * s_k[i];
  }
  const float key_query = sum_over_threads<kStepThreads>(dot, s_dot);  // also makes s_q and s_k visible

  const float decay = expf(to_float(static_cast<const W*>(p.g)[batch * p.g_b + head * p.g_h]));
  const float beta = to_float(static_cast<const W*>(p.beta)[batch * p.beta_b + head * p.beta_h]);
  float r_v[kWidth];
  load(r_v, static_cast<const T*>(p.v) + batch * p.v_b + head * p.v_h + column);

  float sums[2 * kWidth] = {};  // R, then Q
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const float k = s_k[first_row + i * kStepRows], q = s_q[first_row + i * kStepRows];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      sums[j] += r_state[i][j] * k;
      sums[kWidth + j] += r_state[i][j] * q;
    }
  }
  sum_over_rows(sums, s_partial);

  float r_o[kWidth], delta[kWidth];
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    delta[j] = beta * (r_v[j] - decay * sums[j]);
    r_o[j] = p.scale * (decay * sums[kWidth + j] + key_query * delta[j]);
  }
  if (first_row == 0) store(o, r_o);
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const float k = s_k[first_row + i * kStepRows];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) r_state[i][j] = decay * r_state[i][j] + k * delta[j];
    store(state + static_cast<long long>(first_row + i * kStepRows) * p.values, r_state[i]);
  }
}

}  // namespace hylo::gated_delta_rule

extern "C" __global__ void __launch_bounds__(hylo::gated_delta_rule::kStepThreads)
    gated_delta_rule_fwd_kernel_step(const __grid_constant__ hylo::gated_delta_rule::StepParams p) {
  hylo::gated_delta_rule::step<hylo::HYLO_T, hylo::HYLO_S, hylo::HYLO_W, HYLO_K>(p);
}
