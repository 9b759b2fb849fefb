// Gated RMS norm, forward. A translation unit of its own: the build passes HYLO_V (width of a row), HYLO_VEC (elements
// of one access), HYLO_T and HYLO_W (types of x, gate, y and of the weight: bf16, fp16, fp32).
#include "common/dependent.cuh"
#include "common/dtype.cuh"
#include "common/reduce.cuh"
#include "gated_rms_norm/params.h"
#include "gated_rms_norm/traits.cuh"

namespace hylo::gated_rms_norm {

// The fast exponential and division are good to a few units of fp32's last place near 0 and lose up to one unit for
// each 1/1.16 of |z|: nothing beside a 16-bit result, too much beside an fp32 one.
template <bool kPrecise>
__device__ __forceinline__ float silu(float z) {
  if constexpr (kPrecise) return z / (1.0f + expf(-z));
  return __fdividef(z, 1.0f + __expf(-z));
}

template <class T, class W, int kV, int kVec>
__device__ __forceinline__ void forward(const Params& p, float* s_partial) {
  static_assert(0 < kV && kV <= kMaxWidth && kV % kVec == 0);
  constexpr int kThreads = threads_per_row(kV, kVec);
  constexpr int kRows = rows_per_block(kV, kVec);
  constexpr int kVectors = vectors_per_thread(kV, kVec);
  constexpr int kStep = kThreads * kVec;
  constexpr bool kFull = kVectors * kStep == kV;

  // Every thread stays to the end, for the sum; those of the rows past the last one neither load nor store.
  const unsigned batch = blockIdx.x / p.tiles;
  const unsigned row = (blockIdx.x - batch * p.tiles) * kRows + threadIdx.x / kThreads;
  const unsigned token = row / p.heads;
  const unsigned head = row - token * p.heads;
  const int first = static_cast<int>(threadIdx.x % kThreads) * kVec;
  const bool row_exists = row < p.rows;
  const auto offset = [&](const Strides& s) { return batch * s.b + token * s.t + head * s.h + first; };
  const auto exists = [&](int i) { return row_exists && (kFull || first + i * kStep < kV); };

  const T* g_x = static_cast<const T*>(p.x) + offset(p.x_strides);
  const T* g_gate = static_cast<const T*>(p.gate) + offset(p.gate_strides);
  float r_x[kVectors][kVec] = {};
  float r_gate[kVectors][kVec] = {};
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (!exists(i)) continue;
    load(r_x[i], g_x + i * kStep);
    load(r_gate[i], g_gate + i * kStep);
  }

  // From here r_x is what gets normalised, r_gate what multiplies it afterwards.
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      const float gated = silu<sizeof(T) == 4>(r_gate[i][j]);
      r_x[i][j] *= p.norm_before_gate ? 1.0f : gated;
      r_gate[i][j] = p.norm_before_gate ? gated : 1.0f;
      sum += r_x[i][j] * r_x[i][j];
    }
  }
  const float scale = rsqrtf(sum_over_threads<kThreads>(sum, s_partial) * (1.0f / kV) + p.eps);

  const W* g_weight = static_cast<const W*>(p.weight) + head * p.weight_stride_h + first;
  T* g_y = static_cast<T*>(p.y) + (static_cast<long long>(batch) * p.rows + row) * kV + first;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (!exists(i)) continue;
    float r_y[kVec];
    load(r_y, g_weight + i * kStep);
#pragma unroll
    for (int j = 0; j < kVec; ++j) r_y[j] *= r_x[i][j] * scale * r_gate[i][j];
    store(g_y + i * kStep, r_y);
  }
}

}  // namespace hylo::gated_rms_norm

extern "C" __global__ void __launch_bounds__(hylo::gated_rms_norm::block_threads(HYLO_V, HYLO_VEC))
    gated_rms_norm_fwd_kernel_y(const __grid_constant__ hylo::gated_rms_norm::Params p) {
  hylo::start_next_kernel();
  hylo::await_kernel_before();
  __shared__ float s_partial[hylo::gated_rms_norm::block_threads(HYLO_V, HYLO_VEC) / hylo::kWarpThreads];
  hylo::gated_rms_norm::forward<hylo::HYLO_T, hylo::HYLO_W, HYLO_V, HYLO_VEC>(p, s_partial);
}
