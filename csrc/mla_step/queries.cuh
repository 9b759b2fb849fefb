// Queries in latent space, latent[h] = W_uk[h]^T q_nope[h], as latent^T = W_uk^T q_nope^T: the product's 16 rows are
// columns of the weights, its 8 columns query rows, so that one sequence's few heads fill them.
//
// Which number of the sum, and which row, stands where is free, as long as both factors agree. A lane takes four
// neighbouring rows of the weights and eight columns: it reads 16 bytes at once, a warp whole lines, and each lane ends
// with eight neighbouring numbers of the latent.
#pragma once

#include "common/dependent.cuh"
#include "common/packed.cuh"
#include "mla_step/machine.cuh"
#include "mla_step/rows.cuh"

namespace hylo::mla_step {

template <class T, int kNope>
class Absorber {
 public:
  __device__ __forceinline__ Absorber(const QueriesParams& p, int warp)
      : p_(p),
        task_(p.share, warp),
        group_(static_cast<int>(threadIdx.x) % 32 / 4),
        turn_(static_cast<int>(threadIdx.x) % 4),
        column_(task_.part() * kColumns + 8 * group_),
        weights_(static_cast<const T*>(p.weights) + task_.head() * p.weights_h) {}

  // Before the kernel ahead has ended, which may be one that makes the weights.
  __device__ __forceinline__ void prefetch_weights() const {
    const T* const column = weights_ + task_.part() * kColumns;
    for (int n = static_cast<int>(threadIdx.x) % 32; n < kNope; n += 32) prefetch(column + n * p_.weights_n);
  }

  __device__ __forceinline__ void run() const {
    Word r_weights[kSteps][kTiles][4];
    load_weights(r_weights);
    for (int tile = task_.first(); tile < task_.last(); ++tile) {
      const Row row = task_.row(tile, group_);
      const T* const q =
          static_cast<const T*>(p_.q_nope) + row.b * p_.q_nope_b + row.head * p_.q_nope_h + 4 * turn_;
      Vector<Word, 2> r_q[kSteps] = {};
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if (row.exists) r_q[step] = *reinterpret_cast<const Vector<Word, 2>*>(q + step * kStep);
      }
      float sums[kTiles][4] = {};
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          multiply<T>(sums[i], r_weights[step][i], r_q[step].values[0], r_q[step].values[1]);
        }
      }
      write(tile, sums);
    }
  }

 private:
  static constexpr int kSteps = kNope / kStep, kTiles = kColumns / 16;

  // Two neighbouring columns of four rows are a lane's part of a tile of the transposed weights.
  __device__ __forceinline__ void load_weights(Word (&out)[kSteps][kTiles][4]) const {
    const bool exists = column_ < p_.rank;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      Words rows[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const long long n = step * kStep + 4 * turn_ + j;
        rows[j] = {};
        if (exists) rows[j] = load_words(weights_ + n * p_.weights_n + column_);
      }
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        out[step][i][0] = lower_halves(rows[0].at[i], rows[1].at[i]);
        out[step][i][1] = upper_halves(rows[0].at[i], rows[1].at[i]);
        out[step][i][2] = lower_halves(rows[2].at[i], rows[3].at[i]);
        out[step][i][3] = upper_halves(rows[2].at[i], rows[3].at[i]);
      }
    }
  }

  __device__ __forceinline__ static Word lower_halves(Word first, Word second) {
    return (first & 0xffffu) | second << 16;
  }
  __device__ __forceinline__ static Word upper_halves(Word first, Word second) {
    return first >> 16 | (second & 0xffff0000u);
  }

  __device__ __forceinline__ void write(int tile, const float (&sums)[kTiles][4]) const {
    if (column_ >= p_.rank) return;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const Row row = task_.row(tile, 2 * turn_ + e);
      float values[2 * kTiles];
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        values[2 * i] = sums[i][e];
        values[2 * i + 1] = sums[i][2 + e];
      }
      const long long at = (static_cast<long long>(row.b) * p_.heads + row.head) * p_.rank + column_;
      if (row.exists) store(static_cast<T*>(p_.latent) + at, values);
    }
  }

  const QueriesParams& p_;
  const Task task_;
  const int group_, turn_, column_;
  const T* const weights_;
};

}  // namespace hylo::mla_step
