// What one warpgroup does in a pass: 64 columns of V from chunk to chunk. Their state S (or its gradient) lives
// transposed in registers, as an accumulator, and so does all else of the chain: a result, packed to 16 bits, is the
// next product's operand. With all factors of tokens on columns:
//
//   _o, _states:  R^T = S^T K^T      X = beta (V - from_start R)            Vn^T = X^T A^T
//                 S^T = decay S^T + (to_end Vn)^T K
//   _dstates:     R^T = dS^T K^T     Y^T = to_end R^T + scale dO^T P        dX^T = Y^T A
//                 dS^T = decay dS^T + (scale from_start dO)^T Q + (removal dX)^T K
//
// S before each chunk (dS after it) and Vn (handed dX) are handed on through shared memory, while products are under
// way. What Y loses when it is packed is added to dX, as A's diagonal is 1: it is what the gradients of v and beta
// would err by most.
#pragma once

#include "common/chunk_store.cuh"
#include "gated_delta_rule/pipeline.cuh"

namespace hylo::gated_delta_rule {

template <class T, Pass kPass, int kK, int kChains>
class Chain {
 public:
  using Inputs = Stage<kPass, kK, kChains>;

  // shared: handed_size bytes.
  __device__ __forceinline__ Chain(const Params& p, unsigned char* shared)
      : p_(p), tiles_(shared), results_(shared + kK / kTile * kTileSize) {}

  // head: where the head's state begins in [N, H, K, V]; first_value: of the chain's 64 columns.
  __device__ __forceinline__ void start(const float* states, long long head, int first_value) {
#pragma unroll
    for (int i = 0; i < kK / 2; ++i) s_[i] = 0.0f;
    if (states == nullptr) return;
    each_element(head, first_value, [&](float& s, long long at) {
      asm volatile("ld.global.f32 %0, [%1];" : "=f"(s) : "l"(states + at));
    });
  }

  __device__ __forceinline__ void finish(float* states, long long head, int first_value) {
    each_element(head, first_value, [&](float& s, long long at) {
      asm volatile("st.global.f32 [%0], %1;" ::"l"(states + at), "f"(s) : "memory");
    });
  }

  template <class Handing>
  __device__ __forceinline__ void clear_tail(const Inputs& stage, int tokens, const Handing& handing) const {
    // Not by `each_row_from`: at K = 256 its closure takes the one register too many.
    for (int i = threadIdx.x % 128; i < (kChunk - tokens) * 8; i += 128) {
      const int at = wgmma::swizzled(tokens + i / 8, i % 8);
      const auto clear = [&](unsigned char* tile) { *reinterpret_cast<uint4*>(tile + at) = make_uint4(0, 0, 0, 0); };
      for (int tile = 0; tile < kK / kTile; ++tile) {
        clear(stage.keys() + tile * kTileSize);
        if constexpr (kPass == kGradients) clear(stage.queries() + tile * kTileSize);
      }
      clear(stage.values(warpgroup()));
    }
    fence_async();
    handing.sync_chain();
  }

  // A chunk up to the update of the state, which is under way when it returns; its result waits to be handed on. So
  // that nothing waits for it, the state is handed on within.
  template <class Handing>
  __device__ __forceinline__ void run(const Inputs& stage, const Handing& handing) {
    settle();  // again: ptxas does not see it at the end of the last turn, and would wait where the state is scaled
    if constexpr (kPass == kGradients) {
      run_back(stage, handing);
    } else {
      run_forth(stage, handing);
    }
  }

  template <class Handing>
  __device__ __forceinline__ void hand_result(const Handing& handing) const {
    handing.sync(handing.kResultFree);
#pragma unroll
    for (int i = 0; i < 4; ++i) store_transposed(results_ + matrix_row(i), result_[i]);
    fence_async();
    handing.arrive(handing.kResultReady);
  }

  __device__ __forceinline__ void settle() {
    wgmma::wait<0>();
    wgmma::pin(s_);
  }

  // Adds what scale from_start dO lost when it was rounded: half of the error of the initial state's gradient, or all
  // of it where gates are fast.
  __device__ __forceinline__ void add_remainder(const Inputs& stage) {
    Word gradient[4][4], wanted[4][4];
    load_values(stage, gradient);
    scale_packed<true>(wanted, gradient, stage.factors(kFromStart));
    wgmma::fence();
    update_state(wanted, stage.queries());
    settle();
  }

 private:
  // Whether there are registers to load factors while products are under way.
  static constexpr bool kEarly = kK == 64 || (kK == 128 && kPass != kSolvingOutputs);
  // Whether there are registers for the first update of dS while products before it are under way.
  static constexpr bool kAhead = !(kK == 64 && kChains == 1) && !(kK == 128 && kChains == 2);
  // The state is packed and read 64 columns of K at once, by turns in as many sets of registers as there are.
  static constexpr int kSlices = kK / kTile;
  static constexpr int kSets = kK == 256 && kPass == kGradients ? 1 : 2;

  // Factors of this lane's tokens: those of registers 4 block + 2 row + {0, 1} at [block].
  struct Tokens {
    float2 of[8];

    static __device__ __forceinline__ float2 at(const float* factors, int block) {
      return *reinterpret_cast<const float2*>(factors + 8 * block + 2 * (lane() % 4));
    }
    __device__ __forceinline__ void load(const float* factors) {
#pragma unroll
      for (int block = 0; block < 8; ++block) of[block] = at(factors, block);
    }
  };

  static __device__ __forceinline__ int warpgroup() { return threadIdx.x / 128; }
  static __device__ __forceinline__ int warp() { return threadIdx.x / 32 % 4; }

  // Calls f(element, where it is in [N, H, K, V]) for what this thread has of the state.
  template <class F>
  __device__ __forceinline__ void each_element(long long head, int first_value, const F& f) {
    const int value = first_value + warp() * 16 + lane() / 4;
    int key = 2 * (lane() % 4);
    long long at = head + static_cast<long long>(key) * p_.values + value;
#pragma unroll
    for (int block = 0; block < kK / 8; ++block) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (key + e < p_.keys && value + 8 * row < p_.values) {
            f(s_[4 * block + 2 * row + e], at + e * p_.values + 8 * row);
          }
        }
      }
      key += 8;
      at += 8 * p_.values;
      asm volatile("" : "+r"(key), "+l"(at));  // else all addresses come first, and there are no registers for them
    }
  }

  template <class Handing>
  __device__ __forceinline__ void run_forth(const Inputs& stage, const Handing& handing) {
    float r[32];
    read_state(r, stage.keys(), handing);
    Word x[4][4];
    load_values(stage, x);
    Tokens beta, from_start, to_end;
    stage.await_record();
    if constexpr (kEarly) beta.load(stage.factors(kBeta)), from_start.load(stage.factors(kFromStart));
    scale_state(stage.factors(kFromStart)[kChunk - 1]);
    wgmma::wait<0>();
    wgmma::pin(r);

    if constexpr (!kEarly) beta.load(stage.factors(kBeta)), from_start.load(stage.factors(kFromStart));
    solve_for(x, r, beta, from_start);
    wgmma::fence();
    multiply<wgmma::kAlongK>(r, x, stage.inverse());
    wgmma::commit();
    to_end.load(stage.factors(kToEnd));
    wgmma::wait<0>();
    wgmma::pin(r);
    update_state(stage, r, to_end);
    pack(result_, r);
  }

  template <class Handing>
  __device__ __forceinline__ void run_back(const Inputs& stage, const Handing& handing) {
    float y[32], r[32];
    Word gradient[4][4], wanted[4][4];
    load_values(stage, gradient);
    wgmma::fence();
    multiply<wgmma::kAlongMN>(y, gradient, stage.scores());
    wgmma::commit();
    read_state(r, stage.keys(), handing);
    scale_state(stage.factors(kFromStart)[kChunk - 1]);
    scale_packed<false>(wanted, gradient, stage.factors(kFromStart));
    if constexpr (!kAhead) {
      wgmma::wait<0>();
      wgmma::pin(y);
      wgmma::pin(r);
    }
    wgmma::pin(s_);
    wgmma::fence();
    update_state(wanted, stage.queries());
    Tokens handed, removal;
    if constexpr (kAhead) {
      wgmma::wait<1>();
      wgmma::pin(y);
      wgmma::pin(r);
    }

    combine(y, r, stage.factors(kToEnd));
    pack(gradient, y);
    wgmma::fence();
    multiply<wgmma::kAlongMN>(r, gradient, stage.inverse());
    wgmma::commit();
    subtract_packed(y, gradient);
    if constexpr (kK < 256) removal.load(stage.factors(kRemoval));
    wgmma::wait<0>();
    wgmma::pin(r);
    if constexpr (kK == 256) removal.load(stage.factors(kRemoval));
#pragma unroll
    for (int i = 0; i < 32; ++i) r[i] += y[i];
    update_state(stage, r, removal);
    handed.load(stage.factors(kHanded));
    pack_scaled(result_, r, handed);
  }

  // Starts the update of the state with what the chunk solved for, times factors.
  __device__ __forceinline__ void update_state(const Inputs& stage, const float (&r)[32], const Tokens& factors) {
    Word change[4][4];
    pack_scaled(change, r, factors);
    wgmma::pin(s_);
    wgmma::fence();
    update_state(change, stage.keys());
  }

  // d = S^T b^T for tiles b of 64 tokens x 64 columns of K, under way on return; and S is handed on.
  template <class Handing>
  __device__ __forceinline__ void read_state(float (&d)[32], const unsigned char* b, const Handing& handing) const {
    const DoubleWord other = wgmma::descriptor_k_major(shared_address(b));
    Word packed[kSets][4][4];
    const auto pack_slice = [&](int slice) {
#pragma unroll
      for (int i = 0; i < 4; ++i) wgmma::pack_operand<T>(packed[slice % kSets][i], s_, 4 * slice + i);
    };
#pragma unroll
    for (int slice = 0; slice < kSets && slice < kSlices; ++slice) pack_slice(slice);
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      Word(&a)[4][4] = packed[slice % kSets];
      if (slice >= kSets) {
        wgmma::wait<kSets - 1>();
        pack_slice(slice);
      }
      wgmma::fence();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        wgmma::product<T, wgmma::kAlongK>(d, a[i], other + slice * (kTileSize >> 4) + i * wgmma::kNextKMajor,
                                          slice + i > 0);
      }
      wgmma::commit();
      if (slice == 0) handing.sync(handing.kStateFree);
#pragma unroll
      for (int i = 0; i < 4; ++i) store_transposed(tiles_ + slice * kTileSize + matrix_row(i), a[i]);
    }
    fence_async();
    handing.arrive(handing.kStateReady);
  }

  // d = a b^T (_K) or a b (_MN) for a tile b of 64 tokens x 64 tokens.
  template <wgmma::Major kMajor>
  static __device__ __forceinline__ void multiply(float (&d)[32], const Word (&a)[4][4], const unsigned char* tile) {
    const Word address = shared_address(tile);
    const DoubleWord b = kMajor == wgmma::kAlongK ? wgmma::descriptor_k_major(address)
                                                  : wgmma::descriptor_n_major(address, kTileSize);
    constexpr DoubleWord kNext = kMajor == wgmma::kAlongK ? wgmma::kNextKMajor : wgmma::kNextNMajor;
#pragma unroll
    for (int i = 0; i < 4; ++i) wgmma::product<T, kMajor>(d, a[i], b + i * kNext, i > 0);
  }

  // S^T += a b for tiles b of 64 tokens x 64 columns of K; a group of its own.
  __device__ __forceinline__ void update_state(const Word (&a)[4][4], const unsigned char* tiles) {
    const DoubleWord b = wgmma::descriptor_n_major(shared_address(tiles), kTileSize);
#pragma unroll
    for (int i = 0; i < 4; ++i) wgmma::product<T, wgmma::kAlongMN>(s_, a[i], b + i * wgmma::kNextNMajor, true);
    wgmma::commit();
  }

  __device__ __forceinline__ void scale_state(float decay) {
#pragma unroll
    for (int i = 0; i < kK / 2; ++i) s_[i] *= decay;
  }

  static __device__ __forceinline__ void pack(Word (&a)[4][4], const float (&d)[32]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) wgmma::pack_operand<T>(a[i], d, i);
  }

  // What d lost when it was packed, in its place.
  static __device__ __forceinline__ void subtract_packed(float (&d)[32], const Word (&packed)[4][4]) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      float low, high;
      wgmma::unpack<T>(packed[i / 4][i % 4], low, high);
      d[2 * i] -= low;
      d[2 * i + 1] -= high;
    }
  }

  static __device__ __forceinline__ void pack_scaled(Word (&a)[4][4], const float (&d)[32], const Tokens& factors) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float2 factor = factors.of[i / 2];
      a[i / 4][i % 4] = wgmma::pack<T>(factor.x * d[2 * i], factor.y * d[2 * i + 1]);
    }
  }

  // y = scale y + factors r
  __device__ __forceinline__ void combine(float (&y)[32], const float (&r)[32], const float* factors) const {
#pragma unroll
    for (int block = 0; block < 8; ++block) {
      const float2 factor = Tokens::at(factors, block);
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const int at = 4 * block + 2 * row;
        y[at] = p_.scale * y[at] + factor.x * r[at];
        y[at + 1] = p_.scale * y[at + 1] + factor.y * r[at + 1];
      }
    }
  }

  // scale factors in, of packed numbers; or what that loses when it is packed.
  template <bool kRemainder>
  __device__ __forceinline__ void scale_packed(Word (&out)[4][4], const Word (&in)[4][4], const float* factors) const {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float2 factor = Tokens::at(factors, i / 2);
      float low, high;
      wgmma::unpack<T>(in[i / 4][i % 4], low, high);
      low *= p_.scale * factor.x;
      high *= p_.scale * factor.y;
      Word packed = wgmma::pack<T>(low, high);
      if constexpr (kRemainder) {
        float kept_low, kept_high;
        wgmma::unpack<T>(packed, kept_low, kept_high);
        packed = wgmma::pack<T>(low - kept_low, high - kept_high);
      }
      out[i / 4][i % 4] = packed;
    }
  }

  // The transposed tile of values as an operand.
  __device__ __forceinline__ void load_values(const Inputs& stage, Word (&v)[4][4]) const {
    const unsigned char* values = stage.values(warpgroup());
#pragma unroll
    for (int i = 0; i < 4; ++i) load_transposed(v[i], values + matrix_row(i));
  }

  // X = beta (V - from_start R) as an operand, in place of V's.
  static __device__ __forceinline__ void solve_for(Word (&x)[4][4], const float (&r)[32], const Tokens& beta,
                                                   const Tokens& from_start) {
#pragma unroll
    for (int block = 0; block < 8; ++block) {
      const float2 strength = beta.of[block], decay = from_start.of[block];
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const int at = 4 * block + 2 * row;
        Word& both = x[block / 2][2 * (block % 2) + row];
        float low, high;
        wgmma::unpack<T>(both, low, high);
        both = wgmma::pack<T>(strength.x * (low - decay.x * r[at]), strength.y * (high - decay.y * r[at + 1]));
      }
    }
  }

  // This lane's row address, within a tile whose rows are tokens or rows of K and whose columns are this warpgroup's
  // values, for the transposed moves of rows 16 i to 16 i + 15.
  static __device__ __forceinline__ int matrix_row(int i) {
    return wgmma::swizzled(16 * i + 8 * (lane() / 16) + lane() % 8, 2 * warp() + lane() / 8 % 2);
  }

  const Params& p_;
  unsigned char* const tiles_;    // S: tiles of 64 rows of K x 64 values
  unsigned char* const results_;  // 64 tokens x 64 values
  float s_[kK / 2];               // S^T: 64 values x K
  Word result_[4][4];             // what is handed on, packed
};

}  // namespace hylo::gated_delta_rule
