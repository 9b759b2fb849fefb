// The factors of the plain kernels: what dt comes to, and decays at the accuracy of fp32.
#pragma once

#include "common/chunks.cuh"
#include "common/scalar.cuh"
#include "ssd/gates.cuh"
#include "ssd/plain_params.h"
#include "ssd/plain_traits.cuh"

namespace hylo::ssd::plain {

// In global or in shared memory.
struct Factors {
  float* data;

  __device__ __forceinline__ float& at(Factor which, int token) const { return data[which * kChunk + token]; }

  // What is left at token i of what token j wrote. Differences of sums in two floats are as good as those of fp64.
  __device__ __forceinline__ float decay(int i, int j) const {
    return exp2f((at(kDecayHigh, i) - at(kDecayHigh, j)) + (at(kDecayLow, i) - at(kDecayLow, j)));
  }
  __device__ __forceinline__ float whole() const { return at(kFromStart, kChunk - 1); }
};

__device__ __forceinline__ Factors factors_of(const Params& p, int chunk, int head) {
  return {p.factors + (static_cast<long long>(chunk) * p.heads + head) * kFactorsLength};
}

// A chunk and head, by a warp: two tokens a lane.
class MakeFactors {
 public:
  __device__ __forceinline__ MakeFactors(const Params& p, int index, int head)
      : p_(p), chunk_(chunk_at(p, index)), head_(head), factors_(factors_of(p, index, head)) {}

  __device__ __forceinline__ void run() const {
    if (chunk_.tokens <= 0) return;
    const float rate = number_of_head(p_.a, head_), bias = number_of_head(p_.dt_bias, head_);
    const int token = 2 * lane();
    double through[2];  // of these two tokens, then of all up to them
    for (int i = 0; i < 2; ++i) {
      const bool exists = token + i < chunk_.tokens;  // a token past the end keeps a state as it is
      const float raw = exists ? bias + load_dt(token + i) : 0.0f;
      const float before = p_.softplus ? (raw > 20.0f ? raw : log1pf(expf(raw))) : raw;
      const float step = exists ? fminf(fmaxf(before, p_.least), p_.greatest) : 0.0f;
      // A limit that is met lets the gradient through, as torch.clamp does.
      const bool passes = exists && before >= p_.least && before <= p_.greatest;
      factors_.at(kStep, token + i) = step;
      factors_.at(kSlope, token + i) = !passes ? 0.0f : p_.softplus ? 1.0f / (1.0f + expf(-raw)) : 1.0f;
      const double gate = static_cast<double>(rate) * step * 1.4426950408889634;
      through[i] = fmax(gate, static_cast<double>(kEmptiesState));
    }
    through[1] += through[0];
    double before = through[1];
#pragma unroll
    for (int back = 1; back < 32; back *= 2) {
      const double other = __shfl_up_sync(kAllLanes, before, back);
      if (lane() >= back) before += other;
    }
    before -= through[1];
    const double end = __shfl_sync(kAllLanes, before + through[1], 31);
    for (int i = 0; i < 2; ++i) {
      const double sum = before + through[i];
      const float high = static_cast<float>(sum);
      factors_.at(kDecayHigh, token + i) = high;
      factors_.at(kDecayLow, token + i) = static_cast<float>(sum - high);
      factors_.at(kFromStart, token + i) = exp2f(high);
      factors_.at(kToEnd, token + i) = exp2f(static_cast<float>(end - sum));
    }
  }

 private:
  __device__ __forceinline__ float load_dt(int token) const {
    const long long at =
        chunk_.batch * p_.dt.stride_b + (chunk_.begin + token) * p_.dt.stride_t + head_ * p_.dt.stride_h;
    return read_scalar({p_.dt.data, 1, 0, p_.dt.type}, at, 0);
  }

  const Params& p_;
  const Chunk chunk_;
  const int head_;
  const Factors factors_;
};

}  // namespace hylo::ssd::plain
