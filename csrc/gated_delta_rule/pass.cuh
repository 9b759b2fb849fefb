// A pass over the chunks of a sequence, first to last or back, by warps of different roles (traits.cuh).
#pragma once

#include "gated_delta_rule/chain.cuh"
#include "gated_delta_rule/takers.cuh"

namespace hylo::gated_delta_rule {

// Which chunks a block runs through, and where the ring of stages is at each of them.
template <class T, Pass kPass, int kK, int kChains>
class PassBlock {
 public:
  static constexpr bool kBack = kPass == kGradients;
  static constexpr int kRing = stages(kPass, kK, kChains);
  static constexpr int kTakers = kPass == kOutputs ? 128 : 32;
  using Inputs = Stage<kPass, kK, kChains>;

  __device__ __forceinline__ PassBlock(const Params& p, unsigned char* shared, Handover* ring)
      : p_(p),
        shared_(shared),
        ring_(ring),
        sequence_index_(blockIdx.z / p.segments),
        sequence_(sequence_at(p, sequence_index_)),
        first_(first_chunk(p, sequence_index_)),
        chunks_(chunks_of(sequence_.tokens)),
        range_(range_of<kBack>(p, first_, chunks_, blockIdx.y, blockIdx.z % p.segments)) {}

  __device__ __forceinline__ bool empty() const { return range_.empty(); }

  __device__ __forceinline__ void load() const {
    each_chunk([&](int at, int turn, int c) {
      if (turn > 0) ring_[at].empty.wait((turn - 1) & 1);
      const long long record = static_cast<long long>(first_ + c) * p_.heads + blockIdx.y;
      load_stage(p_, stage(at), ring_[at].full, chunk_of(sequence_, c), record, blockIdx.y, value(0));
    });
  }

  __device__ __forceinline__ void chain(int index) const {
    const Handing<kTakers> handing(index);
    Chain<T, kPass, kK, kChains> chain(p_, handed(index));
    chain.start(range_.first == (kBack ? chunks_ : 0) ? p_.first_state : nullptr, state_offset(), value(index));
    each_chunk([&](int at, int turn, int c) {
      ring_[at].full.wait(turn & 1);
      const int tokens = chunk_of(sequence_, c).tokens;
      if (tokens < kChunk) chain.clear_tail(stage(at), tokens, handing);
      chain.run(stage(at), handing);
      chain.hand_result(handing);
      chain.settle();
      ring_[at].empty.arrive();
    });
    const bool last = kBack ? range_.begin == 0 : range_.end == chunks_;
    if (last && p_.last_state != nullptr) chain.finish(p_.last_state, state_offset(), value(index));
  }

  __device__ __forceinline__ void outputs(int index) const {
    const Handing<kTakers> handing(index);
    Outputs<T, kK, kChains> outputs(p_, blockIdx.y, value(index), handed(index), results(index));
    handing.arrive(handing.kStateFree);
    each_chunk([&](int at, int turn, int c) {
      outputs.run(handing, stage(at), ring_[at], turn & 1, chunk_of(sequence_, c), counts(c));
    });
    await_copies_out<0>();
  }

  __device__ __forceinline__ void store(int index) const {
    const Handing<kTakers> handing(index);
    Storer<T> storer(p_, blockIdx.y, value(index), handed(index), results(index));
    handing.arrive(handing.kStateFree);
    each_chunk([&](int, int, int c) { storer.run(handing, first_ + c, chunk_of(sequence_, c), counts(c)); });
    await_copies_out<0>();
  }

 private:
  // Calls f(stage of the ring, how often the ring went round, chunk) in the pass's order.
  template <class F>
  __device__ __forceinline__ void each_chunk(const F& f) const {
    const int count = kBack ? range_.first - range_.begin : range_.end - range_.first;
    for (int i = 0, at = 0, turn = 0; i < count; ++i) {
      f(at, turn, kBack ? range_.first - 1 - i : range_.first + i);
      if (++at == kRing) at = 0, ++turn;
    }
  }

  // Before it does, the state warms up.
  __device__ __forceinline__ bool counts(int c) const { return c >= range_.begin && c < range_.end; }
  __device__ __forceinline__ int value(int index) const { return (blockIdx.x * kChains + index) * kTile; }
  __device__ __forceinline__ long long state_offset() const {
    return static_cast<long long>(sequence_index_ * p_.heads + blockIdx.y) * p_.keys * p_.values;
  }
  __device__ __forceinline__ Inputs stage(int at) const { return {shared_ + at * Inputs::kSize}; }
  __device__ __forceinline__ unsigned char* handed(int index) const {
    return shared_ + kRing * Inputs::kSize + index * handed_size(kK);
  }
  __device__ __forceinline__ unsigned char* results(int index) const { return handed(index) + kK / kTile * kTileSize; }

  const Params& p_;
  unsigned char* const shared_;
  Handover* const ring_;
  const int sequence_index_;
  const Sequence sequence_;
  const int first_, chunks_;  // the sequence's first chunk among all, and how many it has
  const Range range_;
};

template <class T, Pass kPass, int kK, int kChains>
__device__ __forceinline__ void pass(const Params& p, unsigned char* shared) {
  constexpr bool kShares = shares_registers(kPass, kChains);
  using Block = PassBlock<T, kPass, kK, kChains>;
  __shared__ Handover ring[Block::kRing];
  if (threadIdx.x == 0) {
    for (int i = 0; i < Block::kRing; ++i) ring[i].init(128 * pass_warpgroups(kPass, kChains));
    fence_barrier_init();
  }
  __syncthreads();
  const Block block(p, shared, ring);
  if (block.empty()) return;

  const int warpgroup = uniform(threadIdx.x / 128);
  if (warpgroup < kChains) {
    if constexpr (kShares) claim_registers<chain_registers(kPass, kK, kChains)>();
    block.chain(kChains == 1 ? 0 : warpgroup);
  } else if (warpgroup < pass_warpgroups(kPass, kChains)) {
    if constexpr (kPass == kOutputs) {
      release_registers<output_registers(kK, kChains)>();
      block.outputs(kChains == 1 ? 0 : warpgroup - kChains);
    }
  } else {
    if constexpr (kShares) release_registers<loader_registers(kK, kChains)>();
    const int warp = uniform(threadIdx.x / 32 % 4);
    if (warp == 0) {
      if (lane() == 0) block.load();
    } else if constexpr (kPass != kOutputs) {
      if (warp <= kChains) block.store(kChains == 1 ? 0 : warp - 1);
    }
  }
}

// Tiles are swizzled by address bits, so they start at multiples of 1024.
__device__ __forceinline__ unsigned char* aligned(unsigned char* shared) {
  return shared + (-shared_address(shared) & 1023);
}

}  // namespace hylo::gated_delta_rule
