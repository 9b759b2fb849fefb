// Everything of a chunk that needs no state, in fp32: A = (I + L)^-1 with L = strictly lower(beta D * k k^T), P A with
// P = lower(D * q k^T), and what tokens are multiplied with. Passes take P A for P: P Vn = P A X goes along with A X.
#pragma once

#include "common/fp32_product.cuh"
#include "gated_delta_rule/chunks.cuh"
#include "gated_delta_rule/fp32_params.h"
#include "gated_delta_rule/fp32_traits.cuh"

namespace hylo::gated_delta_rule::fp32_chunk {

constexpr double kLog2E = 1.4426950408889634;

// Rows of 64 floats, see Factor.
struct Factors {
  float* data;

  __device__ __forceinline__ float& at(Factor which, int token) const { return data[which * kChunk + token]; }

  // What is left at token i of what token j wrote, or what remains at the former of the state at the latter.
  __device__ __forceinline__ float decay(int i, int j) const {
    return exp2f((at(kDecayHigh, i) - at(kDecayHigh, j)) + (at(kDecayLow, i) - at(kDecayLow, j)));
  }
};

// A chunk's rows of q or k: those of the slice of columns from `first` on.
__device__ __forceinline__ void copy_tokens(const Tile<kSlice>& to, const Rows& rows, const Chunk& chunk, int head,
                                            int first, int columns) {
  const float* from = rows.at + chunk.batch * rows.strides[0] + chunk.begin * rows.strides[1] + head * rows.strides[2];
  copy_rows<kChunk, kSlice>(to, from + first, rows.strides[1], chunk.tokens, columns - first);
}

// d += [k; q] k^T of a chunk, slice by slice through `shared`.
__device__ __forceinline__ void multiply_tokens(Part<kPair, kChunk>& d, const Params& p, const Chunk& chunk, int head,
                                                const Tile<kSlice>& shared) {
  const int key_head = head / p.common.group;
  for (int first = 0; first < p.common.keys; first += kSlice) {
    copy_tokens(shared.block(0, 0), p.k, chunk, key_head, first, p.common.keys);
    copy_tokens(shared.block(kChunk, 0), p.q, chunk, key_head, first, p.common.keys);
    await_copies();
    __syncthreads();
    multiply_add<kAlongSum, kAlongSum, kSlice>(d, shared, shared);
    __syncthreads();
  }
}

class Inverse {
 public:
  // shared: inverse_shared() bytes.
  __device__ __forceinline__ Inverse(const Params& p, float* shared)
      : p_(p),
        tokens_{shared},
        lower_{shared + kPair * kSlice},
        scores_{lower_.data + kChunk * kChunk},
        join_{scores_.data + kChunk * kChunk},
        factors_{join_.data + kJoin * kJoin} {}

  // One chunk and head.
  __device__ __forceinline__ void run(int index, int head) {
    const Chunk chunk = chunk_at(p_.common, index);
    if (chunk.tokens == 0) return;
    load_gates(chunk, head);
    Part<kPair, kChunk> products;
    products.clear();
    multiply_tokens(products, p_, chunk, head, tokens_);
    sum_gates();
    write_products(products);
    __syncthreads();
    invert_diagonal();
    join_blocks();
    float* record = p_.records + (static_cast<long long>(index) * p_.common.heads + head) * kRecordLength;
    write_record(record);
  }

 private:
  // Where the gates' sums are made of them.
  __device__ __forceinline__ void load_gates(const Chunk& chunk, int head) const {
    const int t = threadIdx.x;
    if (t >= kChunk) return;
    const long long row = static_cast<long long>(chunk.batch) * p_.common.tokens + chunk.begin + t;
    const long long at = row * p_.common.heads + head;
    factors_.at(kBeta, t) = t < chunk.tokens ? p_.common.beta[at] : 0.0f;
    factors_.at(kToEnd, t) = t < chunk.tokens ? fmaxf(p_.common.g[at], kEmptiesState) : 0.0f;
  }

  // In float64: float32 sums cost as much accuracy as all the rest. The sums are there for all threads on return,
  // kToEnd is not yet.
  __device__ __forceinline__ void sum_gates() const {
    const int t = threadIdx.x;
    double through = 0.0;
    if (t < kChunk) {
      for (int j = 0; j <= t; ++j) through += static_cast<double>(factors_.at(kToEnd, j)) * kLog2E;
      const float high = static_cast<float>(through);
      factors_.at(kDecayHigh, t) = high;
      factors_.at(kDecayLow, t) = static_cast<float>(through - high);
      factors_.at(kFromStart, t) = exp2f(high + factors_.at(kDecayLow, t));
    }
    __syncthreads();
    if (t < kChunk) factors_.at(kToEnd, t) = factors_.decay(kChunk - 1, t);
  }

  // L, with a diagonal of zeros, and P.
  __device__ __forceinline__ void write_products(Part<kPair, kChunk>& products) const {
    products.each_row([&](int row, float(&x)[4]) {
      const int i = row % kChunk, first = products.column();
      const bool keys = row < kChunk;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const bool there = keys ? i > first + c : i >= first + c;
        x[c] = there ? x[c] * factors_.decay(i, first + c) * (keys ? factors_.at(kBeta, i) : 1.0f) : 0.0f;
      }
      store(&(keys ? lower_ : scores_).at(i, first), x);
    });
  }

  // The inverse grows in place of L. First its two blocks on the diagonal, by forward substitution: a thread a column.
  __device__ __forceinline__ void invert_diagonal() const {
    const int column = threadIdx.x % kJoin, start = threadIdx.x / kJoin * kJoin;
    const bool solves = threadIdx.x < kChunk;
    float a[kJoin];
    if (solves) {
#pragma unroll
      for (int i = 0; i < kJoin; ++i) {
        float sums[4] = {i == column ? 1.0f : 0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int j = 0; j < i; j += 4) {  // L is zero from column i on
          float row[4];
          load(row, &lower_.at(start + i, start + j));
#pragma unroll
          for (int c = 0; c < 4 && j + c < i; ++c) sums[c] -= row[c] * a[j + c];
        }
        a[i] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
      }
    }
    __syncthreads();
    if (solves) {
#pragma unroll
      for (int i = 0; i < kJoin; ++i) lower_.at(start + i, start + column) = a[i];
    }
    __syncthreads();
  }

  // (I + [L11 0; L21 L22])^-1 = [A11 0; -A22 L21 A11, A22]
  __device__ __forceinline__ void join_blocks() const {
    const auto below = lower_.block(kJoin, 0);
    Part<kJoin, kJoin> d;
    d.clear();
    multiply_add<kAlongSum, kAlongOwn, kJoin>(d, below, lower_);
    d.each_row([&](int row, float(&x)[4]) { store(&join_.at(row, d.column()), x); });
    __syncthreads();
    d.clear();
    multiply_add<kAlongSum, kAlongOwn, kJoin>(d, lower_.block(kJoin, kJoin), join_);
    d.scale(-1.0f);
    d.each_row([&](int row, float(&x)[4]) { store(&below.at(row, d.column()), x); });
    __syncthreads();
  }

  __device__ __forceinline__ void write_record(float* record) const {
    Part<kChunk, kChunk> d;
    d.clear();
    multiply_add<kAlongSum, kAlongOwn, kChunk>(d, scores_, lower_);
    d.each_row([&](int row, float(&x)[4]) { store(record + kRecordScores + row * kChunk + d.column(), x); });
    each_four<kChunk, kChunk>([&](int row, int column) {
      float x[4];
      load(x, &lower_.at(row, column));
      store(record + kRecordInverse + row * kChunk + column, x);
    });
    for (int i = threadIdx.x; i < kFactorsLength; i += kThreads) record[kRecordFactors + i] = factors_.data[i];
  }

  const Params& p_;
  const Tile<kSlice> tokens_;  // keys, below them queries
  const Tile<kChunk> lower_, scores_;
  const Tile<kJoin> join_;
  const Factors factors_;
};

}  // namespace hylo::gated_delta_rule::fp32_chunk
