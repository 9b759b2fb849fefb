// What a chunk adds to the state, X^T (to_end step B), and back to the gradient of it, dO^T (from_start C).
#pragma once

#include "ssd/plain_gates.cuh"
#include "ssd/plain_tokens.cuh"

namespace hylo::ssd::plain {

// A chunk, slice of V, head and direction. shared: ends_shared() bytes.
template <class T>
class Ends {
 public:
  __device__ __forceinline__ Ends(const Params& p, int index, int slice, int head, Direction direction, float* shared)
      : p_(p),
        index_(index),
        first_value_(slice * kSlice),
        head_(head),
        direction_(direction),
        chunk_(chunk_at(p, index)),
        values_{shared},
        keys_{shared + kTileLength} {}

  __device__ __forceinline__ void run() const {
    if (chunk_.tokens <= 0) return;
    const bool back = direction_ == kBack;
    copy_tokens<T>(values_, back ? p_.d_o : p_.x, chunk_, back ? head_ : head_ / p_.x_group, first_value_, p_.values);
    await_copies();
    weigh_values();
    for (int first = 0; first < p_.width; first += kSlice) {
      const int group = back ? p_.c_group : p_.b_group;
      copy_tokens<T>(keys_, back ? p_.c : p_.b, chunk_, head_ / group, first, p_.width);
      await_copies();
      __syncthreads();
      Square d;
      d.clear();
      multiply_add<kAlongOwn, kAlongOwn, kChunk>(d, values_, keys_);
      write(d, first);
      __syncthreads();
    }
  }

 private:
  // Each thread those that it copied.
  __device__ __forceinline__ void weigh_values() const {
    const Factors factors = factors_of(p_, index_, head_);
    each_four<kChunk, kSlice>([&](int token, int column) {
      const float weight = direction_ == kBack ? factors.at(kFromStart, token)
                                               : factors.at(kStep, token) * factors.at(kToEnd, token);
      float x[4];
      load(x, &values_.at(token, column));
#pragma unroll
      for (int c = 0; c < 4; ++c) x[c] *= weight;
      store(&values_.at(token, column), x);
    });
  }

  __device__ __forceinline__ void write(Square& d, int first) const {
    float* to = p_.states[direction_] + state_at(p_, index_, head_);
    const int column = first + d.column();
    if (column >= p_.width) return;
    d.each_row([&](int row, float(&x)[4]) {
      const int value = first_value_ + row;
      if (value < p_.values) store(to + static_cast<long long>(value) * p_.width + column, x);
    });
  }

  const Params& p_;
  const int index_, first_value_, head_;
  const Direction direction_;
  const Chunk chunk_;
  const SquareTile values_, keys_;
};

}  // namespace hylo::ssd::plain
