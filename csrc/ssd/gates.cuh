// What the gates of a chunk and head come to. A warp makes them, two tokens a lane.
//
// Decays between tokens of different blocks of 16 are products of two, through the first token of the later one's block:
// both are at most 1, and 256 exponentials a chunk stand for 4096.
#pragma once

#include "common/chunks.cuh"
#include "common/dtype.cuh"
#include "common/global_access.cuh"
#include "common/scalar.cuh"
#include "ssd/params.h"
#include "ssd/traits.cuh"

namespace hylo::ssd {

constexpr float kEmptiesState = -150.0f;  // of log2: exp2 of it is 0 in fp32, and what is below stands for as much

// By their names in the kernel of the gradients.
__device__ __forceinline__ float number(int type, Word bits) { return scalar_value(type, bits); }
__device__ __forceinline__ void store_number(int type, void* data, long long index, float value) {
  store_scalar(type, data, index, value);
}

// Of a head; 0 where there are none.
__device__ __forceinline__ Word load_of_head(const Scalar& of, int head) {
  return of.data == nullptr ? 0 : load_scalar(of, 0, head);
}
__device__ __forceinline__ float number_of_head(const Scalar& of, int head) {
  return scalar_value(of, load_of_head(of, head));
}

// Of one head; what is made of its dt. This lane has tokens 2 lane and 2 lane + 1 of a chunk.
class Gates {
 public:
  __device__ __forceinline__ Gates(const Params& p, int head, const Sequence& sequence)
      : p_(p),
        tokens_(sequence.tokens),
        stride_(p.dt.stride_t * scalar_bytes(p.dt.type)),
        first_(static_cast<const char*>(p.dt.data) + sequence.begin * stride_ +
               (sequence.batch * p.dt.stride_b + head * p.dt.stride_h) * scalar_bytes(p.dt.type)),
        rate_bits_(load_of_head(p.a, head)),
        bias_bits_(load_of_head(p.dt_bias, head)) {}

  __device__ __forceinline__ float rate() const { return scalar_value(p_.a, rate_bits_); }

  // dt of its tokens in a sequence's chunk as it lies in memory; past the sequence's end that of its last token.
  struct Raw {
    Word bits[2];
  };
  __device__ __forceinline__ Raw load(int chunk) const {
    return {load_scalar(p_.dt.type, place(chunk, 0)), load_scalar(p_.dt.type, place(chunk, 1))};
  }

  // Fetches them into the second cache, for a load later on.
  __device__ __forceinline__ void prefetch(int chunk) const {
    hylo::prefetch(place(chunk, 0));
    hylo::prefetch(place(chunk, 1));
  }

  // With its bias.
  __device__ __forceinline__ float2 raw(const Raw& loaded) const {
    const float bias = scalar_value(p_.dt_bias, bias_bits_);
    const int type = p_.dt.type;
    return make_float2(bias + scalar_value(type, loaded.bits[0]), bias + scalar_value(type, loaded.bits[1]));
  }

  // Of them the steps, for a chunk of so many tokens; 0 past its end, which keeps a state as it is.
  __device__ __forceinline__ float2 steps(float2 raw, int tokens) const {
    const int first = 2 * lane();
    return make_float2(first < tokens ? step(raw.x) : 0.0f, first + 1 < tokens ? step(raw.y) : 0.0f);
  }

  __device__ __forceinline__ float step(float raw) const {
    if (p_.softplus) raw = raw > 20.0f ? raw : log1pf(__expf(raw));
    return fminf(fmaxf(raw, p_.least), p_.greatest);
  }

  // The steps' derivatives by dt; 0 past a chunk's end.
  __device__ __forceinline__ float2 slopes(float2 raw, int tokens) const {
    const int first = 2 * lane();
    return make_float2(first < tokens ? slope(raw.x) : 0.0f, first + 1 < tokens ? slope(raw.y) : 0.0f);
  }

  // log2 of the decay from the chunk's start through each token.
  __device__ __forceinline__ float2 sums(float2 step) const {
    const float rate = kLog2E * this->rate();
    return running(make_float2(fmaxf(rate * step.x, kEmptiesState), fmaxf(rate * step.y, kEmptiesState)));
  }

  // Fills the factors up to kWritten.
  static __device__ __forceinline__ void write_ends(float2 step, float2 sum, float* factors) {
    const float end = __shfl_sync(kAllLanes, sum.y, 31);
    put(factors, kFromStart, exp2_fast(sum.x), exp2_fast(sum.y));
    put(factors, kWritten, step.x * exp2_fast(end - sum.x), step.y * exp2_fast(end - sum.y));
  }

  // Fills the others, those between tokens; with the step of the token that writes in those to a block, or without.
  template <bool kStepped>
  static __device__ __forceinline__ void write_between(float2 step, float2 sum, float* factors) {
    put(factors, kStep, step.x, step.y);
    put(factors, kSum, sum.x, sum.y);
    const float start = __shfl_sync(kAllLanes, sum.x, lane() & ~7);
    put(factors, kInBlock, exp2_fast(sum.x - start), exp2_fast(sum.y - start));
#pragma unroll
    for (int block = 1; block < kChunk / kBlock; ++block) {
      const float anchor = __shfl_sync(kAllLanes, sum.x, 8 * block);
      const bool earlier = lane() < 8 * block;
      put(factors, kToBlock1 + block - 1, earlier ? (kStepped ? step.x : 1.0f) * exp2_fast(anchor - sum.x) : 0.0f,
          earlier ? (kStepped ? step.y : 1.0f) * exp2_fast(anchor - sum.y) : 0.0f);
    }
  }

  static __device__ __forceinline__ void write_time(float2 step, float* factors) {
    const float2 sum = running(step);
    put(factors, kTime, sum.x, sum.y);
  }

  static __device__ __forceinline__ void write_slopes(float2 slope, float* factors) {
    put(factors, kSlope, slope.x, slope.y);
  }

 private:
  // The sum of all tokens' up to each of this lane's two.
  static __device__ __forceinline__ float2 running(float2 each) {
    float through = each.x + each.y;
#pragma unroll
    for (int back = 1; back < 32; back *= 2) {
      const float other = __shfl_up_sync(kAllLanes, through, back);
      if (lane() >= back) through += other;
    }
    return make_float2(through - each.y, through);
  }

  // A limit that is met lets the gradient through, as torch.clamp does.
  __device__ __forceinline__ float slope(float raw) const {
    const float found = p_.softplus ? 1.0f / (1.0f + __expf(-raw)) : 1.0f;
    const float before = p_.softplus ? (raw > 20.0f ? raw : log1pf(__expf(raw))) : raw;
    return before >= p_.least && before <= p_.greatest ? found : 0.0f;
  }

  static __device__ __forceinline__ void put(float* factors, int which, float first, float second) {
    *reinterpret_cast<float2*>(factors + which * kChunk + 2 * lane()) = make_float2(first, second);
  }

  __device__ __forceinline__ const char* place(int chunk, int which) const {
    const int token = chunk * kChunk + 2 * lane() + which, last = tokens_ - 1;
    return first_ + (token < last ? token : last) * stride_;
  }

  const Params& p_;
  const int tokens_;
  const long long stride_;  // bytes
  const char* const first_;
  const Word rate_bits_, bias_bits_;
};

}  // namespace hylo::ssd
