// Outputs and the three gradients of tokens, by one code. With L the decays between tokens, U = step X, S the state
// before a chunk and M the gradient of the one behind it, of each head
//
//   o  = from_start C S^T        + (L * C B^T) U                  + d X
//   dc = from_start dO S         + (L * dO X^T) step B
//   dx = step (to_end B M^T      + (L * C B^T)^T dO)              + d dO
//   db = step (to_end X M        + (L * dO X^T)^T C)
//
// where factors are on rows. A token that reads has c and the gradient of its o, one that writes b and x; the first two
// make rows of tokens that read, the others rows of tokens that write.
#pragma once

#include "common/pair_sums.cuh"
#include "common/reduce.cuh"
#include "ssd/plain_gates.cuh"
#include "ssd/plain_tokens.cuh"

namespace hylo::ssd::plain {

// A chunk, 64 columns of the result, and a head of the result's own: of all heads that share it, one after the other.
template <class T, Role kRole>
class Collect {
 public:
  // shared: collect_shared(kRole) bytes.
  __device__ __forceinline__ Collect(const Params& p, int index, int slice, int owner, float* shared)
      : p_(p),
        index_(index),
        slice_(slice),
        owner_(owner),
        chunk_(chunk_at(p, index)),
        readers_{shared},
        writers_{shared + kTileLength},
        state_{shared + 2 * kTileLength},
        weights_{shared + 3 * kTileLength},
        factors_{shared + 4 * kTileLength},
        partial_(factors_.data + kFactorsLength),
        sum_{partial_ + kThreads / 32} {}

  __device__ __forceinline__ void run() const {
    if (chunk_.tokens <= 0) return;
    for (int i = 0; i < group(); ++i) add_head(owner_ * group() + i, i == 0, i + 1 == group());
  }

 private:
  static constexpr bool kOverKeys = kRole == kO || kRole == kDX;  // scores are c b^T, else dO x^T
  static constexpr bool kOfWriters = kRole == kDX || kRole == kDB;
  static constexpr bool kSumsGates = kRole == kDX || kRole == kDC;

  __device__ __forceinline__ int group() const {
    if constexpr (kRole == kO) return 1;
    return kRole == kDX ? p_.x_group : kRole == kDB ? p_.b_group : p_.c_group;
  }
  __device__ __forceinline__ int columns(bool keys) const { return keys ? p_.width : p_.values; }
  __device__ __forceinline__ int first_column() const { return slice_ * kSlice; }

  // --- loads ---

  __device__ __forceinline__ void copy_readers(bool keys, int head, int first) const {
    copy_tokens<T>(readers_, keys ? p_.c : p_.d_o, chunk_, keys ? head / p_.c_group : head, first, columns(keys));
  }
  __device__ __forceinline__ void copy_writers(bool keys, int head, int first) const {
    copy_tokens<T>(writers_, keys ? p_.b : p_.x, chunk_, head / (keys ? p_.b_group : p_.x_group), first, columns(keys));
  }

  // 64 rows of V and columns of K.
  __device__ __forceinline__ void copy_state(int head, int first_value, int first_key) const {
    const float* from = p_.states[kOfWriters ? kBack : kForth] + state_at(p_, index_, head);
    copy_rows<kSlice, kSlice>(state_, from + static_cast<long long>(first_value) * p_.width + first_key, p_.width,
                              p_.values - first_value, p_.width - first_key);
  }

  __device__ __forceinline__ void copy_factors(int head) const {
    const Factors from = factors_of(p_, index_, head);
    for (int i = 4 * threadIdx.x; i < kFactorsLength; i += 4 * kThreads) {
      copy_async(factors_.data + i, from.data + i, true);
    }
  }

  // --- a head ---

  __device__ __forceinline__ void add_head(int head, bool first_head, bool last_head) const {
    Square scores, d;
    scores.clear();
    d.clear();
    copy_factors(head);
    float kept = 0.0f;
    for (int first = 0; first < columns(kOverKeys); first += kSlice) kept += multiply(scores, d, head, first);
    if constexpr (kRole == kDX) {  // left for sum_gates, since there is no register for it in between
      kept = sum_over_threads<kThreads>(kept, partial_);
      if (threadIdx.x == 0) partial_[0] = kept;
    }
    if constexpr (kOfWriters || kSumsGates) copy_readers(!kOverKeys, head, first_column());
    if constexpr (!kOfWriters || kSumsGates) copy_writers(!kOverKeys, head, first_column());
    write_weights(scores);
    d.each_row([&](int row, float(&x)[4]) {
      const float factor = factors_.at(kOfWriters ? kToEnd : kFromStart, row);
#pragma unroll
      for (int c = 0; c < 4; ++c) x[c] *= factor;
    });
    await_copies();
    __syncthreads();
    if constexpr (kRole == kDC) write_dots(d, sums_row(head, kSums * slices(p_.values) + slice_), readers_, false);
    if constexpr (kRole == kDX) write_dots(d, sums_row(head, kSums * slice_ + kAtEnd), writers_, true);
    multiply_add<kOfWriters ? kAlongOwn : kAlongSum, kAlongOwn, kChunk>(d, weights_, kOfWriters ? readers_ : writers_);
    if constexpr (kRole == kDX) write_dots(d, sums_row(head, kSums * slice_ + kDirect), writers_, false);
    add(d, head, first_head, last_head);
    __syncthreads();
    if constexpr (kRole == kDX) sum_gates(head);
  }

  // Over 64 columns of what the scores are made of. Returns this thread's part of the sum of S * M over them.
  __device__ __forceinline__ float multiply(Square& scores, Square& d, int head, int first) const {
    const int first_value = kOverKeys ? first_column() : first, first_key = kOverKeys ? first : first_column();
    copy_readers(kOverKeys, head, first);
    copy_writers(kOverKeys, head, first);
    copy_state(head, first_value, first_key);
    await_copies();
    __syncthreads();
    multiply_add<kAlongSum, kAlongSum, kSlice>(scores, readers_, writers_);
    multiply_add<kAlongSum, kOverKeys ? kAlongSum : kAlongOwn, kSlice>(d, kOfWriters ? writers_ : readers_, state_);
    float kept = 0.0f;
    if constexpr (kRole == kDX) kept = multiply_states(head, first_value, first_key);
    __syncthreads();
    return kept;
  }

  __device__ __forceinline__ float multiply_states(int head, int first_value, int first_key) const {
    const float* states = p_.states[kForth] + state_at(p_, index_, head);
    float sum = 0.0f;
    each_four<kSlice, kSlice>([&](int row, int column) {
      if (first_value + row >= p_.values || first_key + column >= p_.width) return;
      float s[4], m[4];
      load(s, states + static_cast<long long>(first_value + row) * p_.width + first_key + column);
      load(m, &state_.at(row, column));
#pragma unroll
      for (int c = 0; c < 4; ++c) sum += s[c] * m[c];
    });
    return sum;
  }

  // Rows are tokens that read. Those that write have their step in their column, where rows of the result do not.
  __device__ __forceinline__ void write_weights(Square& scores) const {
    scores.each_row([&](int row, float(&x)[4]) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int column = scores.column() + c;
        const float weight = row >= column ? factors_.decay(row, column) * x[c] : 0.0f;
        x[c] = kOfWriters ? weight : weight * factors_.at(kStep, column);
      }
      store(&weights_.at(row, scores.column()), x);
    });
  }

  // To what the heads before it gave: each thread's own, in shared memory because there are no registers for it beside
  // all else. The last one's sum is the result.
  __device__ __forceinline__ void add(Square& d, int head, bool first_head, bool last_head) const {
    const float skip = kOverKeys ? number_of_head(p_.d, head) : 0.0f;
    d.each_row([&](int row, float(&x)[4]) {
      const float step = kOfWriters ? factors_.at(kStep, row) : 1.0f;
      float before[4] = {}, skipped[4] = {};
      if constexpr (kRole != kO) {
        if (!first_head) load(before, &sum_.at(row, d.column()));
      }
      if constexpr (kOverKeys) load(skipped, &(kOfWriters ? readers_ : writers_).at(row, d.column()));
#pragma unroll
      for (int c = 0; c < 4; ++c) x[c] = before[c] + (step * x[c] + skip * skipped[c]);
      if (last_head) {
        write(row, d.column(), x);
      } else {
        store(&sum_.at(row, d.column()), x);
      }
    });
  }

  __device__ __forceinline__ void write(int row, int column, const float (&x)[4]) const {
    const int width = columns(!kOverKeys);
    if (row >= chunk_.tokens || first_column() + column >= width) return;
    const long long token = static_cast<long long>(chunk_.batch) * p_.tokens + chunk_.begin + row;
    const long long at = (token * (p_.heads / group()) + owner_) * width + first_column() + column;
    store(static_cast<T*>(p_.results[kRole]) + at, x);
  }

  // --- the gates' gradients ---

  __device__ __forceinline__ float* sums_row(int head, int which) const {
    const long long rows = sum_rows(p_.values, p_.width);
    return p_.sums + ((static_cast<long long>(index_) * p_.heads + head) * rows + which) * kChunk;
  }

  // Of each row with the tokens' own, by their step or not.
  __device__ __forceinline__ void write_dots(Square& d, float* to, const SquareTile& own, bool stepped) const {
    d.each_row([&](int row, float(&x)[4]) {
      float y[4], sum = 0.0f;
      load(y, &own.at(row, d.column()));
#pragma unroll
      for (int c = 0; c < 4; ++c) sum += x[c] * y[c];
      sum = Square::sum_row(sum);
      if (d.column() == 0) to[row] = stepped ? factors_.at(kStep, row) * sum : sum;
    });
  }

  // Of dx, when dO and x are there for these columns; all else of shared memory is free afterwards.
  __device__ __forceinline__ void sum_gates(int head) const {
    Square products;  // of dO and x
    products.clear();
    multiply_add<kAlongSum, kAlongSum, kSlice>(products, readers_, writers_);
    float* const skipped = sums_row(head, kSums * slice_ + kSkipped);
    products.each_row([&](int row, float(&x)[4]) {
      float weights[4];
      load(weights, &weights_.at(row, products.column()));  // its own
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int column = products.column() + c;
        if (row == column) skipped[row] = x[c];
        x[c] = row > column ? factors_.at(kStep, column) * weights[c] * x[c] : 0.0f;
      }
      store(&weights_.at(row, products.column()), x);
    });
    __syncthreads();
    const float pairs = sum_pairs(weights_, state_);
    if (threadIdx.x % kTokenThreads == 0) {
      sums_row(head, kSums * slice_ + kPairs)[threadIdx.x / kTokenThreads] = pairs + factors_.whole() * partial_[0];
    }
    __syncthreads();
  }

  const Params& p_;
  const int index_, slice_, owner_;
  const Chunk chunk_;
  const SquareTile readers_, writers_;  // c or dO; b or x
  const SquareTile state_;              // [V, K]: S, or M
  const SquareTile weights_;            // between tokens; then products of pairs
  const Factors factors_;
  float* const partial_;
  const SquareTile sum_;  // over heads; none of o
};

}  // namespace hylo::ssd::plain
