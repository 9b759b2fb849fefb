// Rope on queries and on the new row, which goes into the cache; and how many tokens attention is to see.
#pragma once

#include "common/divider.cuh"
#include "common/scalar.cuh"
#include "mla_step/params.h"
#include "mla_step/traits.cuh"

namespace hylo::mla_step {

// A part of one sequence's numbers: those of all heads' q_rope, then those of its row.
template <class T>
class Appender {
 public:
  __device__ __forceinline__ Appender(const QueriesParams& p, int block)
      : p_(p),
        b_(block / p.by_parts),
        first_((block - static_cast<int>(b_) * p.parts) * kThreads * kElements),
        queries_(p.heads * p.rope) {}

  __device__ __forceinline__ void run() const {
    const long long position = read_index(p_.position.data, p_.position.stride, p_.position.wide, b_);
    if (first_ == 0 && threadIdx.x == 0) count(position);
    const bool has_row = first_ + kThreads * kElements > queries_ && position >= 0 && position < p_.capacity;
    T* const row = has_row ? row_at(static_cast<int>(position)) : nullptr;
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const int at = first_ + i * kThreads + static_cast<int>(threadIdx.x);
      if (at < queries_) {
        rotate_query(at);
      } else if (at - queries_ < p_.row && has_row) {
        append(row, at - queries_);
      }
    }
  }

 private:
  // Padding has no tokens.
  __device__ __forceinline__ void count(long long position) const {
    constexpr long long kMost = 0x7fffffff;
    const long long length = read_index(p_.lengths.data, p_.lengths.stride, p_.lengths.wide, b_);
    p_.counted[b_] = position < 0 ? 0 : static_cast<int>(length < kMost ? length : kMost);
  }

  __device__ __forceinline__ T* row_at(int position) const {
    T* const cache = static_cast<T*>(p_.cache);
    if (p_.table.data == nullptr) return cache + b_ * p_.cache_page + position * p_.cache_token;
    const int page = position / p_.by_page, slot = position - page * p_.page;
    const long long outer = read_index(p_.table.data, 1, p_.table.wide, b_ * p_.table.stride + page);
    return cache + outer * p_.cache_page + slot * p_.cache_token;
  }

  __device__ __forceinline__ void rotate_query(int at) const {
    const int head = at / p_.by_rope, i = at - head * p_.rope;
    const T* const q = static_cast<const T*>(p_.q_rope) + b_ * p_.q_rope_b + head * p_.q_rope_h;
    static_cast<T*>(p_.rotated)[b_ * queries_ + at] = rotated(q, i);
  }

  __device__ __forceinline__ void append(T* row, int column) const {
    const T* const fresh = static_cast<const T*>(p_.kv_new) + b_ * p_.kv_new_b;
    const int i = column - p_.rank;
    row[column] = 0 <= i && i < p_.rope ? rotated(fresh + p_.rank, i) : fresh[column];
  }

  __device__ __forceinline__ T rotated(const T* u, int i) const {
    const int half = p_.rope / 2;
    const bool first = i < half;
    const float other = to_float(u[first ? i + half : i - half]);
    const float cos = read_scalar(p_.cos, b_, i), sin = read_scalar(p_.sin, b_, i);
    T out;
    from_float(out, to_float(u[i]) * cos + (first ? -other : other) * sin);
    return out;
  }

  const QueriesParams& p_;
  const long long b_;
  const int first_, queries_;
};

}  // namespace hylo::mla_step
