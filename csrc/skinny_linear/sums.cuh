// From what the blocks of a cluster have summed over their parts of K to y. Each finishes some rows of it, of which all
// send it their sums; it adds them in the order of the blocks, whoever came first, so that the same inputs give the same
// bits. What comes behind is made of these sums: an activation of two, a residual added, or a token of a convolution.
#pragma once

#include "common/activation.cuh"
#include "common/divider.cuh"
#include "common/dtype.cuh"
#include "skinny_linear/loader.cuh"
#include "skinny_linear/norm.cuh"

namespace hylo::skinny_linear {

template <class T, int kB, bool kConvolves>
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
  __device__ __forceinline__ void fetch_beside() { fetch(thread_); }

  // Accumulators, as wgmma.cuh has them: columns are rows of x.
  __device__ __forceinline__ void run(const float (&d)[kB / 2], const Norm<T, kB>& norm) {
    if (p_.cluster == 1) {
      sync_threads(kSummed, kMultiplying);  // all have read the stages, where sums come to
      each_quad(d, [&](int pair, const float (&quad)[kQuad]) { store(place(0, pair, own_slot()), quad); });
      each_square(norm, [&](int row, float sum) { shared_.squares[row] = sum; });
      sync_threads(kSummed, kMultiplying);
    } else {
      cluster_wait();
      each_square(norm, [&](int row, float sum) {
        const int to = row / 2 / p_.by_share;
        shared_.sums.send(square(part_.rank, row - 2 * to * p_.share), to, sum);
      });
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
  using Window = Vector<T, kTaps>;

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

  // Calls f(row of x, its sum of squares) for rows of pairs that are there.
  template <class F>
  __device__ __forceinline__ void each_square(const Norm<T, kB>& norm, const F& f) const {
    if (p_.norm == nullptr) return;
    norm.each_row([&](int row, float sum) {
      if (row / 2 * 2 < p_.batch) f(row, sum);
    });
  }

  // A block's sum of squares, of one of the rows that are finished here.
  __device__ __forceinline__ float* square(int block, int row) const {
    return shared_.squares + 2 * block * p_.share + row;
  }

  // What the norm divides such a row by, inverted.
  __device__ __forceinline__ float inverse_root(int row) const {
    float sum = 0.0f;
    for (int block = 0; block < p_.cluster; ++block) sum += *square(block, row);
    return rsqrtf(sum * p_.per_width + p_.eps);
  }

  // Of a block's sums, of one of the pairs that are finished here.
  __device__ __forceinline__ float* place(int block, int pair, int slot) const {
    return sums_ + ((block * p_.share + pair) * kSlots + slot) * kQuad;
  }

  // Of the quads that are finished here, neighbours have neighbouring slots.
  __device__ __forceinline__ int pair_of(int quad) const { return quad >> slots_shift_; }
  __device__ __forceinline__ int slot_of(int quad) const { return quad & ((1 << slots_shift_) - 1); }

  // Calls f(i, row, column) of y for each number of a quad that is there.
  template <class F>
  __device__ __forceinline__ void each_number(int quad, const F& f) const {
    if (quad >= quads_) return;
    const int first_row = 2 * (part_.rank * p_.share + pair_of(quad)), slot = slot_of(quad);
    const int first_column = first_column_ + slot / 8 * 16 + slot % 8;
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      const int row = first_row + i % 2, column = first_column + i / 2 * 8;
      if (row < p_.batch && column < p_.columns) f(i, row, column);
    }
  }

  __device__ __forceinline__ T* output(int row, int column) const {
    return static_cast<T*>(p_.y) + static_cast<long long>(row) * p_.columns + column;
  }

  // What the outputs of a quad need beside their sums.
  struct Beside {
    float residual[kQuad] = {};
    Window windows[kQuad] = {}, taps[2] = {};
  };

  __device__ __forceinline__ void fetch(int quad) {
    if (!p_.adds && !kConvolves) return;
    each_number(quad, [&](int i, int row, int column) {
      if (p_.adds) r_beside_.residual[i] = to_float(*output(row, column));
      if (!convolves(column)) return;
      r_beside_.windows[i] = *window(row, column);
      if (i % 2 == 0) r_beside_.taps[i / 2] = static_cast<const Window*>(p_.conv_weight)[column];
    });
  }

  __device__ __forceinline__ bool convolves(int column) const { return kConvolves && column < p_.channels; }

  // The last inputs of an output's convolution.
  __device__ __forceinline__ Window* window(int row, int column) const {
    return static_cast<Window*>(p_.conv_state) + (row * (p_.conv_b / kTaps) + column);
  }

  // One token of the convolution: the oldest input leaves.
  __device__ __forceinline__ float convolve(Window inputs, const Window& taps, int row, int column,
                                            float newest) const {
#pragma unroll
    for (int i = 1; i < kTaps; ++i) inputs.values[i - 1] = inputs.values[i];
    from_float(inputs.values[kTaps - 1], newest);
    *window(row, column) = inputs;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kTaps; ++i) sum += to_float(inputs.values[i]) * to_float(taps.values[i]);
    return p_.silu ? silu(sum) : sum;
  }

  // All are on their way together.
  __device__ __forceinline__ void add_up(float (&out)[kQuad], int pair, int slot, const float (&scale)[2]) const {
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
#pragma unroll
    for (int i = 0; i < kQuad; ++i) out[i] *= scale[i % 2];
  }

  __device__ __forceinline__ void finish() {
#pragma unroll 1
    for (int quad = thread_; quad < quads_; quad += kMultiplying) {
      const Beside beside = r_beside_;
      fetch(quad + kMultiplying);
      float out[kQuad];
      const int pair = pair_of(quad), slot = slot_of(quad);
      float scale[2] = {1.0f, 1.0f};
      if (p_.norm != nullptr) {
#pragma unroll
        for (int i = 0; i < 2; ++i) scale[i] = inverse_root(2 * pair + i);
      }
      add_up(out, pair, slot, scale);
      if (p_.swiglu) {
        float up[kQuad];
        add_up(up, pair, slot + kSlots / 2, scale);
#pragma unroll
        for (int i = 0; i < kQuad; ++i) out[i] = silu(out[i]) * up[i];
      }
      each_number(quad, [&](int i, int row, int column) {
        if (p_.adds) out[i] += beside.residual[i];
        if (convolves(column)) out[i] = convolve(beside.windows[i], beside.taps[i / 2], row, column, out[i]);
        from_float(*output(row, column), out[i]);
      });
    }
  }

  const Params& p_;
  const Part part_;
  const int thread_, slots_shift_, first_column_, quads_;
  float* const sums_;
  Shared& shared_;
  Beside r_beside_;
};

}  // namespace hylo::skinny_linear
