// Outputs of heads from those in latent space, o[h] = W_uv[h] latent[h], as o^T = W_uv latent^T. As in queries.cuh,
// what stands where is chosen so that a lane reads 16 bytes at once: it has two neighbouring rows of the weights and,
// of each 32 columns, eight neighbours that two products share.
#pragma once

#include "common/dependent.cuh"
#include "common/packed.cuh"
#include "mla_step/machine.cuh"
#include "mla_step/rows.cuh"

namespace hylo::mla_step {

template <class T, int kR>
class Expander {
 public:
  __device__ __forceinline__ Expander(const ValuesParams& p, int warp)
      : p_(p),
        task_(p.share, warp),
        group_(static_cast<int>(threadIdx.x) % 32 / 4),
        turn_(static_cast<int>(threadIdx.x) % 4) {}

  // The weights are read before attention has ended. All kernels ahead of it have, whoever made the weights: it was
  // not started before those of queries.cuh had waited for them.
  __device__ __forceinline__ void run() const {
    Words r_weights[kChunks][2];
    const int value = task_.part() * kValues + 2 * group_;
    const T* const weights = static_cast<const T*>(p_.weights) + task_.head() * p_.weights_h + value * p_.weights_v;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) r_weights[chunk][e] = load(weights + e * p_.weights_v, chunk);
    }
    await_kernel_before();
    for (int tile = task_.first(); tile < task_.last(); ++tile) {
      float sums[4] = {};
      const Row row = task_.row(tile, group_);
      Words r_latent[kChunks];
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        r_latent[chunk] = {};
        if (row.exists) r_latent[chunk] = load(static_cast<const T*>(p_.latent) + index(row, kR), chunk);
      }
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          const Words &even = r_weights[chunk][0], &odd = r_weights[chunk][1];
          const Word a[4] = {even.at[i], odd.at[i], even.at[i + 1], odd.at[i + 1]};
          multiply<T>(sums, a, r_latent[chunk].at[i], r_latent[chunk].at[i + 1]);
        }
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const Row written = task_.row(tile, 2 * turn_ + e);
        const float pair[2] = {sums[e], sums[2 + e]};
        if (written.exists) store(static_cast<T*>(p_.o) + index(written, p_.values) + value, pair);
      }
    }
  }

 private:
  static constexpr int kChunk = 2 * kStep, kChunks = ceil_div(kR, kChunk);

  // This lane's eight columns of a chunk; zeros beyond the last.
  __device__ __forceinline__ Words load(const T* row, int chunk) const {
    const int column = chunk * kChunk + 8 * turn_;
    return kR % kChunk == 0 || column < kR ? load_words(row + column) : Words{};
  }

  __device__ __forceinline__ long long index(const Row& row, int width) const {
    return (static_cast<long long>(row.b) * p_.heads + row.head) * width;
  }

  const ValuesParams& p_;
  const Task task_;
  const int group_, turn_;
};

}  // namespace hylo::mla_step
