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
        slots_shift_(p.swiglu ? 5 : 6),
        first_column_(part.tile * (p.swiglu ? kTile : kOutputs)),
        quads_(part.pairs(p) << slots_shift_),
        sums_(sums),
        shared_(shared) {}

  // While the products are made.
  __device__ __forceinline__ void fetch_residual() { fetch(thread_); }

  // Accumulators, as wgmma.cuh has them: columns are rows of x.
  __device__ __forceinline__ void run(const float (&d)[kB / 2]) {
    if (p_.cluster == 1) {
      sync_threads(kSummed, kMultiplying);  // all have read the stages, where sums come to
      each_quad(d, [&](int pair, const float (&quad)[kQuad]) { store(place(0, pair, own_slot()), quad); });
      sync_threads(kSummed, kMultiplying);
    } else {
      cluster_wait();
      each_quad(d, [&](int pair, const float (&quad)[kQuad]) {
        const int to = pair / p_.by_share;
        shared_.sums.send(place(part_.rank, pair - to * p_.share, own_slot()), to, quad);
      });
      shared_.sums.await();
    }
    finish();
  }

 private:
  static constexpr int kSummed = 1;  // a barrier

  __device__ __forceinline__ int own_slot() const { return thread_ / 32 * 8 + thread_ % 32 / 4; }

  // Calls f(pair of rows of x, sums of the thread's slot).
  template <class F>
  __device__ __forceinline__ void each_quad(const float (&d)[kB / 2], const F& f) const {
#pragma unroll
    for (int j = 0; j < kB / 8; ++j) {
      const int pair = 4 * j + thread_ % 4;
      const float quad[kQuad] = {d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]};
      if (2 * pair < p_.batch) f(pair, quad);
    }
  }

  // Of a block's sums, of one of the pairs that are finished here.
  __device__ __forceinline__ float* place(int block, int pair, int slot) const {
    return sums_ + ((block * p_.share + pair) * kSlots + slot) * kQuad;
  }

  // Of the quads that are finished here, neighbours have neighbouring slots.
  __device__ __forceinline__ int pair_of(int quad) const { return quad >> slots_shift_; }
  __device__ __forceinline__ int slot_of(int quad) const { return quad & ((1 << slots_shift_) - 1); }

  // Calls f(i, where number i of a quad is in y) for what is there of it.
  template <class F>
  __device__ __forceinline__ void each_number(int quad, const F& f) const {
    if (quad >= quads_) return;
    const int first_row = 2 * (part_.rank * p_.share + pair_of(quad)), slot = slot_of(quad);
    const int column = first_column_ + slot / 8 * 16 + slot % 8;
    T* const at = static_cast<T*>(p_.y) + static_cast<long long>(first_row) * p_.columns + column;
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      const int row = i % 2, right = i / 2 * 8;
      if (first_row + row < p_.batch && column + right < p_.columns) f(i, at + row * p_.columns + right);
    }
  }

  __device__ __forceinline__ void fetch(int quad) {
    if (p_.adds) each_number(quad, [&](int i, const T* y) { r_residual_[i] = to_float(*y); });
  }

  // All are on their way together.
  __device__ __forceinline__ void add_up(float (&out)[kQuad], int pair, int slot) const {
    float parts[kMaxCluster][kQuad];
#pragma unroll
    for (int block = 0; block < kMaxCluster; ++block) {
      if (block < p_.cluster) load(parts[block], place(block, pair, slot));
    }
#pragma unroll
    for (int i = 0; i < kQuad; ++i) out[i] = parts[0][i];
#pragma unroll
    for (int block = 1; block < kMaxCluster; ++block) {
#pragma unroll
      for (int i = 0; i < kQuad; ++i) out[i] = block < p_.cluster ? out[i] + parts[block][i] : out[i];
    }
  }

  __device__ __forceinline__ void finish() {
#pragma unroll 1
    for (int quad = thread_; quad < quads_; quad += kMultiplying) {
      float out[kQuad], residual[kQuad];
#pragma unroll
      for (int i = 0; i < kQuad; ++i) residual[i] = r_residual_[i];
      fetch(quad + kMultiplying);
      add_up(out, pair_of(quad), slot_of(quad));
      if (p_.swiglu) {
        float up[kQuad];
        add_up(up, pair_of(quad), slot_of(quad) + kSlots / 2);
#pragma unroll
        for (int i = 0; i < kQuad; ++i) out[i] = silu(out[i]) * up[i];
      }
      each_number(quad, [&](int i, T* y) { from_float(*y, p_.adds ? residual[i] + out[i] : out[i]); });
    }
  }

  const Params& p_;
  const Part part_;
  const int thread_, slots_shift_, first_column_, quads_;
  float* const sums_;
  Shared& shared_;
  float r_residual_[kQuad] = {};
};

}  // namespace hylo::skinny_linear
