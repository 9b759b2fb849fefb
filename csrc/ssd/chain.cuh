// A chain of a pass: 64 columns of V of a head, whose state S [V, K] lives in a warpgroup's registers as an accumulator.
// What pass.cuh says of S, chunk by chunk. In the backward also the gradient of a, less what passes between tokens of one
// chunk, since here the states are in fp32: gates after j in its chunk, before i in its own, and of whole chunks between,
// by the tangent, the derivative of S by a where only those decay it (time: the sum of steps from the chunk's start):
//
//   forth: sum over i of from_start_i dO_i . ((time_i S + tangent) c_i), and at a segment's end <dS, tangent>
//          tangent <- whole (tangent + time S)
//   back:  sum over j of to_end_j step_j x_j . ((time - time_j) dS b_j)
#pragma once

#include "common/chunk_store.cuh"
#include "ssd/gates.cuh"
#include "ssd/rows.cuh"

namespace hylo::ssd {

// 64 columns of V of a head.
struct Unit {
  int head, tile;
  __device__ __forceinline__ int column() const { return tile * kTile; }
};

// Units count through the tiles of a head, then through the window's heads; past the last one the last one is done again.
__device__ __forceinline__ Unit unit_at(const Params& p, int index) {
  const int tiles = (p.values + kTile - 1) / kTile, last = p.window.count * tiles - 1;
  const int unit = index < last ? index : last;
  return {p.window.first + unit / tiles, unit % tiles};
}

// One stage of the ring: tiles, and the factors of either chain.
template <Pass kPass, int kK>
struct Stage {
  static constexpr int kWide = kK / kTile;

  unsigned char* base;
  const Slots& slots;

  // Where a tile lies that comes after so many others, of the values and behind those.
  __device__ __forceinline__ unsigned char* tile(int index) const {
    const int halos = index < slots.values ? index + 1 : slots.values;
    return base + index * kTileSize + halos * halo_size(kPass);
  }
  __device__ __forceinline__ unsigned char* values(int chain) const { return tile(slots.values == 1 ? 0 : chain); }
  __device__ __forceinline__ unsigned char* keys(int chain) const {
    return tile(slots.values + (slots.keys == 1 ? 0 : chain) * kWide);
  }
  __device__ __forceinline__ unsigned char* queries(int chain) const {
    return tile(slots.values + (slots.keys + (slots.queries == 1 ? 0 : chain)) * kWide);
  }
  // In the backward: what is multiplied with the queries' results, the values of the pass the other way.
  __device__ __forceinline__ unsigned char* others(int chain) const {
    return tile(slots.values + (slots.keys + slots.queries) * kWide + chain);
  }
  __device__ __forceinline__ float* factors(int chain) const {
    return reinterpret_cast<float*>(base + stage_tiles_size(kPass, kK, slots) + chain * kPassFactorsSize);
  }
};

// d = queries b^T for tiles b of 64 rows x K.
template <class T, int kK>
__device__ __forceinline__ void multiply_queries(float (&d)[32], const unsigned char* queries, const unsigned char* b) {
  const DoubleWord left = wgmma::descriptor_k_major(shared_address(queries));
  const DoubleWord right = wgmma::descriptor_k_major(shared_address(b));
#pragma unroll
  for (int i = 0; i < kK / 16; ++i) {
    const int next = i / 4 * (kTileSize >> 4) + i % 4 * wgmma::kNextKMajor;
    wgmma::product_shared<T, wgmma::kAlongK, wgmma::kAlongK>(d, left + next, right + next, i > 0);
  }
}

// Two numbers, each the sum of two in 16 bits: the first of them, and what it leaves.
template <class T>
__device__ __forceinline__ void split(float low, float high, Word& parts, Word& rests) {
  float low_part, high_part;
  parts = wgmma::pack<T>(low, high);
  wgmma::unpack<T>(parts, low_part, high_part);
  rests = wgmma::pack<T>(low - low_part, high - high_part);
}

template <class T, Pass kPass, int kK>
class Chain {
 public:
  using Inputs = Stage<kPass, kK>;

  // shared: chain_size bytes.
  __device__ __forceinline__ Chain(const Params& p, int index, Unit unit, unsigned char* shared)
      : p_(p), index_(index), unit_(unit), state_(shared), results_(shared + kK / kTile * kTileSize) {}

  static __device__ __forceinline__ unsigned char* weights(unsigned char* shared) {
    return shared + (kK / kTile + 1) * kTileSize;
  }

  // from: a head's [V, K], or null for zeros.
  __device__ __forceinline__ void start(const float* from) {
#pragma unroll
    for (int i = 0; i < kK / 2; ++i) s_[i] = 0.0f;
    if constexpr (kPass == kStates) {
#pragma unroll
      for (int i = 0; i < kK / 2; ++i) tangent_[i] = 0.0f;
    }
    if (from != nullptr) {
      each_pair(s_, from, [](float& low, float& high, const float* at) {
        const float2 both = *reinterpret_cast<const float2*>(at);
        low = both.x, high = both.y;
      });
    }
    if constexpr (kPass == kOutputs) {
      store_state();
      fence_async();
      sync();
    }
  }

  __device__ __forceinline__ void finish(float* to) {
    each_pair(s_, to, [](float low, float high, float* at) { *reinterpret_cast<float2*>(at) = make_float2(low, high); });
  }

  // With the outputs of the chunk, its weights being ready when `ready` is in a phase. What the state gives, and the next
  // state, are under way while those are made.
  __device__ __forceinline__ void run_with_outputs(const Inputs& stage, const Chunk& chunk, float skip, Handover& ready,
                                                   int phase) {
    wgmma::wait<0>();  // again: ptxas does not see it at the end of the last turn, and would wait where the state is
    wgmma::pin(s_);    // scaled
    const Factors factors{stage.factors(index_)};
    float o[32];
    wgmma::fence();
    read_state(o, stage);
    update_state<kWritten>(stage, factors);
    wgmma::wait<1>();
    wgmma::pin(o);
    decay_outputs(o, factors);
    ready.full.wait(phase);
    wgmma::fence();
    read_tokens(o, stage);
    if (threadIdx.x % 128 == 0) await_copies_out<0>();
    wgmma::wait<1>();
    wgmma::pin(s_);
    sync();  // all have read the state, and the outputs before are on their way
    store_state();
    wgmma::wait<0>();
    wgmma::pin(o);
    ready.empty.arrive();
    store_outputs(o, stage.values(index_), skip);
    fence_async();
    sync();
    store_tokens<T, 128>(p_.o, p_.o_at, p_.cu_seqlens != nullptr, chunk, contiguous_stride(p_), unit_.head, p_.values,
                         unit_.column(), results_, threadIdx.x % 128);
  }

  // The state alone. kWeight: what a token's values are added with.
  template <Factor kWeight>
  __device__ __forceinline__ void run(const Inputs& stage) {
    const Factors factors{stage.factors(index_)};
    update_state<kWeight>(stage, factors);
    passed_ *= factors.whole();
    wgmma::wait<0>();
    wgmma::pin(s_);
  }

  // The state, and what its readers owe to the gradient of a: before it changes going forth, where they are the chunk's
  // tokens and the state is of those before them; likewise back.
  template <bool kForth>
  __device__ __forceinline__ void run_and_differentiate(const Inputs& stage) {
    const Factors factors{stage.factors(index_)};
    const float time = factors.row(kTime, kChunk - 1);
    float y[32];  // 64 columns of V x 64 tokens
    wgmma::wait<0>();  // again, as for outputs
    wgmma::pin(s_);
    read_exactly<false, true>(y, s_, stage);
    each_token(y, [&](float& low, float& high, int block, int) {
      const float2 since = factors.columns(kTime, block);
      low *= kForth ? since.x : time - since.x;
      high *= kForth ? since.y : time - since.y;
    });
    if constexpr (kForth) {
      wgmma::pin(y);
      read_exactly<true, false>(y, tangent_, stage);
#pragma unroll
      for (int i = 0; i < kK / 2; ++i) tangent_[i] = factors.whole() * (tangent_[i] + time * s_[i]);
    }
    owed_ += multiply_others<kForth ? kFromStart : kWritten>(y, stage, factors);
    run<kForth ? kWritten : kFromStart>(stage);
  }

  // A warp's part of the gradient of a; with what the last tangent owes to the gradient of the state there, if given.
  __device__ __forceinline__ float all_owed(const float* gradient) {
    if (gradient != nullptr) {
      each_pair(tangent_, gradient, [&](float low, float high, const float* at) {
        const float2 both = *reinterpret_cast<const float2*>(at);
        owed_ += low * both.x + high * both.y;
      });
    }
    float sum = owed_;
#pragma unroll
    for (int away = 16; away > 0; away /= 2) sum += __shfl_xor_sync(kAllLanes, sum, away);
    return sum;
  }

  // Decay over all chunks so far.
  __device__ __forceinline__ float passed() const { return passed_; }

  // Sends the state, in 16 bits, to its place among a direction's.
  __device__ __forceinline__ void leave_state(const TensorMap& states, int chunk) {
    if (threadIdx.x % 128 == 0) await_copies_out<0>();
    sync();
    store_state();
    fence_async();
    sync();
    if (threadIdx.x % 128 == 0) {
#pragma unroll
      for (int i = 0; i < kK / kTile; ++i) {
        copy_box_out(states, state_ + i * kTileSize, i * kTile, unit_.column(), unit_.head - p_.window.first, chunk);
      }
      commit_copies_out();
    }
  }

  __device__ __forceinline__ void sync() const { sync_threads(1 + index_, 128); }

 private:
  __device__ __forceinline__ void read_state(float (&o)[32], const Inputs& stage) const {
    multiply_queries<T, kK>(o, stage.queries(index_), state_);
    wgmma::commit();
  }

  // What the chunk's tokens give, added to o.
  __device__ __forceinline__ void read_tokens(float (&o)[32], const Inputs& stage) const {
    const DoubleWord weights = wgmma::descriptor_k_major(shared_address(Chain::weights(state_)));
    const DoubleWord values = wgmma::descriptor_n_major(shared_address(stage.values(index_)), kTileSize);
#pragma unroll
    for (int i = 0; i < kChunk / 16; ++i) {
      wgmma::product_shared<T, wgmma::kAlongK, wgmma::kAlongMN>(o, weights + i * wgmma::kNextKMajor,
                                                                values + i * wgmma::kNextNMajor, true);
    }
    wgmma::commit();
  }

  static __device__ __forceinline__ void decay_outputs(float (&o)[32], const Factors& factors) {
    const float decay[2] = {factors.row(kFromStart, row_token(0)), factors.row(kFromStart, row_token(1))};
#pragma unroll
    for (int i = 0; i < 32; ++i) o[i] *= decay[i / 2 % 2];
    wgmma::pin(o);
  }

  // Calls f(element, the one behind it, their place in a head's [V, K]) for what this thread has of a state. Places are
  // a fixed distance apart, so that they need no registers of their own.
  template <class Number, class F>
  __device__ __forceinline__ void each_pair(float (&state)[kK / 2], Number* matrix, const F& f) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int value = unit_.column() + 16 * warp_of_four() + lane() / 4 + 8 * row;
      if (value >= p_.values) continue;
      Number* const first = matrix + (static_cast<long long>(value) * p_.width + 2 * (lane() % 4));
#pragma unroll
      for (int block = 0; block < kK / 8; ++block) {
        const int at = 4 * block + 2 * row;
        if (8 * block < p_.width) f(state[at], state[at + 1], first + 8 * block);
      }
    }
  }

  // S <- whole S + (weights values)^T keys, under way on return: each token adds its part of the state at the chunk's end
  // or, going back, of the gradient of the state at its start. Of a segment's end, S <- S + passed (weights values)^T keys.
  template <Factor kWeight>
  __device__ __forceinline__ void update_state(const Inputs& stage, const Factors& factors) {
    add_values(s_, stage, factors, [&](int block) {
      float2 weight = factors.columns(kWeight, block);
      if constexpr (makes_ends(kPass)) weight.x *= passed_, weight.y *= passed_;
      return weight;
    });
  }

  // Weighted values are two numbers of 16 bits each: rounded to one, they were most of a state's error.
  template <class Weight>
  __device__ __forceinline__ void add_values(float (&state)[kK / 2], const Inputs& stage, const Factors& factors,
                                             const Weight& weight) {
    if constexpr (!makes_ends(kPass)) scale(state, factors.whole());
    const DoubleWord b = wgmma::descriptor_n_major(shared_address(stage.keys(index_)), kTileSize);
    Word values[4][4], rests[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      load_transposed(values[i], stage.values(index_) + anew(transposed_row(i)));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 factor = weight(2 * i + half);
#pragma unroll
        for (int r = 2 * half; r < 2 * half + 2; ++r) {
          float low, high;
          wgmma::unpack<T>(values[i][r], low, high);
          split<T>(factor.x * low, factor.y * high, values[i][r], rests[i][r]);
        }
      }
      if (i % 2 == 0) continue;
      wgmma::fence();
#pragma unroll
      for (int j = i - 1; j <= i; ++j) {
        wgmma::product<T, wgmma::kAlongMN>(state, values[j], b + j * wgmma::kNextNMajor, true);
        wgmma::product<T, wgmma::kAlongMN>(state, rests[j], b + j * wgmma::kNextNMajor, true);
      }
    }
    wgmma::commit();
  }

  static __device__ __forceinline__ void scale(float (&state)[kK / 2], float decay) {
#pragma unroll
    for (int i = 0; i < kK / 2; ++i) state[i] *= decay;
    wgmma::pin(state);
  }

  // y = state queries^T, or it is added to y, with a state of fp32 in two parts; kStored: the first of them is in `state_`.
  template <bool kOnto, bool kStored>
  __device__ __forceinline__ void read_exactly(float (&y)[32], const float (&state)[kK / 2], const Inputs& stage) const {
    constexpr int kEach = kStored ? 4 : 2;  // times 16 columns under way: more take more registers than there are
    const DoubleWord queries = wgmma::descriptor_k_major(shared_address(stage.queries(index_)));
    if constexpr (kStored) {
      wgmma::fence();
      multiply_queries<T, kK>(y, state_, stage.queries(index_));
      wgmma::commit();
    }
#pragma unroll
    for (int first = 0; first < kK / 16; first += kEach) {
      Word parts[kEach][4], rests[kEach][4];
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int at = 8 * (first + i) + 2 * r;
          split<T>(state[at], state[at + 1], parts[i][r], rests[i][r]);
        }
      }
      wgmma::fence();
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int step = first + i;
        const DoubleWord columns = queries + step / 4 * (kTileSize >> 4) + step % 4 * wgmma::kNextKMajor;
        if constexpr (!kStored) wgmma::product<T, wgmma::kAlongK>(y, parts[i], columns, kOnto || step > 0);
        wgmma::product<T, wgmma::kAlongK>(y, rests[i], columns, true);
      }
      wgmma::commit();
      wgmma::wait<0>();
      wgmma::pin(y);
    }
  }

  // Calls f(element, the one behind it, block of eight tokens, which of the rows) for an accumulator with tokens along its
  // columns.
  template <class F>
  static __device__ __forceinline__ void each_token(float (&y)[32], const F& f) {
#pragma unroll
    for (int block = 0; block < 8; ++block) {
#pragma unroll
      for (int row = 0; row < 2; ++row) f(y[4 * block + 2 * row], y[4 * block + 2 * row + 1], block, row);
    }
  }

  // The sum over all of weights y^T others.
  template <Factor kWeight>
  __device__ __forceinline__ float multiply_others(float (&y)[32], const Inputs& stage, const Factors& factors) const {
    Word others[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) load_transposed(others[i], stage.others(index_) + transposed_row(i));
    float sum = 0.0f;
    each_token(y, [&](float& low, float& high, int block, int row) {
      const float2 weight = factors.columns(kWeight, block);
      float other_low, other_high;
      wgmma::unpack<T>(others[block / 2][2 * (block % 2) + row], other_low, other_high);
      sum += weight.x * (low * other_low) + weight.y * (high * other_high);
    });
    return sum;
  }

  __device__ __forceinline__ void store_outputs(float (&o)[32], const unsigned char* values, float skip) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Word skipped[4];
      load_matrices(skipped, values + anew(straight_row(i)));
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        float low, high;
        wgmma::unpack<T>(skipped[r], low, high);
        o[8 * i + 2 * r] += skip * low;
        o[8 * i + 2 * r + 1] += skip * high;
      }
      Word packed[4];
      wgmma::pack_operand<T>(packed, o, i);
      store_matrices(results_ + anew(straight_row(i)), packed);
    }
  }

  // An address within a tile, computed anew each time where there are no registers to keep it.
  static __device__ __forceinline__ int anew(int offset) {
    if constexpr (kK > 128) asm volatile("" : "+r"(offset));
    return offset;
  }

  __device__ __forceinline__ void store_state() const {
#pragma unroll
    for (int i = 0; i < kK / 16; ++i) {
      Word packed[4];
      wgmma::pack_operand<T>(packed, s_, i);
      store_matrices(state_ + i / 4 * kTileSize + anew(straight_row(i % 4)), packed);
    }
  }

  const Params& p_;
  const int index_;
  const Unit unit_;
  unsigned char* const state_;    // S in 16 bits: tiles of 64 rows of V x 64 columns of K
  unsigned char* const results_;  // 64 tokens x 64 columns of V
  float passed_ = 1.0f, owed_ = 0.0f;
  float s_[kK / 2], tangent_[kK / 2];
};

}  // namespace hylo::ssd
