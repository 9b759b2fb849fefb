// Gated delta rule, one token: a head's state is read once, updated in registers and written once. A translation unit
// of its own: the build passes HYLO_T (type of q, k, v and o), HYLO_S (of the state), HYLO_K, HYLO_RAW (1: the gate
// and the strength come as the projections gave them, and are activated here) and HYLO_TEAM (threads of a block).
//
// Columns of the state are independent, so a team of threads takes a few of them and all K rows. With R = S^T k and
// Q = S^T q of the state as it was, delta = beta (v - decay R) and o = scale (decay Q + (k.q) delta): one sum over rows
// gives both. Normalised keys and queries are k / |k| and q / |q|, so their lengths are factors of the sums.
//
// The state comes from farthest away and is most of the bytes, so it is asked for first: before the kernel ahead has
// ended, where that does not write it.

#include "common/activation.cuh"
#include "common/dependent.cuh"
#include "common/dtype.cuh"
#include "common/global_access.cuh"
#include "common/packed.cuh"
#include "common/reduce.cuh"
#include "common/scalar.cuh"
#include "gated_delta_rule/step_params.h"
#include "gated_delta_rule/step_traits.cuh"

namespace hylo::gated_delta_rule {

// Warps that a multiprocessor has registers for, where a thread holds so many rows of so many columns.
HYLO_HOST_DEVICE constexpr int step_resident(int rows, int width) {
  return rows > 16 ? 8 : rows > 8 ? (width > 4 ? 12 : 16) : 20;
}

constexpr float kNormEps = 1e-6f;  // of the sum of squares

// Of the state: what a thread moves at once, packed as it is in memory.
template <class S>
constexpr int kStepWidth = kStepAccess / sizeof(S);

// Sums over the rows of a team, given to all of its threads.
template <int kTeam, int kSize>
__device__ __forceinline__ void sum_over_rows(float (&sums)[kSize]) {
  constexpr int kWarps = kTeam / kWarpThreads, kAcross = step_across(kTeam);
#pragma unroll
  for (int offset = kAcross; offset < kWarpThreads; offset *= 2) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) sums[i] += __shfl_xor_sync(~0u, sums[i], offset);
  }
  __shared__ float s_partial[kWarps][kAcross][kSize];
  const int warp = threadIdx.x / kWarpThreads, across = threadIdx.x % kAcross;
  if (threadIdx.x % kWarpThreads < kAcross) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) s_partial[warp][across][i] = sums[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    sums[i] = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sums[i] += s_partial[w][across][i];
  }
}

template <class T, class S, int kK, bool kRaw, int kTeam>
__device__ __forceinline__ void step(const StepParams& p) {
  constexpr int kWidth = kStepWidth<S>;
  constexpr int kAcross = step_across(kTeam), kRows = kK / step_groups(kTeam);
  constexpr int kLengths = kRaw ? 3 : 1;
  static_assert(kK % step_groups(kTeam) == 0);
  const int head = blockIdx.y, key_head = head / p.group;
  const long long batch = blockIdx.z;
  const int column = blockIdx.x * step_columns(kTeam, sizeof(S)) + threadIdx.x % kAcross * kWidth;
  const int first_row = threadIdx.x / kAcross * kRows;
  const bool inside = column < p.values;
  const int safe_column = inside ? column : 0;

  if (!p.settled_state) await_kernel_before();
  const long long row = read_index(p.indices, p.indices_stride, p.wide_indices, batch);
  T* o = static_cast<T*>(p.o) + (batch * gridDim.y + head) * p.values + column;
  const bool writes_o = first_row == 0 && inside;
  if (row < 0) {  // padding
    await_kernel_before();
    const float zeros[kWidth] = {};
    if (writes_o) store(o, zeros);
    return;
  }

  S* state = static_cast<S*>(p.state) + row * p.state_b + head * p.state_h +
             static_cast<long long>(first_row) * p.values + safe_column;
  Words r_state[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) r_state[i] = load_words(state + static_cast<long long>(i) * p.values);
  await_kernel_before();

  T r_k[kRows], r_q[kRows], r_v[kWidth];
  read(r_k, static_cast<const T*>(p.k) + batch * p.k_b + key_head * p.k_h + first_row);
  read(r_q, static_cast<const T*>(p.q) + batch * p.q_b + key_head * p.q_h + first_row);
  read(r_v, static_cast<const T*>(p.v) + batch * p.v_b + head * p.v_h + safe_column);
  float gate = read_scalar(p.gate, batch, head), beta = read_scalar(p.strength, batch, head);
  if constexpr (kRaw) {
    const float step = softplus(gate + read_scalar(p.dt_bias, batch, head));
    gate = -expf(read_scalar(p.a_log, batch, head)) * step;
    beta = p.most_strength / (1.0f + expf(-beta));
  }
  const float decay = expf(gate);

  float sums[2 * kWidth + kLengths] = {};  // R, then Q, then k.q, then k.k and q.q
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const float k = to_float(r_k[i]), q = to_float(r_q[i]);
    sums[2 * kWidth] += k * q;
    if constexpr (kRaw) {
      sums[2 * kWidth + 1] += k * k;
      sums[2 * kWidth + 2] += q * q;
    }
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const float s = unpack<S>(r_state[i], j);
      sums[j] += s * k;
      sums[kWidth + j] += s * q;
    }
  }
  sum_over_rows<kTeam>(sums);
#pragma unroll
  for (int i = 0; i < kRows; ++i) forget_uses(r_state[i]);
  float k_factor = 1.0f, q_factor = 1.0f;
  if constexpr (kRaw) {
    if (p.normalise) {
      k_factor = rsqrtf(sums[2 * kWidth + 1] + kNormEps);
      q_factor = rsqrtf(sums[2 * kWidth + 2] + kNormEps);
    }
  }
  q_factor *= p.scale;

  float r_o[kWidth], write[kWidth];
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    write[j] = k_factor * beta * (to_float(r_v[j]) - decay * k_factor * sums[j]);
    r_o[j] = q_factor * (decay * sums[kWidth + j] + sums[2 * kWidth] * write[j]);
  }
  if (writes_o) store(o, r_o);
  if (!inside) return;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const float k = to_float(r_k[i]);
    float next[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) next[j] = decay * unpack<S>(r_state[i], j) + k * write[j];
    store_words(state + static_cast<long long>(i) * p.values, pack_words<S>(next));
  }
}

// Of a multiprocessor.
constexpr int kStepBlocks =
    step_resident(HYLO_K / step_groups(HYLO_TEAM), kStepWidth<HYLO_S>) * kWarpThreads / HYLO_TEAM;

}  // namespace hylo::gated_delta_rule

extern "C" __global__ void __launch_bounds__(HYLO_TEAM, hylo::gated_delta_rule::kStepBlocks)
    gated_delta_rule_fwd_kernel_step(const __grid_constant__ hylo::gated_delta_rule::StepParams p) {
  hylo::start_next_kernel();
  hylo::fetch_parameters(p);
  hylo::gated_delta_rule::step<hylo::HYLO_T, hylo::HYLO_S, HYLO_K, HYLO_RAW, HYLO_TEAM>(p);
}
