// A pass over the chunks of a sequence, forth or back. A block has one or two chains (chain.cuh), a warpgroup each.
// Beside them are a warp that loads and three that make the gates' factors; and, where there are outputs, a warpgroup
// that makes the weights of the chunk's own tokens, L * step * (C B^T), for all chains.
//
//   forth:   S <- whole S + (to_end step X)^T B
//   back:    S <- whole S + (from_start dO)^T C                    S: the gradient of the state
//   outputs: O = from_start C S^T + (L * step * (C B^T)) X + d X
//
// What a segment adds to the state (_ends) is a sum over its chunks, each decayed by those after it: that pass goes the
// other way round, so that it is the values that decays are multiplied to, not the state.
#pragma once

#include "common/dependent.cuh"
#include "ssd/chain.cuh"

namespace hylo::ssd {

// The chunks of a segment, [begin, end), and where they lie.
struct Segment {
  Sequence sequence;
  int index, begin, end;
  int first;  // the sequence's first chunk among all

  __device__ __forceinline__ int count() const { return end - begin; }
};

// Called by whole warps.
__device__ __forceinline__ Segment segment_of(const Params& p, int piece) {
  Segment segment;
  segment.sequence = sequence_at(p, piece / p.segments);
  segment.index = piece % p.segments;
  const int chunks = chunks_of(segment.sequence.tokens), each = (chunks + p.segments - 1) / p.segments;
  const int begin = segment.index * each, end = begin + each;
  segment.begin = begin < chunks ? begin : chunks;
  segment.end = end < chunks ? end : chunks;
  segment.first = first_chunk(p, segment.sequence.index);
  return segment;
}

// What a block's warps share beside the tiles.
struct Ring {
  Segment segment;
  Handover stages[kPassRing];
  Handover weights[2];  // of each chain
};

template <class T, Pass kPass, int kK>
class PassBlock {
 public:
  static constexpr int kChains = chains(kK);
  using Inputs = Stage<kPass, kK>;

  // Whether it is a call's first kernel, and the one ahead of it may be what makes the inputs.
  static __device__ __forceinline__ bool comes_first(const Params& p) { return kPass == kEnds || p.segments == 1; }

  __device__ __forceinline__ PassBlock(const Params& p, const Slots& slots, unsigned char* shared, Ring& ring)
      : p_(p), slots_(slots), shared_(shared), ring_(ring), back_(kPass != kOutputs && blockIdx.z == kBack) {}

  // A warp, of which each lane has a box of a stage's tiles: there are at most 12.
  __device__ __forceinline__ void load() const {
    const int tiles = stage_tiles(kPass, kK, slots_), size = tiles * kTileSize;
    const Box box = box_at(lane());
    const bool exists = lane() < tiles;
    if (exists) prefetch_map(*box.map);
    if (comes_first(p_)) await_kernel_before();
    start_next_kernel();  // not before the inputs are there: those that follow read them without waiting
    each_chunk([&](int at, int turn, const Chunk& chunk, int) {
      Handover& stage = ring_.stages[at];
      if (turn > 0) stage.empty.wait((turn - 1) & 1);
      if (lane() == 0) stage.full.arrive_expecting(size);
      __syncwarp();
      if (exists) {
        unsigned char* const to = this->stage(at).base + lane() * kTileSize;
        copy_box(to, *box.map, stage.full, box.column, box.head, chunk.begin, chunk.batch);
      }
    });
  }

  // Warps take turns, each with the factors of one chain. Never more of them than a turn of the ring has to give: one that
  // is a turn ahead of another would take an older phase of a barrier for its own. The code is short, for when a block
  // begins its instructions come from far away.
  __device__ __forceinline__ void make_factors(int index) const {
    const int ring = stages(kPass, kK, slots_), units = ring_.segment.count() * kChains;
    const int warps = ring * kChains < kGateWarps ? ring * kChains : kGateWarps;
    if (index >= warps || index >= units) return;
    if (comes_first(p_)) await_kernel_before();
    const Gates first = gates_of(0), second = gates_of(kChains - 1);
    const auto of = [&](int unit) { return unit % kChains == 0 ? first : second; };
    Gates::Raw next = of(index).load(which(index / kChains));
#pragma unroll 1
    for (int unit = index + warps; unit < units && unit < kPrefetch; unit += warps) of(unit).prefetch(which(unit / kChains));
    int turn = 0;
#pragma unroll 1
    for (int unit = index; unit < units; unit += warps) {
      const int i = unit / kChains;
      const Gates gates = of(unit);
      const float2 step = gates.steps(gates.raw(next), chunk(i).tokens);
      const int ahead = unit + kPrefetch, soon = unit + warps;
      if (ahead < units) of(ahead).prefetch(which(ahead / kChains));
      if (soon < units) next = of(soon).load(which(soon / kChains));
      const float2 sum = gates.sums(step);
      if (i >= (turn + 1) * ring) ++turn;
      const int at = i - turn * ring;
      Handover& stage = ring_.stages[at];
      if (turn > 0) stage.empty.wait((turn - 1) & 1);
      float* const factors = this->stage(at).factors(unit % kChains);
      gates.write_ends(step, sum, factors);
      if constexpr (kPass == kOutputs) gates.template write_between<true>(step, sum, factors);
      if constexpr (kPass == kStates) gates.write_time(step, factors);
      stage.full.arrive();
    }
  }

  __device__ __forceinline__ void run(int index) const {
    const Unit unit = this->unit(index);
    Chain<T, kPass, kK> chain(p_, index, unit, of_chain(index));
    await_kernel_before();  // which makes what segments begin with, or the inputs
    const float skip = kPass == kOutputs ? number_of_head(p_.d, unit.head) : 0.0f;
    const int ring = stages(kPass, kK, slots_);
    chain.start(kPass == kEnds ? nullptr : begins_with(unit, back_));
    each_chunk([&](int at, int turn, const Chunk& chunk, int c) {
      const Inputs inputs = stage(at);
      if constexpr (kPass == kStates) chain.leave_state(p_.states[back_], ring_.segment.first + c);
      ring_.stages[at].full.wait(turn & 1);
      if (p_.cu_seqlens != nullptr && chunk.tokens < kChunk) clear_tail(inputs, index, chunk.tokens);
      if constexpr (kPass == kOutputs) {
        chain.run_with_outputs(inputs, chunk, skip, ring_.weights[index], (turn * ring + at) & 1);
      } else if constexpr (kPass == kStates) {
        back_ ? chain.template run_and_differentiate<false>(inputs) : chain.template run_and_differentiate<true>(inputs);
      } else {
        back_ ? chain.template run<kFromStart>(inputs) : chain.template run<kWritten>(inputs);
      }
      ring_.stages[at].empty.arrive();
    });
    if (kPass == kEnds && threadIdx.x % 128 == 0) p_.totals[piece(back_) * p_.heads + unit.head] = chain.passed();
    if constexpr (kPass == kStates) leave_owed(chain.all_owed(back_ ? nullptr : begins_with(unit, true)), unit);
    if (float* to = ends_in(unit)) chain.finish(to);
    await_copies_out<0>();
  }

  // The warpgroup of the weights, where chains share b and c with one product for both.
  __device__ __forceinline__ void weigh() const {
    const int ring = stages(kPass, kK, slots_);
    const bool once = slots_.keys == 1 && slots_.queries == 1;
    each_chunk([&](int at, int turn, const Chunk& chunk, int) {
      const Inputs inputs = stage(at);
      ring_.stages[at].full.wait(turn & 1);
      if (p_.cu_seqlens != nullptr && chunk.tokens < kChunk) await_clear();
      float scores[32];
#pragma unroll 1
      for (int chain = 0; chain < kChains; ++chain) {
        if (chain == 0 || !once) {
          wgmma::fence();
          multiply_queries<T, kK>(scores, inputs.queries(chain), inputs.keys(chain));
          wgmma::commit();
          wgmma::wait<0>();
          wgmma::pin(scores);
        }
        Word weights[4][4];
        weigh_readers_by_warp<T, true>(weights, scores, Factors{inputs.factors(chain)});
        Handover& ready = ring_.weights[chain];
        ready.empty.wait(((turn * ring + at) & 1) ^ 1);
        unsigned char* const to = Chain<T, kPass, kK>::weights(of_chain(chain));
#pragma unroll
        for (int i = 0; i < 4; ++i) store_matrices(to + straight_row(i), weights[i]);
        fence_async();
        ready.full.arrive();
      }
      ring_.stages[at].empty.arrive();
    });
  }

 private:
  static constexpr int kPrefetch = 12 * kChains;  // units that are on their way into the second cache

  // What one copy of a stage brings.
  struct Box {
    const TensorMap* map;
    int column, head;
  };
  __device__ __forceinline__ Box box_at(int index) const {
    constexpr int kWide = Inputs::kWide;
    const int keys = index - slots_.values, queries = keys - slots_.keys * kWide, others = queries - slots_.queries * kWide;
    if (keys < 0) return values_box(unit(index), back_);
    if (queries < 0) return keys_box(unit(keys / kWide), keys % kWide, back_);
    if (others < 0) return keys_box(unit(queries / kWide), queries % kWide, !back_);
    return values_box(unit(others), !back_);
  }
  __device__ __forceinline__ Box values_box(const Unit& unit, bool back) const {
    return {back ? &p_.d_o : &p_.x, unit.column(), unit.head / (back ? 1 : p_.x_group)};
  }
  __device__ __forceinline__ Box keys_box(const Unit& unit, int tile, bool back) const {
    return {back ? &p_.c : &p_.b, tile * kTile, unit.head / (back ? p_.c_group : p_.b_group)};
  }

  __device__ __forceinline__ Gates gates_of(int chain) const {
    return Gates(p_, unit(chain).head, ring_.segment.sequence);
  }
  __device__ __forceinline__ Unit unit(int chain) const { return unit_at(p_, kChains * blockIdx.x + chain); }
  __device__ __forceinline__ unsigned char* of_chain(int chain) const {
    return shared_ + stages(kPass, kK, slots_) * stage_size(kPass, kK, slots_) + chain * chain_size(kPass, kK);
  }
  __device__ __forceinline__ Inputs stage(int at) const {
    return {shared_ + at * stage_size(kPass, kK, slots_), slots_};
  }

  // Of all sequences, segments and directions.
  __device__ __forceinline__ long long piece(bool back) const {
    return static_cast<long long>(back) * gridDim.y + blockIdx.y;
  }
  __device__ __forceinline__ long long state(long long of, const Unit& unit) const {
    return (of * p_.heads + unit.head) * p_.values * p_.width;
  }

  // What the segment's chains begin with, forth or back.
  __device__ __forceinline__ const float* begins_with(const Unit& unit, bool back) const {
    if (p_.segments > 1) return p_.ends + state(piece(back), unit);
    const float* given = back ? p_.last_gradient : p_.first_state;
    return given == nullptr ? nullptr : given + state(ring_.segment.sequence.index, unit);
  }
  __device__ __forceinline__ float* ends_in(const Unit& unit) const {
    if constexpr (kPass == kEnds) return p_.ends + state(piece(back_), unit);
    float* wanted = back_ ? p_.first_gradient : kPass == kOutputs ? p_.last_state : nullptr;
    const bool last = ring_.segment.index == (back_ ? 0 : p_.segments - 1);
    return last && wanted != nullptr ? wanted + state(ring_.segment.sequence.index, unit) : nullptr;
  }

  // A warp's.
  __device__ __forceinline__ void leave_owed(float owed, const Unit& unit) const {
    const int tiles = (p_.values + kTile - 1) / kTile;
    const long long row = (piece(back_) * tiles + unit.tile) * kOwedParts + warp_of_four();
    if (lane() == 0) p_.owed[row * p_.heads + unit.head] = owed;
  }

  // The i-th that the block comes to.
  __device__ __forceinline__ int which(int i) const {
    return back_ != (kPass == kEnds) ? ring_.segment.end - 1 - i : ring_.segment.begin + i;
  }
  __device__ __forceinline__ Chunk chunk(int i) const { return chunk_of(ring_.segment.sequence, which(i)); }

  // Calls f(stage of the ring, how often the ring went round, chunk, its index in the sequence).
  template <class F>
  __device__ __forceinline__ void each_chunk(const F& f) const {
    const int ring = stages(kPass, kK, slots_), count = ring_.segment.count();
    for (int i = 0, at = 0, turn = 0; i < count; ++i) {
      f(at, turn, chunk(i), which(i));
      if (++at == ring) at = 0, ++turn;
    }
  }

  // Chains share tiles, so both are through before any goes on that reads them.
  __device__ __forceinline__ void clear_tail(const Inputs& inputs, int index, int tokens) const {
    each_row_from(tokens, threadIdx.x % 128, 128, [&](int at) {
      clear_words(inputs.values(index) + at);
#pragma unroll
      for (int i = 0; i < Inputs::kWide; ++i) clear_words(inputs.keys(index) + i * kTileSize + at);
      if constexpr (kPass != kStates) return;
      clear_words(inputs.others(index) + at);
#pragma unroll
      for (int i = 0; i < Inputs::kWide; ++i) clear_words(inputs.queries(index) + i * kTileSize + at);
    });
    fence_async();
    await_clear();
  }
  __device__ __forceinline__ void await_clear() const {
    sync_threads(1 + kChains, 128 * (kChains + weighers(kPass)));
  }

  const Params& p_;
  const Slots& slots_;
  unsigned char* const shared_;
  Ring& ring_;
  const bool back_;
};

template <class T, Pass kPass, int kK>
__device__ __forceinline__ void pass(const Params& p, const Slots& slots, unsigned char* shared) {
  constexpr int kChains = chains(kK);
  constexpr bool kSplit = kChains + weighers(kPass) > 1;  // whether registers are dealt out anew
  static_assert(kChains * chain_registers(kPass, kK) + weighers(kPass) * kWeigherRegisters + loader_registers(kPass) <= 504,
                "warpgroups would wait forever for registers that none gives back");
  __shared__ Ring ring;
  using Block = PassBlock<T, kPass, kK>;
  if (threadIdx.x < 32) {
    if (p.cu_seqlens != nullptr && Block::comes_first(p)) await_kernel_before();
    const Segment segment = segment_of(p, blockIdx.y);
    if (lane() == 0) {
      ring.segment = segment;
      for (Handover& stage : ring.stages) stage.init(1 + 32 * kChains, 128 * (kChains + weighers(kPass)));
      for (Handover& weights : ring.weights) weights.init(128, 128);
      fence_barrier_init();
    }
  }
  __syncthreads();
  const Block block(p, slots, shared, ring);
  const int warpgroup = uniform(threadIdx.x / 128);
  if (warpgroup < kChains) {
    if constexpr (kSplit) claim_registers<chain_registers(kPass, kK)>();
    block.run(kChains == 1 ? 0 : warpgroup);
  } else if (warpgroup < kChains + weighers(kPass)) {
    if constexpr (kPass == kOutputs) {
      release_registers<kWeigherRegisters>();
      block.weigh();
    }
  } else {
    if constexpr (kSplit) release_registers<loader_registers(kPass)>();
    const int warp = uniform(warp_of_four());
    if (warp == kGateWarps) {
      block.load();
    } else {
      block.make_factors(warp);
    }
  }
}

}  // namespace hylo::ssd
