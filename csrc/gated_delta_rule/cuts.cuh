// How far from where a segment begins a pass has to start, in chunks, so that what came before is negligible. Each
// token multiplies the state by exp(g) (I - beta k k^T), whose norm is at most exp(g) max(1, |1 - beta k^2|); the walk
// is long enough when the product of these bounds is small enough. A block a cut, head, sequence and direction.
#pragma once

#include "common/global_access.cuh"
#include "common/wgmma.cuh"
#include "gated_delta_rule/chunks.cuh"

namespace hylo::gated_delta_rule {

template <class T>
class Cut {
 public:
  __device__ __forceinline__ explicit Cut(const Params& p)
      : p_(p),
        sequence_(sequence_at(p, blockIdx.z / 2)),
        head_(blockIdx.y),
        back_(blockIdx.z % 2 == 1),
        chunks_(chunks_of(sequence_.tokens)),
        cut_((blockIdx.x + 1) * ((chunks_ + p.segments - 1) / p.segments)) {}

  __device__ __forceinline__ void run() const {
    clear_ready();
    const int walk = cut_ < chunks_ ? walk_until_negligible() : 0;
    const long long head = static_cast<long long>(sequence_.index) * p_.heads + head_;
    if (threadIdx.x == 0) p_.cuts[(head * p_.segments + blockIdx.x + 1) * 2 + back_] = walk;
  }

 private:
  // For the pass after it.
  __device__ __forceinline__ void clear_ready() const {
    if (p_.ready == nullptr) return;
    const long long records = static_cast<long long>(p_.chunks) * p_.heads;
    const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const int blocks = gridDim.x * gridDim.y * gridDim.z;
    for (long long i = block * kCutsThreads + threadIdx.x; i < records; i += blocks * kCutsThreads) p_.ready[i] = 0;
  }

  static constexpr int kLanes = kCutsThreads / kChunk;  // that share a token

  // The chunks there are in the walk's direction.
  __device__ __forceinline__ int room() const { return back_ ? chunks_ - cut_ : cut_; }
  __device__ __forceinline__ int chunk(int step) const { return back_ ? cut_ + step : cut_ - 1 - step; }

  __device__ __forceinline__ long long token(int step, int within) const {
    return static_cast<long long>(sequence_.batch) * p_.tokens + sequence_.begin + chunk(step) * kChunk + within;
  }
  __device__ __forceinline__ bool exists(int step, int within) const {
    return step < room() && chunk(step) * kChunk + within < sequence_.tokens;
  }

  __device__ __forceinline__ float gate(int step, int within) const {
    return exists(step, within) ? fmaxf(p_.g[token(step, within) * p_.heads + head_], kEmptiesState) : 0.0f;
  }

  // -1 where the longest walk is too short. Where it would be even if the keys let nothing grow, no more keys are read.
  __device__ __forceinline__ int walk_until_negligible() const {
    float gates = 0.0f;
    for (int i = threadIdx.x; i < kMaxWarmUp * kChunk; i += kCutsThreads) gates += gate(i / kChunk, i % kChunk);
    float2 both = sum_over_block(make_float2(log_bound(0), gates));
    if (room() > kMaxWarmUp && !(both.y < p_.negligible)) return -1;
    float bound = both.x;
    int steps = 1;
    while (steps < room() && !(bound < p_.negligible)) {
      if (steps == kMaxWarmUp) return -1;
      bound += sum_over_block(make_float2(log_bound(steps++), 0.0f)).x;
    }
    return steps;
  }

  // A thread's part.
  __device__ __forceinline__ float log_bound(int step) const {
    const int within = threadIdx.x / kLanes;
    const float norm2 = key_norm2(step, within);
    if (!exists(step, within) || threadIdx.x % kLanes > 0) return 0.0f;
    const float beta = p_.beta[token(step, within) * p_.heads + head_];
    return gate(step, within) + __logf(fmaxf(1.0f, fabsf(1.0f - beta * norm2)));
  }

  // Of a token, whose lanes share its key out; 0 where there is none.
  __device__ __forceinline__ float key_norm2(int step, int within) const {
    const T* key = static_cast<const T*>(p_.keys_at) + sequence_.batch * p_.key_strides[0] +
                   (sequence_.begin + chunk(step) * kChunk + within) * p_.key_strides[1] +
                   head_ / p_.group * p_.key_strides[2];
    float sum = 0.0f;
    for (int i = threadIdx.x % kLanes; exists(step, within) && i < p_.keys / 8; i += kLanes) {
      const Words eight = load_words(key + 8 * i);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float low, high;
        wgmma::unpack<T>(eight.at[j], low, high);
        sum += low * low + high * high;
      }
    }
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    return sum;
  }

  // In all threads the same.
  static __device__ __forceinline__ float2 sum_over_block(float2 value) {
    __shared__ float2 parts[kCutsThreads / 32];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      value.x += __shfl_xor_sync(kAllLanes, value.x, step);
      value.y += __shfl_xor_sync(kAllLanes, value.y, step);
    }
    __syncthreads();
    if (lane() == 0) parts[threadIdx.x / 32] = value;
    __syncthreads();
    float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int i = 0; i < kCutsThreads / 32; ++i) {
      sum.x += parts[i].x;
      sum.y += parts[i].y;
    }
    return sum;
  }

  const Params& p_;
  const Sequence sequence_;
  const int head_;
  const bool back_;
  const int chunks_;
  const int cut_;  // the chunk that the segment begins with
};

}  // namespace hylo::gated_delta_rule
