// The walk over a sequence's chunks in fp32: a block owns 32 columns of the state S (or of its gradient) of a head, in
// registers, with a copy in shared memory for the product that reads it. With all factors on rows:
//
//   _o:        [R; O] = [K; Q] S   X = beta (V - from_start R)   [Vn; O] = [0; from_start O] + [A; P A] X
//              S = decay S + K^T (to_end Vn)
//   _states:   the same without O
//   _dstates:  R = K dS            dX = [A; P A]^T [to_end R; scale dO]
//              dS = decay dS + [K; Q]^T [-beta from_start dX; scale from_start dO]
//
// What the next chunk needs is asked for as soon as its place in shared memory is free: with two stages, when the
// present one begins.
#pragma once

#include "gated_delta_rule/fp32_inverse.cuh"

namespace hylo::gated_delta_rule::fp32_chunk {

template <Pass kPass, int kK>
class StatePass {
 public:
  // shared: pass_shared(kPass, kK) bytes.
  __device__ __forceinline__ StatePass(const Params& p, float* shared)
      : p_(p),
        stages_(shared),
        solve_{stages_ + kStages * kStageLength},
        state_{solve_.data + kTokenRows * kChunk},
        head_(blockIdx.y),
        first_value_(blockIdx.x * kColumns),
        sequence_(sequence_at(p.common, blockIdx.z)),
        first_chunk_(first_chunk(p.common, blockIdx.z)) {}

  __device__ __forceinline__ void run() {
    const int chunks = chunks_of(sequence_.tokens);
    const long long own = static_cast<long long>(sequence_.index) * p_.common.heads + head_;
    read_first(own);
    const auto at = [&](int turn) { return kPass == kGradients ? chunks - 1 - turn : turn; };
    if (chunks > 0) {
      copy_stage(at(0), 0);
      copy_solve(at(0));
    }
    for (int turn = 0; turn < chunks; ++turn) {
      write_state();
      await_copies();
      __syncthreads();
      const int next = turn + 1 < chunks ? at(turn + 1) : -1;
      if (kStages == 2 && next >= 0) copy_stage(next, turn + 1);
      if constexpr (kPass == kGradients) {
        step_back(stage(turn), at(turn), next);
      } else {
        step(stage(turn), at(turn), next);
      }
      __syncthreads();
      if (kStages == 1 && next >= 0) copy_stage(next, turn + 1);
    }
    if (p_.common.last_state != nullptr) write_states(p_.common.last_state, own);
  }

 private:
  static constexpr int kTokenRows = token_rows(kPass);
  static constexpr int kStages = pass_stages(kPass, kK), kStageLength = stage_length(kPass, kK);

  struct Stage {
    Tile<kK> keys;  // below them queries
    Tile<kColumns> values;
    Factors factors;
  };

  __device__ __forceinline__ Stage stage(int turn) const {
    float* keys = stages_ + turn % kStages * kStageLength;
    float* values = keys + kTokenRows * kK;
    return {{keys}, {values}, {values + value_rows(kPass) * kColumns}};
  }

  __device__ __forceinline__ int columns() const { return p_.common.values - first_value_; }

  // A token's row in a contiguous [B, T, H, V], from this block's columns on.
  __device__ __forceinline__ long long row_at(const Chunk& chunk, int token) const {
    const long long row = static_cast<long long>(chunk.batch) * p_.common.tokens + chunk.begin + token;
    return (row * p_.common.heads + head_) * p_.common.values + first_value_;
  }

  // --- loads, into places that all threads are done with ---

  // Keys and queries, values or the gradient of o, and factors.
  __device__ __forceinline__ void copy_stage(int index, int turn) const {
    const Chunk chunk = chunk_of(sequence_, index);
    const Stage to = stage(turn);
    copy_keys(to.keys, p_.k, chunk);
    if constexpr (kPass != kStates) copy_keys(to.keys.block(kChunk, 0), p_.q, chunk);
    if constexpr (kPass == kGradients) {
      const long long stride = static_cast<long long>(p_.common.heads) * p_.common.values;
      const auto wanted = to.values.block(kChunk, 0);
      copy_rows<kChunk, kColumns>(wanted, p_.d_o + row_at(chunk, 0), stride, chunk.tokens, columns());
    } else {
      const float* from = p_.v.at + chunk.batch * p_.v.strides[0] + chunk.begin * p_.v.strides[1] +
                          head_ * p_.v.strides[2] + first_value_;
      copy_rows<kChunk, kColumns>(to.values, from, p_.v.strides[1], chunk.tokens, columns());
    }
    const float* factors = record(index) + kRecordFactors;
    for (int i = 4 * threadIdx.x; i < kFactorsLength; i += 4 * kThreads) {
      copy_async(to.factors.data + i, factors + i, true);
    }
  }

  __device__ __forceinline__ void copy_keys(const Tile<kK>& to, const Rows& rows, const Chunk& chunk) const {
    const float* from = rows.at + chunk.batch * rows.strides[0] + chunk.begin * rows.strides[1] +
                        head_ / p_.common.group * rows.strides[2];
    copy_rows<kChunk, kK>(to, from, rows.strides[1], chunk.tokens, p_.common.keys);
  }

  __device__ __forceinline__ const float* record(int index) const {
    return p_.records + (static_cast<long long>(first_chunk_ + index) * p_.common.heads + head_) * kRecordLength;
  }

  __device__ __forceinline__ void copy_solve(int index) const {
    copy_rows<kTokenRows, kChunk>(solve_, record(index) + kRecordInverse, kChunk, kTokenRows, kChunk);
  }

  // --- the state ---

  // f(its numbers, where they are in [.., H, K, V]) for what exists of each row, `matrix` counting heads.
  template <class F>
  __device__ __forceinline__ void each_state_row(long long matrix, const F& f) {
    if (s_.column() >= columns()) return;
    const long long first = matrix * p_.common.keys * p_.common.values + first_value_ + s_.column();
    s_.each_row([&](int row, float(&x)[4]) {
      if (row < p_.common.keys) f(x, first + static_cast<long long>(row) * p_.common.values);
    });
  }

  __device__ __forceinline__ void read_first(long long matrix) {
    s_.clear();
    if (p_.common.first_state == nullptr) return;
    each_state_row(matrix, [&](float(&x)[4], long long at) { load(x, p_.common.first_state + at); });
  }

  __device__ __forceinline__ void write_states(float* states, long long matrix) {
    each_state_row(matrix, [&](float(&x)[4], long long at) { store(states + at, x); });
  }

  __device__ __forceinline__ void write_state() {
    s_.each_row([&](int row, float(&x)[4]) { store(&state_.at(row, s_.column()), x); });
  }

  __device__ __forceinline__ long long chunk_matrix(int index) const {
    return static_cast<long long>(first_chunk_ + index) * p_.common.heads + head_;
  }

  // Rows of tokens to a contiguous [B, T, H, V].
  __device__ __forceinline__ void write_row(float* to, const Chunk& chunk, int token, const float (&x)[4]) const {
    const int column = Part<kChunk, kColumns>::column();
    if (token < chunk.tokens && column < columns()) store(to + row_at(chunk, token) + column, x);
  }

  // --- a chunk ---

  __device__ __forceinline__ void step(const Stage& now, int index, int next) {
    const Chunk chunk = chunk_of(sequence_, index);
    if constexpr (kPass == kStates) write_states(p_.states, chunk_matrix(index));

    Part<kTokenRows, kColumns> d;
    d.clear();
    multiply_add<kAlongSum, kAlongOwn, kK>(d, now.keys, state_);
    d.each_row([&](int row, float(&x)[4]) {
      const float from_start = now.factors.at(kFromStart, row % kChunk);
      float v[4];
      if (row < kChunk) load(v, &now.values.at(row, d.column()));
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float kept = from_start * x[c];
        if (row < kChunk) v[c] = now.factors.at(kBeta, row) * (v[c] - kept);
        x[c] = row < kChunk ? 0.0f : kept;
      }
      if (row < kChunk) store(&now.values.at(row, d.column()), v);
    });
    __syncthreads();

    multiply_add<kAlongSum, kAlongOwn, kChunk>(d, solve_, now.values);
    __syncthreads();
    if (next >= 0) copy_solve(next);
    d.each_row([&](int row, float(&x)[4]) {
      if (row < kChunk) {
        if constexpr (kPass == kStates) write_row(p_.written, chunk, row, x);
        const float to_end = now.factors.at(kToEnd, row);
#pragma unroll
        for (int c = 0; c < 4; ++c) x[c] *= to_end;
        store(&now.values.at(row, d.column()), x);
      } else {
#pragma unroll
        for (int c = 0; c < 4; ++c) x[c] *= p_.common.scale;
        write_row(p_.o, chunk, row - kChunk, x);
      }
    });
    __syncthreads();
    update<kChunk>(now);
  }

  __device__ __forceinline__ void step_back(const Stage& now, int index, int next) {
    const Chunk chunk = chunk_of(sequence_, index);
    write_states(p_.dstates, chunk_matrix(index));

    Part<kChunk, kColumns> d;
    const auto wanted = now.values.block(kChunk, 0);
    d.clear();
    multiply_add<kAlongSum, kAlongOwn, kK>(d, now.keys, state_);
    d.each_row([&](int row, float(&x)[4]) {
      const float to_end = now.factors.at(kToEnd, row);
      float gradient[4];
      load(gradient, &wanted.at(row, d.column()));
#pragma unroll
      for (int c = 0; c < 4; ++c) x[c] *= to_end, gradient[c] *= p_.common.scale;
      store(&now.values.at(row, d.column()), x);
      store(&wanted.at(row, d.column()), gradient);
    });
    __syncthreads();

    d.clear();
    multiply_add<kAlongOwn, kAlongOwn, kPair>(d, solve_, now.values);
    __syncthreads();
    if (next >= 0) copy_solve(next);
    d.each_row([&](int row, float(&x)[4]) {
      write_row(p_.dx, chunk, row, x);
      const float from_start = now.factors.at(kFromStart, row), removed = -now.factors.at(kBeta, row) * from_start;
      float gradient[4];
      load(gradient, &wanted.at(row, d.column()));
#pragma unroll
      for (int c = 0; c < 4; ++c) x[c] *= removed, gradient[c] *= from_start;
      store(&now.values.at(row, d.column()), x);
      store(&wanted.at(row, d.column()), gradient);
    });
    __syncthreads();
    update<kPair>(now);
  }

  // S = decay S + tokens^T values, over kSum rows of both.
  template <int kSum>
  __device__ __forceinline__ void update(const Stage& now) {
    s_.scale(now.factors.at(kFromStart, kChunk - 1));
    multiply_add<kAlongOwn, kAlongOwn, kSum>(s_, now.keys, now.values);
  }

  const Params& p_;
  float* const stages_;
  const Tile<kChunk> solve_;  // A, below it P A
  const Tile<kColumns> state_;
  const int head_, first_value_;
  const Sequence sequence_;
  const int first_chunk_;
  Part<kK, kColumns> s_;
};

}  // namespace hylo::gated_delta_rule::fp32_chunk
