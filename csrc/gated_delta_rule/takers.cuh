// Who takes what a chain hands on: in _o a warpgroup that makes outputs of it, else a warp that stores it.
#pragma once

#include "common/chunk_store.cuh"
#include "gated_delta_rule/pipeline.cuh"

namespace hylo::gated_delta_rule {

// Both free a chain's results only after they took its next state, so that sending the results off holds up nobody.

// One warp a chain: the state before every chunk (its gradient after it), and what the chain solved for.
template <class T>
class Storer {
 public:
  static constexpr int kThreads = 32;

  __device__ __forceinline__ Storer(const Params& p, int head, int first_value, const unsigned char* state,
                                    const unsigned char* results)
      : p_(p), head_(head), first_value_(first_value), state_(state), results_(results) {}

  __device__ __forceinline__ void run(const Handing<kThreads>& handing, int record, const Chunk& chunk, bool counts) {
    handing.sync(handing.kStateReady);
    if (lane() == 0) {
      if (counts) copy_box_out(p_.states, state_, first_value_, 0, head_, record);
      commit_copies_out();
      await_copies_out<1>();
    }
    __syncwarp();
    handing.arrive(handing.kResultFree);  // of the chunk before
    if (lane() == 0) await_copies_out<0>();
    __syncwarp();
    handing.arrive(handing.kStateFree);
    handing.sync(handing.kResultReady);
    if (counts) {
      store_tokens<T, kThreads>(p_.out, p_.o, p_.cu_seqlens != nullptr, chunk, contiguous_stride(p_), head_, p_.values,
                                first_value_, results_, lane());
    }
  }

 private:
  const Params& p_;
  const int head_, first_value_;
  const unsigned char *const state_, *const results_;
};

// One warpgroup a chain: O = from_start Q S + P Vn, tokens along rows. The tile of Vn takes the outputs in the end.
template <class T, Pass kPass, int kK, int kChains>
class Outputs {
 public:
  static constexpr int kThreads = 128;
  using Inputs = Stage<kPass, kK, kChains>;

  __device__ __forceinline__ Outputs(const Params& p, int head, int first_value, const unsigned char* state,
                                     unsigned char* results)
      : p_(p), head_(head), first_value_(first_value), state_(state), results_(results) {}

  __device__ __forceinline__ void run(const Handing<kThreads>& handing, const Inputs& stage, Handover& queries,
                                      int phase, const Chunk& chunk, bool counts) {
    handing.sync(handing.kStateReady);
    float o[32];
    queries.full.wait(phase);  // even where nothing is read: they are not to be loaded twice at once
    if (counts) read_state(stage, o);
    handing.arrive(handing.kStateFree);
    if constexpr (Inputs::kSolves) queries.empty.arrive();
    if (threadIdx.x % 128 == 0) await_copies_out<0>();
    handing.arrive(handing.kResultFree);  // of the chunk before
    handing.sync(handing.kResultReady);
    if (counts) read_written(stage, o);
    if constexpr (Inputs::kSolves) {
      stage.release_record();
    } else {
      queries.empty.arrive();
    }
    if (counts) {
      handing.sync_takers();  // all have read Vn
      stage_outputs(o);
      handing.sync_takers();
      store_tokens<T, kThreads>(p_.out, p_.o, p_.cu_seqlens != nullptr, chunk, contiguous_stride(p_), head_, p_.values,
                                first_value_, results_, threadIdx.x % 128);
    }
  }

 private:
  static __device__ __forceinline__ int row() { return threadIdx.x / 32 % 4 * 16 + lane() / 4; }

  __device__ __forceinline__ void read_state(const Inputs& stage, float (&o)[32]) const {
    const DoubleWord queries = wgmma::descriptor_k_major(shared_address(stage.queries()));
    const DoubleWord state = wgmma::descriptor_n_major(shared_address(state_), kTileSize);
    wgmma::fence();
#pragma unroll
    for (int i = 0; i < kK / 16; ++i) {
      const int tile = i / 4 * (kTileSize >> 4);
      wgmma::product_shared<T, wgmma::kAlongK, wgmma::kAlongMN>(
          o, queries + tile + i % 4 * wgmma::kNextKMajor, state + tile + i % 4 * wgmma::kNextNMajor, i > 0);
    }
    wgmma::commit();
    wgmma::wait<0>();
    wgmma::pin(o);
    stage.await_record();
    const float decay[2] = {stage.from_start()[row()], stage.from_start()[row() + 8]};
#pragma unroll
    for (int i = 0; i < 32; ++i) o[i] *= decay[i / 2 % 2];
  }

  __device__ __forceinline__ void read_written(const Inputs& stage, float (&o)[32]) const {
    const DoubleWord scores = wgmma::descriptor_k_major(shared_address(stage.scores()));
    const DoubleWord written = wgmma::descriptor_n_major(shared_address(results_), kTileSize);
    wgmma::pin(o);
    wgmma::fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      wgmma::product_shared<T, wgmma::kAlongK, wgmma::kAlongMN>(o, scores + i * wgmma::kNextKMajor,
                                                                written + i * wgmma::kNextNMajor, true);
    }
    wgmma::commit();
    wgmma::wait<0>();
    wgmma::pin(o);
  }

  __device__ __forceinline__ void stage_outputs(float (&o)[32]) const {
    const int to = threadIdx.x / 32 % 4 * 16 + lane() % 16;
#pragma unroll
    for (int i = 0; i < 32; ++i) o[i] *= p_.scale;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Word packed[4];
      wgmma::pack_operand<T>(packed, o, i);
      store_matrices(results_ + wgmma::swizzled(to, 2 * i + lane() / 16), packed);
    }
    fence_async();
  }

  const Params& p_;
  const int head_, first_value_;
  const unsigned char* const state_;
  unsigned char* const results_;
};

}  // namespace hylo::gated_delta_rule
