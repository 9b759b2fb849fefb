// A few lanes share rows of a head's state: S <- decay S + step x b^T and o = S c + d x. A row runs along K; its lanes
// have 16 bytes of it each, or several times that.
#pragma once

#include "common/activation.cuh"
#include "common/divider.cuh"
#include "common/packed.cuh"
#include "common/scalar.cuh"
#include "ssd/step_params.h"
#include "ssd/step_traits.cuh"

namespace hylo::ssd {

struct Step {
  float size, decay, skip;
};

// What it is made of, on the way from memory.
struct LoadedStep {
  Word dt, bias, rate, skip;
};

__device__ __forceinline__ LoadedStep load_step(const StepGates& gates, long long batch, int head) {
  const auto of_head = [head](const Scalar& of) { return of.data == nullptr ? 0 : load_scalar(of, 0, head); };
  return {load_scalar(gates.dt, batch, head), of_head(gates.dt_bias), of_head(gates.a), of_head(gates.d)};
}

__device__ __forceinline__ Step make_step(const StepGates& gates, const LoadedStep& loaded) {
  float size = scalar_value(gates.dt, loaded.dt) + scalar_value(gates.dt_bias, loaded.bias);
  if (gates.softplus) size = softplus(size);
  size = size < gates.least ? gates.least : size > gates.greatest ? gates.greatest : size;  // NaN stays
  return {size, expf(size * scalar_value(gates.a, loaded.rate)), scalar_value(gates.d, loaded.skip)};
}

// kRows rows, as one of their lanes sees them.
template <class S, int kK, int kRows>
class StateRows {
 public:
  static constexpr StepSpread kSpread = step_spread(kK, sizeof(S));
  static constexpr int kLanes = kSpread.lanes, kPieces = kSpread.pieces;
  static constexpr int kWidth = kStepAccess / sizeof(S);  // numbers of a piece
  // Of the sums over a row: each lane is left with kLeft, and kAlike neighbours with the same.
  static constexpr int kLeft = kRows > kLanes ? kRows / kLanes : 1;
  static constexpr int kAlike = kLanes > kRows ? kLanes / kRows : 1;

  using Vectors = float[kPieces][kWidth];

  __device__ __forceinline__ explicit StateRows(int lane) : lane_(lane) {}

  // Where a piece begins in its row, and whether there is such a piece.
  __device__ __forceinline__ int column(int piece) const { return (piece * kLanes + lane_) * kWidth; }
  __device__ __forceinline__ bool exists(int piece) const {
    return kLanes * kPieces * kWidth == kK || column(piece) < kK;
  }
  // The first row that this lane has a sum of.
  __device__ __forceinline__ int summed_row() const { return lane_ / kAlike * kLeft; }
  __device__ __forceinline__ bool stores_sums() const { return lane_ % kAlike == 0; }

  // This lane's part of K numbers.
  template <class T>
  __device__ __forceinline__ void read_vector(Vectors& out, const T* numbers) const {
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      T raw[kWidth] = {};
      if (exists(p)) read(raw, numbers + column(p));
#pragma unroll
      for (int j = 0; j < kWidth; ++j) out[p][j] = to_float(raw[j]);
    }
  }

  // held(i, p): piece p of row i as it was; value(i): x of row i. Gives this lane's part of the rows' outputs.
  template <class Held, class Value>
  __device__ __forceinline__ void update(S* first_row, bool there, const Step& step, const Held& held,
                                         const Value& value, const Vectors& b, const Vectors& c,
                                         float (&outputs)[kRows]) const {
    const float skip = lane_ == 0 ? step.skip : 0.0f;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float x = value(i), written = step.size * x;
      outputs[i] = skip * x;
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        const Words words = held(i, p);
        float next[kWidth];
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          next[j] = step.decay * unpack<S>(words, j) + written * b[p][j];
          outputs[i] += next[j] * c[p][j];
        }
        if (there && exists(p)) store_words(first_row + i * kK + column(p), pack_words<S>(next));
      }
    }
  }

  // Sums over the lanes of each row: half of a lane's rows go to its partner, half of the partner's come, as long as
  // there are several.
  __device__ __forceinline__ void sum(float (&sums)[kRows], float (&out)[kLeft]) const {
    halve<kLanes / 2, kRows>(sums);
#pragma unroll
    for (int i = 0; i < kLeft; ++i) out[i] = sums[i];
  }

 private:
  template <int kOffset, int kCount>
  __device__ __forceinline__ void halve(float (&sums)[kRows]) const {
    if constexpr (kOffset > 0 && kCount > 1) {
      constexpr int kHalf = kCount / 2;
      const bool upper = lane_ & kOffset;
#pragma unroll
      for (int i = 0; i < kHalf; ++i) {
        const float kept = upper ? sums[i + kHalf] : sums[i], given = upper ? sums[i] : sums[i + kHalf];
        sums[i] = kept + __shfl_xor_sync(~0u, given, kOffset);
      }
      halve<kOffset / 2, kHalf>(sums);
    } else if constexpr (kOffset > 0) {
      sums[0] += __shfl_xor_sync(~0u, sums[0], kOffset);
      halve<kOffset / 2, 1>(sums);
    }
  }

  const int lane_;
};

}  // namespace hylo::ssd
