// The convolution along tokens that makes x, b and c, and its silu, of a chunk's tile where it lies in shared memory:
//
//   x_t <- silu(bias + sum over i < taps of weight_i raw_(t - taps + 1 + i))
//
// A tile comes with the eight tokens before it. All are read before one is written, so each thread has the tokens before
// its own as they were.
#pragma once

#include "common/copy_engine.cuh"
#include "common/dependent.cuh"
#include "common/fast_math.cuh"
#include "common/scalar.cuh"
#include "common/wgmma.cuh"
#include "ssd/traits.cuh"

namespace hylo::ssd {

// Puts a tile's weights into shared memory, by 128 threads. first: the tile's first channel. last: the last one that has a
// weight; a column past the tile's own gets that of another channel and is not stored. The code is short, for the
// instructions that a block begins with come from far away.
__device__ __forceinline__ void load_weights(const Mixing& mixing, int first, int last, float* to, int thread) {
  constexpr int kEach = ceil_div(kMixWeights, 128);
  const int missing = kTaps - mixing.taps;  // fewer taps are the newest tokens'
  Word loaded[kEach] = {};
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int at = thread + 128 * i, tap = at % kTaps - missing;
    const bool bias = at >= kTile * kTaps;
    const int channel = min(first + (bias ? at - kTile * kTaps : at / kTaps), last);
    const Scalar& of = bias ? mixing.bias : mixing.weight;
    if (at < kMixWeights && of.data != nullptr && (bias || tap >= 0)) {
      loaded[i] = load_scalar(of, 0, bias ? channel : channel * mixing.taps + tap);
    }
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int at = thread + 128 * i;
    if (at < kMixWeights) to[at] = scalar_value(at < kTile * kTaps ? mixing.weight : mixing.bias, loaded[i]);
  }
}

// A thread of 128 has four columns and eight tokens of a tile. Neighbours have the columns of a row.
template <class T>
class Mixer {
 public:
  // weights: of the tile.
  __device__ __forceinline__ Mixer(const float* weights, int thread)
      : columns_(kColumns * (thread % kThreadsOfRow)), first_(kEach * (thread / kThreadsOfRow)) {
    const auto four = [&](int at, float (&to)[4]) {
      const float4 found = *reinterpret_cast<const float4*>(weights + at);
      to[0] = found.x, to[1] = found.y, to[2] = found.z, to[3] = found.w;
    };
#pragma unroll
    for (int i = 0; i < kColumns; ++i) four(kTaps * (columns_ + i), weight_[i]);
    four(kTaps * kTile + columns_, bias_);
  }

  // of_chunk: a tile's first own token. Calls sync, for all 128 threads, between reading and writing.
  template <class Sync>
  __device__ __forceinline__ void convolve(unsigned char* of_chunk, const Sync& sync) const {
    Word rows[kRead][kPairs];
#pragma unroll
    for (int i = 0; i < kRead; ++i) {
      const uint2 row = *reinterpret_cast<const uint2*>(place(of_chunk, i - (kTaps - 1)));
      rows[i][0] = row.x, rows[i][1] = row.y;
    }
    sync();
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) convolve_pair(rows, pair);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      *reinterpret_cast<uint2*>(place(of_chunk, i)) = make_uint2(rows[i][0], rows[i][1]);
    }
  }

 private:
  static constexpr int kColumns = 4, kPairs = kColumns / 2, kThreadsOfRow = kTile / kColumns;
  static constexpr int kEach = kChunk * kThreadsOfRow / 128, kRead = kEach + kTaps - 1;  // tokens

  // Of two columns; the results take the first rows' places.
  __device__ __forceinline__ void convolve_pair(Word (&rows)[kRead][kPairs], int pair) const {
    float low[kRead], high[kRead];
#pragma unroll
    for (int i = 0; i < kRead; ++i) wgmma::unpack<T>(rows[i][pair], low[i], high[i]);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      rows[i][pair] = wgmma::pack<T>(activated(low, i, 2 * pair), activated(high, i, 2 * pair + 1));
    }
  }

  __device__ __forceinline__ float activated(const float (&column)[kRead], int from, int i) const {
    float sum = bias_[i];
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) sum = fmaf(weight_[i][tap], column[from + tap], sum);
    return sum * reciprocal_fast(1.0f + exp2_fast(-kLog2E * sum));
  }

  // Of one of the thread's own tokens, or of those before.
  __device__ __forceinline__ unsigned char* place(unsigned char* of_chunk, int token) const {
    const int row = first_ + token + kHalo;  // from a tile's start, which is a multiple of 1024
    return of_chunk - kHaloSize + wgmma::swizzled(row, columns_ / 8) + columns_ % 8 * 2;
  }

  const int columns_, first_;
  float bias_[kColumns], weight_[kColumns][kTaps];
};

// The last inputs of a channel.
__device__ __forceinline__ void keep_last_inputs(const MixParams& p, int channel) {
  const int taps = p.mixing.taps, begin = p.tokens - taps;
  const char* const from = p.inputs + (blockIdx.z * p.stride_b + begin * p.stride_t + 2 * channel);
  unsigned short found[kTaps] = {};
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
    if (tap < taps && begin + tap >= 0) found[tap] = *reinterpret_cast<const unsigned short*>(from + tap * p.stride_t);
  }
  const long long row = static_cast<long long>(blockIdx.z) * p.channels + channel;
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
    if (tap < taps) static_cast<unsigned short*>(p.last_inputs)[row * taps + tap] = found[tap];
  }
}

// 128 threads, for a tile of b or c, a chunk and a batch entry.
template <class T>
__device__ __forceinline__ void mix(const MixParams& p, unsigned char* shared) {
  __shared__ Barrier full;
  alignas(16) __shared__ float weights[kMixWeights];
  const int column = kTile * blockIdx.x, begin = kChunk * blockIdx.y;
  unsigned char* const tile = shared + kHaloSize;
  start_next_kernel();
  fetch_parameters(p);
  if (threadIdx.x == 0) {
    full.init(1);
    fence_barrier_init();
    full.arrive_expecting(kHaloSize + kTileSize);
    copy_box(shared, p.mixing.raw, full, column, 0, begin - kHalo, blockIdx.z);
  }
  load_weights(p.mixing, p.first + column, p.channels - 1, weights, threadIdx.x);
  __syncthreads();
  const Mixer<T> mixer(weights, threadIdx.x);
  const int threads = 128 * gridDim.x * gridDim.y, thread = 128 * (gridDim.x * blockIdx.y + blockIdx.x) + threadIdx.x;
  for (int channel = thread; channel < p.channels; channel += threads) keep_last_inputs(p, channel);
  full.wait(0);
  mixer.convolve(tile, [] { __syncthreads(); });
  fence_async();
  __syncthreads();
  if (threadIdx.x > 0) return;
  copy_box_out(p.mixed, tile, column, 0, begin, blockIdx.z);
  commit_copies_out();
  await_copies_out<0>();
}

}  // namespace hylo::ssd
