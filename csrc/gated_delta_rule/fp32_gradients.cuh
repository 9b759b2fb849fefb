// Everything of the fp32 backward that needs no walk from chunk to chunk. Of each chunk and value head first
//
//   gradients of q k^T:  scale D * dO Vn^T          of k k^T:  -beta D * dX Vn^T, strictly lower
//   dv = beta dX, and the parts of dbeta and dg that go through these two products
//
// then, of each chunk, key head and slice of K, dq and dk out of them, the states h and their gradients dh:
//
//   dq = scale from_start dO h^T + d(q k^T) k
//   dk = to_end Vn dh^T - beta from_start dX h^T + d(q k^T)^T q + (d(k k^T) + its transpose) k
//
// and the other parts of dbeta and dg. A gate's gradient is a sum over all pairs of a token before it and a token at or
// after it, and is summed in this form: a difference of sums cancels.
#pragma once

#include "common/pair_sums.cuh"
#include "common/reduce.cuh"
#include "gated_delta_rule/fp32_inverse.cuh"

namespace hylo::gated_delta_rule::fp32_chunk {

constexpr Word kMinusInfinity = 0xff800000u;  // the bits of a float

// What both kernels know of a chunk.
class ChunkGradients {
 public:
  __device__ __forceinline__ ChunkGradients(const Params& p, int index)
      : p_(p), index_(index), chunk_(chunk_at(p.common, index)) {}

 protected:
  __device__ __forceinline__ long long head_at(int head) const {
    return static_cast<long long>(index_) * p_.common.heads + head;
  }

  // A token's row in a contiguous [B, T, H].
  __device__ __forceinline__ long long token_at(int token, int head) const {
    const long long row = static_cast<long long>(chunk_.batch) * p_.common.tokens + chunk_.begin + token;
    return row * p_.common.heads + head;
  }

  __device__ __forceinline__ void copy_factors(const Factors& to, int head) const {
    const float* from = p_.records + head_at(head) * kRecordLength + kRecordFactors;
    for (int i = 4 * threadIdx.x; i < kFactorsLength; i += 4 * kThreads) copy_async(to.data + i, from + i, true);
  }

  // Columns from `first` on of a contiguous [B, T, H, V].
  template <int kWidth>
  __device__ __forceinline__ void copy_values(const Tile<kWidth>& to, const float* values, int head, int first) const {
    const long long stride = static_cast<long long>(p_.common.heads) * p_.common.values;
    const float* from = values + token_at(0, head) * p_.common.values + first;
    copy_rows<kChunk, kWidth>(to, from, stride, chunk_.tokens, p_.common.values - first);
  }

  // A token's part of the gradients of its gate and strength.
  __device__ __forceinline__ void write_gates(int part, int token, int head, float dg, float dbeta) const {
    if (token >= chunk_.tokens) return;
    const long long at = token_at(token, head);
    const bool resets = __float_as_uint(p_.common.g[at]) == kMinusInfinity;
    p_.dg[part * p_.gates + at] = resets ? 0.0f : dg;
    p_.dbeta[part * p_.gates + at] = dbeta;
  }

  const Params& p_;
  const int index_;
  const Chunk chunk_;
};

// A chunk and value head.
class ScoreGradients : ChunkGradients {
 public:
  // shared: dscores_shared() bytes.
  __device__ __forceinline__ ScoreGradients(const Params& p, int index, int head, float* shared)
      : ChunkGradients(p, index),
        head_(head),
        gradients_{shared},
        written_{shared + kPair * kSlice},
        values_{written_.data + kChunk * kSlice},
        factors_{values_.data + kChunk * kSlice} {}

  __device__ __forceinline__ void run() {
    if (chunk_.tokens == 0) return;
    copy_factors(factors_, head_);
    Part<kPair, kChunk> d, products;  // rows of dX Vn^T and k k^T, then of dO Vn^T and q k^T
    d.clear();
    float dbeta = 0.0f;
    for (int first = 0; first < p_.common.values; first += kSlice) dbeta += sum_values(d, first);
    products.clear();
    multiply_tokens(products, p_, chunk_, head_, gradients_);
    if (threadIdx.x % kTokenThreads == 0) sum_of(0, own_token()) = dbeta;
    write_scores(d, products);
    sum_pairs();
  }

 private:
  static __device__ __forceinline__ int own_token() { return threadIdx.x / kTokenThreads; }

  // These 64 columns of V; returns this token's sum of dX V, and writes dv.
  __device__ __forceinline__ float sum_values(Part<kPair, kChunk>& d, int first) const {
    copy_values(gradients_, p_.dx, head_, first);
    copy_values(gradients_.block(kChunk, 0), p_.d_o, head_, first);
    copy_values(written_, p_.written, head_, first);
    const float* v = p_.v.at + chunk_.batch * p_.v.strides[0] + chunk_.begin * p_.v.strides[1] +
                     head_ * p_.v.strides[2] + first;
    copy_rows<kChunk, kSlice>(values_, v, p_.v.strides[1], chunk_.tokens, p_.common.values - first);
    await_copies();
    __syncthreads();
    multiply_add<kAlongSum, kAlongSum, kSlice>(d, gradients_, written_);
    float dbeta = 0.0f;
    const int token = own_token();
#pragma unroll
    for (int i = 0; i < kSlice / (4 * kTokenThreads); ++i) {
      const int column = 4 * (threadIdx.x % kTokenThreads + kTokenThreads * i);
      float x[4], v[4];
      load(x, &gradients_.at(token, column));
      load(v, &values_.at(token, column));
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        dbeta += x[c] * v[c];
        x[c] *= factors_.at(kBeta, token);
      }
      if (token < chunk_.tokens && first + column < p_.common.values) {
        store(p_.dv + token_at(token, head_) * p_.common.values + first + column, x);
      }
    }
    __syncthreads();
    return sum_neighbours(dbeta);
  }

  // The gradients of both products; what a gate's sums over pairs is left in `pairs`, and dbeta's sums over a row.
  __device__ __forceinline__ void write_scores(Part<kPair, kChunk>& d, Part<kPair, kChunk>& products) const {
    float* scores = p_.d_scores + head_at(head_) * kChunk * kChunk;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = d.first_row() + i;
      float of_scores[4], of_pairs[4], dbeta = 0.0f;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int column = d.column() + c;
        const float decay = row >= column ? factors_.decay(row, column) : 0.0f;
        const bool below = row > column;
        of_scores[c] = row >= column ? p_.common.scale * decay * d.of[1][i][c] : 0.0f;
        const float keys = below ? -decay * d.of[0][i][c] : 0.0f;  // the gradient of beta k k^T
        const float solve = factors_.at(kBeta, row) * keys;
        const float change = below ? keys * products.of[0][i][c] : 0.0f;
        dbeta += change;
        of_pairs[c] = below ? of_scores[c] * products.of[1][i][c] + factors_.at(kBeta, row) * change : 0.0f;
        if (below) solve_at(row, column) = solve_at(column, row) = solve;
        if (row == column) solve_at(row, column) = 0.0f;
      }
      store(scores + row * kChunk + d.column(), of_scores);
      store(&pairs().at(row, d.column()), of_pairs);
      dbeta = d.sum_row(dbeta);
      if (d.column() == 0) sum_of(1, row) = dbeta;
    }
    __syncthreads();
    float* solve = p_.d_solve + head_at(head_) * kChunk * kChunk;
    each_four<kChunk, kChunk>([&](int row, int column) {
      float x[4];
      load(x, &solve_at(row, column));
      store(solve + row * kChunk + column, x);
    });
  }

  // dg of each token out of the pairs (i, j) with i >= t > j.
  __device__ __forceinline__ void sum_pairs() const {
    const float dg = hylo::sum_pairs(pairs(), values_);
    const int token = own_token();
    if (threadIdx.x % kTokenThreads == 0) write_gates(0, token, head_, dg, sum_of(0, token) + sum_of(1, token));
  }

  // Once the values were read, their places are free.
  __device__ __forceinline__ Tile<kSlice> pairs() const { return written_; }
  __device__ __forceinline__ float& solve_at(int row, int column) const { return gradients_.at(row, column); }
  __device__ __forceinline__ float& sum_of(int which, int token) const {
    return values_.at(kTokenThreads + which, token);
  }

  const int head_;
  const Tile<kSlice> gradients_;  // dX, below it dO; later keys, below them queries
  const Tile<kSlice> written_, values_;
  const Factors factors_;
};

// A chunk, key head and slice of K.
class TokenGradients : ChunkGradients {
 public:
  // shared: dqk_shared() bytes.
  __device__ __forceinline__ TokenGradients(const Params& p, int index, int slice, int key_head, float* shared)
      : ChunkGradients(p, index),
        slice_(slice),
        key_head_(key_head),
        gradients_{shared},
        written_{shared + kPair * kColumns},
        h_{written_.data + kChunk * kColumns},
        dh_{h_.data + kSlice * kColumns},
        solve_{shared},
        tokens_{shared + kDqkTile},
        dq_{tokens_.data + kPair * kSlice},
        dk_{dq_.data + kChunk * kSlice},
        factors_{dk_.data + kChunk * kSlice},
        reads_(factors_.data + kFactorsLength),
        writes_(reads_ + kChunk),
        partial_(writes_ + kChunk) {}

  __device__ __forceinline__ void run() {
    if (chunk_.tokens == 0) return;
    copy_tokens(tokens_, p_.k, chunk_, key_head_, slice_ * kSlice, p_.common.keys);
    copy_tokens(tokens_.block(kChunk, 0), p_.q, chunk_, key_head_, slice_ * kSlice, p_.common.keys);
    for (int i = 0; i < p_.common.group; ++i) add_head(key_head_ * p_.common.group + i, i == 0);
    write(p_.dq, dq_);
    write(p_.dk, dk_);
  }

 private:
  using Sum = Part<kChunk, kSlice>;

  __device__ __forceinline__ void add_head(int head, bool first_head) const {
    copy_factors(factors_, head);
    Part<kPair, kSlice> through_state;  // rows of dX h^T, then of dO h^T
    Sum writes;                         // of Vn dh^T
    through_state.clear();
    writes.clear();
    float kept = 0.0f;
    for (int first = 0; first < p_.common.values; first += kColumns) {
      kept += multiply_states(through_state, writes, head, first);
    }
    kept = sum_over_threads<kThreads>(kept, partial_);
    copy_products(head);
    add_scaled(through_state, writes, first_head);
    await_copies();
    __syncthreads();
    sum_gates(head, kept);
    add_products();
    __syncthreads();
  }

  // dq and dk are each thread's own, in shared memory because there are no registers for them beside all else.
  __device__ __forceinline__ void add_products() const {
    const auto queries = tokens_.block(kChunk, 0), d_solve = solve_.block(kChunk, 0);
    Sum sum;
    sum.each_row([&](int row, float(&x)[4]) { load(x, &dq_.at(row, sum.column())); });
    multiply_add<kAlongSum, kAlongOwn, kChunk>(sum, solve_, tokens_);
    sum.each_row([&](int row, float(&x)[4]) { store(&dq_.at(row, sum.column()), x); });
    sum.each_row([&](int row, float(&x)[4]) { load(x, &dk_.at(row, sum.column())); });
    multiply_add<kAlongOwn, kAlongOwn, kChunk>(sum, solve_, queries);
    multiply_add<kAlongSum, kAlongOwn, kChunk>(sum, d_solve, tokens_);
    sum.each_row([&](int row, float(&x)[4]) { store(&dk_.at(row, sum.column()), x); });
  }

  // Over 32 columns of V; returns this thread's part of the sum of h * dh.
  __device__ __forceinline__ float multiply_states(Part<kPair, kSlice>& through_state, Sum& writes, int head,
                                                   int first) const {
    copy_values(gradients_, p_.dx, head, first);
    copy_values(gradients_.block(kChunk, 0), p_.d_o, head, first);
    copy_values(written_, p_.written, head, first);
    copy_state(h_, p_.states, head, first);
    copy_state(dh_, p_.dstates, head, first);
    await_copies();
    __syncthreads();
    multiply_add<kAlongSum, kAlongSum, kColumns>(through_state, gradients_, h_);
    multiply_add<kAlongSum, kAlongSum, kColumns>(writes, written_, dh_);
    float kept = 0.0f;
    each_four<kSlice, kColumns>([&](int row, int column) {
      float a[4], b[4];
      load(a, &h_.at(row, column));
      load(b, &dh_.at(row, column));
#pragma unroll
      for (int c = 0; c < 4; ++c) kept += a[c] * b[c];
    });
    __syncthreads();
    return kept;
  }

  __device__ __forceinline__ void copy_state(const Tile<kColumns>& to, const float* states, int head, int first) const {
    const int row = slice_ * kSlice;
    const long long matrix = head_at(head) * p_.common.keys + row;
    copy_rows<kSlice, kColumns>(to, states + matrix * p_.common.values + first, p_.common.values, p_.common.keys - row,
                                p_.common.values - first);
  }

  // The gradients of q k^T and k k^T, to where states were.
  __device__ __forceinline__ void copy_products(int head) const {
    const long long at = head_at(head) * kChunk * kChunk;
    copy_rows<kChunk, kChunk>(solve_, p_.d_scores + at, kChunk, kChunk, kChunk);
    copy_rows<kChunk, kChunk>(solve_.block(kChunk, 0), p_.d_solve + at, kChunk, kChunk, kChunk);
  }

  // What goes through the states, to dq and dk, and what a gate sees of it to reads_ and writes_.
  __device__ __forceinline__ void add_scaled(const Part<kPair, kSlice>& through_state, const Sum& writes,
                                             bool first_head) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = Sum::first_row() + i;
      const float beta = factors_.at(kBeta, row), from_start = factors_.at(kFromStart, row);
      const float to_end = factors_.at(kToEnd, row);
      float k[4], q[4], dq[4] = {}, dk[4] = {}, read = 0.0f, removed = 0.0f, written = 0.0f;
      load(k, &tokens_.at(row, Sum::column()));
      load(q, &tokens_.at(kChunk + row, Sum::column()));
      if (!first_head) load(dq, &dq_.at(row, Sum::column())), load(dk, &dk_.at(row, Sum::column()));
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float by_query = p_.common.scale * from_start * through_state.of[1][i][c];
        const float by_key = from_start * through_state.of[0][i][c], by_write = to_end * writes.of[0][i][c];
        read += q[c] * by_query;
        removed += k[c] * by_key;
        written += k[c] * by_write;
        dq[c] += by_query;
        dk[c] += by_write - beta * by_key;
      }
      store(&dq_.at(row, Sum::column()), dq);
      store(&dk_.at(row, Sum::column()), dk);
      read = Sum::sum_row(read - beta * removed);
      removed = Sum::sum_row(removed);
      written = Sum::sum_row(written);
      if (Sum::column() == 0) {
        reads_[row] = read;
        writes_[row] = written;
        dbeta_at(row) = -removed;
      }
    }
  }

  // A gate stands between the old state and tokens at or after it, between tokens before it and the new state, and
  // between the two states.
  __device__ __forceinline__ void sum_gates(int head, float kept) const {
    const int token = threadIdx.x;
    if (token >= kChunk) return;
    float dg = factors_.at(kFromStart, kChunk - 1) * kept;
    for (int i = 0; i < kChunk; ++i) dg += i < token ? writes_[i] : reads_[i];
    write_gates(1 + slice_, token, head, dg, dbeta_at(token));
  }

  __device__ __forceinline__ void write(float* to, const Tile<kSlice>& from) const {
    const int heads = p_.common.heads / p_.common.group;
    each_four<kChunk, kSlice>([&](int token, int column) {
      if (token >= chunk_.tokens || slice_ * kSlice + column >= p_.common.keys) return;
      const long long row = static_cast<long long>(chunk_.batch) * p_.common.tokens + chunk_.begin + token;
      float x[4];
      load(x, &from.at(token, column));
      store(to + (row * heads + key_head_) * p_.common.keys + slice_ * kSlice + column, x);
    });
  }

  // In the place of a factor that nothing here needs.
  __device__ __forceinline__ float& dbeta_at(int token) const { return factors_.at(kDecayLow, token); }

  const int slice_, key_head_;
  const Tile<kColumns> gradients_;  // dX, below it dO
  const Tile<kColumns> written_, h_, dh_;
  const Tile<kChunk> solve_;  // in the place of all these: the gradients of q k^T and k k^T
  const Tile<kSlice> tokens_;  // keys, below them queries
  const Tile<kSlice> dq_, dk_;
  const Factors factors_;
  float *const reads_, *const writes_, *const partial_;
};

}  // namespace hylo::gated_delta_rule::fp32_chunk
