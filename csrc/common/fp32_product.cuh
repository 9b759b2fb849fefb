// Matrices of fp32 in shared memory and their products, by all kProductThreads threads of a block, on the CUDA cores.
#pragma once

#include "common/async_copy.cuh"
#include "common/dtype.cuh"
#include "common/portable.h"

namespace hylo {

// Rows of a multiple of 32 numbers, their fours permuted: eight threads side by side that read four numbers each, of
// one row or of every fourth, find them in all the banks.
template <int kWidth>
struct Tile {
  static_assert(kWidth % 32 == 0, "eight fours are permuted among themselves");
  float* data;

  __device__ __forceinline__ float& at(int row, int column) const { return at(row, 0, column); }

  // Row `row` + i, of rows that are permuted alike: i is below 4 where row is a multiple of 4, or 1 where it is even.
  __device__ __forceinline__ float& at(int row, int i, int column) const {
    return data[(row + i) * kWidth + (column ^ (row & 28))];
  }

  // What begins there, both multiples of 32.
  __device__ __forceinline__ Tile block(int row, int column) const { return {data + row * kWidth + column}; }
};

// A thread's part of a result [kHeight, kWidth]: four columns of kRows neighbouring rows, or of several groups of them.
// Loads of 16 bytes take half the time where neighbours (by the lane's first or second bit) want the same: so the first
// bit counts columns and the second rows.
template <int kHeight, int kWidth>
struct Part {
  static_assert(kWidth == 32 || kWidth == 64, "a warp has whole rows");
  static constexpr int kEach = kHeight * kWidth / (4 * kProductThreads);
  static constexpr int kRows = kEach < 4 ? kEach : 4;
  static constexpr int kGroups = kEach / kRows;
  static constexpr int kGroupHeight = kHeight / kGroups;

  float of[kGroups][kRows][4];

  static __device__ __forceinline__ int column() {
    const int at = (threadIdx.x & 1) | (threadIdx.x >> 1 & 14);
    return 4 * (kWidth == 32 ? at & 7 : at);
  }
  static __device__ __forceinline__ int first_row() {
    const int within = threadIdx.x >> 1 & 1, warp = threadIdx.x / 32;
    return kRows * (kWidth == 32 ? 4 * warp + 2 * within + (threadIdx.x >> 4 & 1) : 2 * warp + within);
  }

  // Over the lanes that share rows.
  static __device__ __forceinline__ float sum_row(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    x += __shfl_xor_sync(~0u, x, 4);
    x += __shfl_xor_sync(~0u, x, 8);
    return kWidth == 32 ? x : x + __shfl_xor_sync(~0u, x, 16);
  }

  // f(row, its four numbers)
  template <class F>
  __device__ __forceinline__ void each_row(const F& f) {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) f(group * kGroupHeight + first_row() + i, of[group][i]);
    }
  }

  __device__ __forceinline__ void scale(float factor) {
    each_row([&](int, float(&x)[4]) {
#pragma unroll
      for (int c = 0; c < 4; ++c) x[c] *= factor;
    });
  }

  __device__ __forceinline__ void clear() {
    each_row([](int, float(&x)[4]) {
#pragma unroll
      for (int c = 0; c < 4; ++c) x[c] = 0.0f;
    });
  }
};

// Along which dim the rows of an operand run: that of the sum, or the operand's own.
enum Along { kAlongSum, kAlongOwn };

// Four steps of the sum for kOwn rows or columns of the result.
template <Along kAlong, int kOwn, int kWidth>
__device__ __forceinline__ void load_operand(float (&x)[4][kOwn], const Tile<kWidth>& tile, int own, int sum) {
  if constexpr (kAlong == kAlongOwn) {
#pragma unroll
    for (int s = 0; s < 4; ++s) load(x[s], &tile.at(sum, s, own));
  } else {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      float steps[4];
      load(steps, &tile.at(own, i, sum));
#pragma unroll
      for (int s = 0; s < 4; ++s) x[s][i] = steps[s];
    }
  }
}

// d += a b, over kSum.
template <Along kAlongA, Along kAlongB, int kSum, int kHeight, int kWidth, int kWidthA, int kWidthB>
__device__ __forceinline__ void multiply_add(Part<kHeight, kWidth>& d, const Tile<kWidthA>& a, const Tile<kWidthB>& b) {
  using D = Part<kHeight, kWidth>;
  constexpr int kUnroll = kHeight == 2 * kChunk && kWidth == 64 ? 1 : 4;  // where there are registers to load ahead
#pragma unroll kUnroll
  for (int sum = 0; sum < kSum; sum += 4) {
    float of_b[4][4];
    load_operand<kAlongB>(of_b, b, D::column(), sum);
#pragma unroll
    for (int group = 0; group < D::kGroups; ++group) {
      float of_a[4][D::kRows];
      load_operand<kAlongA>(of_a, a, group * D::kGroupHeight + D::first_row(), sum);
#pragma unroll
      for (int s = 0; s < 4; ++s) {
#pragma unroll
        for (int i = 0; i < D::kRows; ++i) {
#pragma unroll
          for (int c = 0; c < 4; ++c) d.of[group][i][c] += of_a[s][i] * of_b[s][c];
        }
      }
    }
  }
}

// f(row, column) for every four numbers of a [kHeight, kWidth], neighbours by neighbouring threads.
template <int kHeight, int kWidth, class F>
__device__ __forceinline__ void each_four(const F& f) {
  constexpr int kFours = kWidth / 4;
  int first = threadIdx.x;
  asm volatile("" : "+r"(first));  // else addresses that follow from it are kept, for which there are no registers
#pragma unroll 2
  for (int i = first; i < kHeight * kFours; i += kProductThreads) f(i / kFours, i % kFours * 4);
}

// Brings kHeight rows of kWidth numbers, `stride` apart; those beyond `rows` and `columns` become zeros. fp32 is asked
// for and to be awaited; what has 16 bits goes through registers.
template <int kHeight, int kWidth, class T>
__device__ __forceinline__ void copy_rows(const Tile<kWidth>& to, const T* from, long long stride, int rows,
                                          int columns) {
  each_four<kHeight, kWidth>([&](int row, int column) {
    const bool exists = row < rows && column < columns;
    const T* at = exists ? from + row * stride + column : from;
    if constexpr (sizeof(T) == sizeof(float)) {
      copy_async(&to.at(row, column), at, exists);
    } else {
      float x[4] = {};
      if (exists) load(x, at);
      store(&to.at(row, column), x);
    }
  });
}

}  // namespace hylo
