// From what the blocks of a cluster have summed over their parts of K to y. Each finishes some rows of it, of which all
// send it their sums; it adds them in the order of the blocks, whoever came first, so that the same inputs give the same
// bits.
#pragma once

#include "common/activation.cuh"
#include "common/divider.cuh"
#include "common/dtype.cuh"
#include "skinny_linear/loader.cuh"

namespace hylo::skinny_linear {

template <class T, int kB>
class Sums {
 public:
  __device__ __forceinline__ Sums(const Params& p, const Part& part, float* sums, Shared& shared)
      : p_(p),
        part_(part),
        thread_(static_cast<int>(threadIdx.x)),
        quads_shift_(p.swiglu ? 4 : 5),
        first_column_(part.tile * (p.swiglu ? kTile : kOutputs)),
        quads_(part.rows(p) << quads_shift_),
        sums_(sums),
        shared_(shared) {}

  // While the products are made.
  __device__ __forceinline__ void fetch_residual() { fetch(thread_); }

  // Accumulators, as wgmma.cuh has them: columns are rows of x.
  __device__ __forceinline__ void run(const float (&d)[kB / 2]) {
    if (p_.cluster == 1) {
      sync_threads(kSummed, kMultiplying);  // all have read the stages, where sums come to
      each_sum(d, [&](int b, int output, float sum) { *place(0, b, output) = sum; });
      sync_threads(kSummed, kMultiplying);
    } else {
      cluster_wait();
      each_sum(d, [&](int b, int output, float sum) {
        const int to = b / p_.by_share;
        shared_.sums.send(place(part_.rank, b - to * p_.share, output), to, sum);
      });
      shared_.sums.await();
    }
    finish();
  }

 private:
  static constexpr int kSummed = 1;  // a barrier

  // Calls f(row of x, output of the block, sum).
  template <class F>
  __device__ __forceinline__ void each_sum(const float (&d)[kB / 2], const F& f) const {
    const int row = 2 * (thread_ % 4), output = thread_ / 32 * 16 + thread_ % 32 / 4;
#pragma unroll
    for (int j = 0; j < kB / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int b = 8 * j + row + e;
        if (b >= p_.batch) continue;
#pragma unroll
        for (int r = 0; r < 2; ++r) f(b, output + 8 * r, d[4 * j + 2 * r + e]);
      }
    }
  }

  // Of a block's sums, those of one of the rows that are finished here.
  __device__ __forceinline__ float* place(int block, int row, int output) const {
    return sums_ + (block * p_.share + row) * kRowStride + output;
  }

  // Four neighbours of y, of which there are as many in a row as threads take at once.
  __device__ __forceinline__ int row_of(int quad) const { return quad >> quads_shift_; }
  __device__ __forceinline__ int output_of(int quad) const { return 4 * (quad & ((1 << quads_shift_) - 1)); }
  __device__ __forceinline__ bool exists(int quad) const {
    return quad < quads_ && first_column_ + output_of(quad) < p_.columns;
  }
  __device__ __forceinline__ T* address(int quad) const {
    const long long row = part_.rank * p_.share + row_of(quad);
    return static_cast<T*>(p_.y) + row * p_.columns + first_column_ + output_of(quad);
  }

  __device__ __forceinline__ void fetch(int quad) {
    if (p_.adds && exists(quad)) load(r_residual_, address(quad));
  }

  // All are on their way together.
  __device__ __forceinline__ void add_up(float (&out)[4], int row, int output) const {
    float parts[kMaxCluster][4];
#pragma unroll
    for (int block = 0; block < kMaxCluster; ++block) {
      if (block < p_.cluster) load(parts[block], place(block, row, output));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = parts[0][i];
#pragma unroll
    for (int block = 1; block < kMaxCluster; ++block) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[i] = block < p_.cluster ? out[i] + parts[block][i] : out[i];
    }
  }

  __device__ __forceinline__ void finish() {
#pragma unroll 1
    for (int quad = thread_; quad < quads_; quad += kMultiplying) {
      float out[4], residual[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) residual[i] = r_residual_[i];
      fetch(quad + kMultiplying);
      if (!exists(quad)) continue;
      add_up(out, row_of(quad), output_of(quad));
      if (p_.swiglu) {
        float up[4];
        add_up(up, row_of(quad), kTile + output_of(quad));
#pragma unroll
        for (int i = 0; i < 4; ++i) out[i] = silu(out[i]) * up[i];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) out[i] = p_.adds ? residual[i] + out[i] : out[i];
      store(address(quad), out);
    }
  }

  const Params& p_;
  const Part part_;
  const int thread_, quads_shift_, first_column_, quads_;
  float* const sums_;
  Shared& shared_;
  float r_residual_[4] = {};
};

}  // namespace hylo::skinny_linear
