// The convolution along tokens that makes x, b and c, and its silu, of a chunk's tile where it lies in shared memory:
//
//   x_t <- silu(bias + sum over i < taps of weight_i raw_(t - taps + 1 + i))
//
// A tile comes with the eight tokens before it. All are read before one is written, so each thread has the tokens before
// its own as they were.
#pragma once

#include "common/dependent.cuh"
#include "ssd/gates.cuh"
#include "ssd/rows.cuh"

namespace hylo::ssd {

// A thread of 128 has four columns and eight tokens. Neighbours have the columns of a row.
template <class T>
class Mixer {
 public:
  // first: the tile's first channel. last: the last one that has a weight.
  __device__ __forceinline__ Mixer(const Mixing& mixing, int first, int last, int thread)
      : columns_(kColumns * (thread % kThreadsOfRow)), first_(kEach * (thread / kThreadsOfRow)) {
    // All are asked for before one is looked at. A column past the tile's own gets a weight of another's: it is not
    // stored.
    const int missing = kTaps - mixing.taps;  // fewer taps are the newest tokens'
    Word bias[kColumns], weight[kColumns][kTaps];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int channel = min(first + columns_ + i, last);
      bias[i] = load_of_head(mixing.bias, channel);
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        weight[i][tap] = tap < missing ? 0 : load_scalar(mixing.weight, 0, channel * mixing.taps + tap - missing);
      }
    }
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      bias_[i] = scalar_value(mixing.bias, bias[i]);
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) weight_[i][tap] = scalar_value(mixing.weight, weight[i][tap]);
    }
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

// Fetches this block's share of a chunk's x into the second cache, where the next kernel will want it: a row each of some
// threads.
__device__ __forceinline__ void fetch_x(const MixParams& p, int begin) {
  const int token = begin + blockIdx.x + gridDim.x * threadIdx.x, end = min(begin + kChunk, p.tokens);
  if (token < end) fetch_into_cache(p.inputs + (blockIdx.z * p.stride_b + token * p.stride_t), 2 * p.first);
}

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
  const int column = kTile * blockIdx.x, begin = kChunk * blockIdx.y;
  unsigned char* const tile = shared + kHaloSize;
  start_next_kernel();
  if (threadIdx.x == 0) {
    full.init(1);
    fence_barrier_init();
    full.arrive_expecting(kHaloSize + kTileSize);
    copy_box(shared, p.mixing.raw, full, column, 0, begin - kHalo, blockIdx.z);
  }
  __syncthreads();
  const Mixer<T> mixer(p.mixing, p.first + column, p.channels - 1, threadIdx.x);
  const int threads = 128 * gridDim.x * gridDim.y, thread = 128 * (gridDim.x * blockIdx.y + blockIdx.x) + threadIdx.x;
  for (int channel = thread; channel < p.channels; channel += threads) keep_last_inputs(p, channel);
  full.wait(0);
  fetch_x(p, begin);  // not before: what is waited for comes first
  mixer.convolve(tile, [] { __syncthreads(); });
  fence_async();
  __syncthreads();
  if (threadIdx.x > 0) return;
  copy_box_out(p.mixed, tile, column, 0, begin, blockIdx.z);
  commit_copies_out();
  await_copies_out<0>();
}

}  // namespace hylo::ssd
