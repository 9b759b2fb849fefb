// RMS norm of x on its way into the product: x W^T with x / rms(x) * g for x is (x * g) W^T / rms(x). So tiles of x are
// weighed where they lie, their squares added up beside, and what has been summed is divided by the root in the end.
#pragma once

#include "common/copy_engine.cuh"
#include "common/dtype.cuh"
#include "skinny_linear/traits.cuh"

namespace hylo::skinny_linear {

template <class T, int kB>
class Norm {
 public:
  // A tile of x [B, 64] times the norm's weights of its columns. All that multiply meet.
  __device__ __forceinline__ void weigh(unsigned char* tile, const unsigned char* weights) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (!exists(i)) continue;
      const int row = this->row(i), place = chunk(i) % kRowChunks;
      T* const x = reinterpret_cast<T*>(tile) + chunk(i) * kNumbers;
      float numbers[kNumbers], factors[kNumbers];
      load(numbers, x);
      load(factors, reinterpret_cast<const T*>(weights) + (place ^ row % kRowChunks) * kNumbers);  // tiles are swizzled
#pragma unroll
      for (int j = 0; j < kNumbers; ++j) {
        squares_[i] += numbers[j] * numbers[j];
        numbers[j] *= factors[j];
      }
      store(x, numbers);
    }
    fence_async();  // for wgmma, and before the next tile comes
    sync_threads(kWeighed, kMultiplying);
  }

  // Calls f(row of x, sum of squares over this block's columns) once for each row.
  template <class F>
  __device__ __forceinline__ void each_row(const F& f) const {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      float sum = squares_[i];
#pragma unroll
      for (int offset = 1; offset < kRowChunks; offset *= 2) sum += __shfl_xor_sync(~0u, sum, offset);
      if (exists(i) && chunk(i) % kRowChunks == 0) f(row(i), sum);
    }
  }

 private:
  static constexpr int kWeighed = 2;  // a barrier
  static constexpr int kNumbers = 8, kRowChunks = kTile / kNumbers;  // numbers of 16 bytes, and how many of these a row has
  static constexpr int kOwn = ceil_div(kB * kRowChunks, kMultiplying);

  __device__ __forceinline__ static int chunk(int i) { return static_cast<int>(threadIdx.x) + i * kMultiplying; }
  __device__ __forceinline__ static int row(int i) { return chunk(i) / kRowChunks; }
  __device__ __forceinline__ static bool exists(int i) { return chunk(i) < kB * kRowChunks; }

  float squares_[kOwn] = {};
};

}  // namespace hylo::skinny_linear
