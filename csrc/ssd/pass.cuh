// A pass over the chunks of a sequence, forth or back. A block has one or two chains (chain.cuh), a warpgroup each.
// Beside them are a warp that loads and three that make the gates' factors; and a warpgroup that helps: where there are
// outputs it makes the weights of the chunk's own tokens, L * step * (C B^T), for all chains; or it makes X, of what is
// convolved (mix.cuh).
//
//   forth:   S <- whole S + (to_end step X)^T B
//   back:    S <- whole S + (from_start dO)^T C                    S: the gradient of the state
//   outputs: O = from_start C S^T + (L * step * (C B^T)) X + d X
//
// What a piece of a sequence adds to the state (_ends) is a sum over its chunks, each decayed by those after it: that pass goes the
// other way round, so that it is the values that decays are multiplied to, not the state.
#pragma once

#include "common/dependent.cuh"
#include "ssd/chain.cuh"
#include "ssd/mix.cuh"

namespace hylo::ssd {

// The chunks of a segment, one or more pieces of a sequence, [begin, end), and where they lie.
struct Segment {
  Sequence sequence;
  int index, begin, end;
  int first;  // the sequence's first chunk among all

  __device__ __forceinline__ int count() const { return end - begin; }
};

// Of a sequence.
__device__ __forceinline__ int segments_of(const Params& p) { return p.pieces / p.merged; }

// Called by whole warps.
__device__ __forceinline__ Segment segment_of(const Params& p, int row) {
  Segment segment;
  const int segments = segments_of(p);
  segment.sequence = sequence_at(p, row / segments);
  segment.index = row % segments;
  const int chunks = chunks_of(segment.sequence.tokens), each = p.merged * ceil_div(chunks, p.pieces);
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
  Barrier mixed[kPassRing][2];  // for each chain
};

template <class T, Pass kPass, int kK>
class PassBlock {
 public:
  static constexpr int kChains = chains(kK);
  using Inputs = Stage<kPass, kK>;

  // Whether it is a call's first kernel, and the one ahead of it may be what makes the inputs. The one ahead of a
  // convolution makes b and c alone, and began when all else was there.
  static __device__ __forceinline__ bool comes_first(const Params& p) { return kPass == kEnds || p.pieces == 1; }

  __device__ __forceinline__ PassBlock(const PassParams& p, unsigned char* shared, Ring& ring)
      : p_(p.common),
        slots_(p.slots),
        mixing_(p.mixing),
        shared_(shared),
        ring_(ring),
        back_((kPass == kEnds || kPass == kStates) && blockIdx.z + p.common.first_direction == kBack) {}

  // A warp, of which each lane has a box of a stage's tiles: there are at most 12.
  __device__ __forceinline__ void load() const {
    const int tiles = stage_tiles(kPass, kK, slots_), size = stage_tiles_size(kPass, kK, slots_);
    const Box box = box_at(lane());
    const int halo = kPass == kMixedEnds && lane() < slots_.values ? kHalo : 0;
    const bool exists = lane() < tiles;
    if (exists) prefetch_map(*box.map);
    // What makes b and c runs ahead of a convolution, which begins with x.
    const bool waits = kPass == kMixedEnds && lane() >= slots_.values;
    if (kPass != kMixedEnds && (comes_first(p_) || p_.made)) await_kernel_before();
    start_next_kernel();  // not before the inputs are there: those that follow read them without waiting
    each_chunk([&](int at, int turn, const Chunk& chunk, int) {
      Handover& stage = ring_.stages[at];
      if (turn > 0) stage.empty.wait((turn - 1) & 1);
      if (lane() == 0) stage.full.arrive_expecting(size);
      __syncwarp();
      if (exists) {
        if (waits && turn == 0 && at == 0) await_kernel_before();
        unsigned char* const to = this->stage(at).tile(lane()) - halo * kRowSize;
        copy_box(to, *box.map, stage.full, box.column, box.head, chunk.begin - halo, chunk.batch);
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
    chain.start(makes_ends(kPass) ? nullptr : begins_with(unit, back_));
    each_chunk([&](int at, int turn, const Chunk& chunk, int c) {
      const Inputs inputs = stage(at);
      if constexpr (kPass == kStates) chain.leave_state(p_.states[back_], ring_.segment.first + c);
      ring_.stages[at].full.wait(turn & 1);
      if constexpr (kPass == kMixedEnds) {
        ring_.mixed[at][index].wait(turn & 1);
      } else if (p_.cu_seqlens != nullptr && chunk.tokens < kChunk) {
        clear_tail(inputs, index, chunk.tokens);
      }
      if constexpr (kPass == kOutputs) {
        chain.run_with_outputs(inputs, chunk, skip, ring_.weights[index], (turn * ring + at) & 1);
      } else if constexpr (kPass == kStates) {
        back_ ? chain.template run_and_differentiate<false>(inputs) : chain.template run_and_differentiate<true>(inputs);
      } else {
        kPass == kEnds && back_ ? chain.template run<kFromStart>(inputs) : chain.template run<kWritten>(inputs);
      }
      ring_.stages[at].empty.arrive();
    });
    if (makes_ends(kPass) && threadIdx.x % 128 == 0) {
      p_.totals[back_][static_cast<long long>(blockIdx.y) * p_.heads + unit.head] = chain.passed();
    }
    if constexpr (kPass == kStates) leave_owed(chain.all_owed(back_ ? nullptr : begins_with(unit, true)), unit);
    if (float* to = ends_in(unit)) chain.finish(to);
    await_copies_out<0>();
  }

  // A warpgroup that convolves a chain's tiles where they lie, for it and for the kernels after this one. weights: room for
  // kMixWeights.
  __device__ __forceinline__ void mix(int index, float* weights) const {
    const int thread = threadIdx.x % 128, barrier = 1 + kChains + index;
    const Unit unit = this->unit(index);
    load_weights(mixing_, unit.head * p_.values + unit.column(), p_.heads * p_.values - 1, weights, thread);
    sync_threads(barrier, 128);
    const Mixer<T> mixer(weights, thread);
    int last = -1;
    each_chunk([&](int at, int turn, const Chunk& chunk, int) {
      unsigned char* const tile = stage(at).values(index);
      ring_.stages[at].full.wait(turn & 1);
      mixer.convolve(tile, [&] { sync_threads(barrier, 128); });
      fence_async();
      ring_.mixed[at][index].arrive();
      sync_threads(barrier, 128);
      if (thread > 0) {
        ring_.stages[at].empty.arrive();
        return;
      }
      copy_box_out(p_.x, tile, unit.column(), unit.head, chunk.begin, chunk.batch);
      commit_copies_out();
      await_copies_out<1>();  // a stage is empty when its tiles have been sent, which takes the time of another
      if (last >= 0) ring_.stages[last].empty.arrive();
      last = at;
    });
    if (thread == 0) await_copies_out<0>();
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
  static constexpr int kRowSize = kTile * 2;       // of a tile, in bytes
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
    const TensorMap* const forth = kPass == kMixedEnds ? &mixing_.raw : &p_.x;
    return {back ? &p_.d_o : forth, unit.column(), unit.head / (back ? 1 : p_.x_group)};
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

  __device__ __forceinline__ long long state(long long of, const Unit& unit) const {
    return (of * p_.heads + unit.head) * p_.values * p_.width;
  }

  // What the segment's chains begin with, forth or back.
  __device__ __forceinline__ const float* begins_with(const Unit& unit, bool back) const {
    if (p_.pieces > 1) {
      const int first = ring_.segment.index * p_.merged, piece = back ? first + p_.merged - 1 : first;
      return p_.ends[back] + state(static_cast<long long>(ring_.segment.sequence.index) * p_.pieces + piece, unit);
    }
    const float* given = back ? p_.last_gradient : p_.first_state;
    return given == nullptr ? nullptr : given + state(ring_.segment.sequence.index, unit);
  }
  __device__ __forceinline__ float* ends_in(const Unit& unit) const {
    if constexpr (makes_ends(kPass)) return p_.ends[back_] + state(blockIdx.y, unit);
    float* wanted = back_ ? p_.first_gradient : kPass == kOutputs ? p_.last_state : nullptr;
    const bool last = ring_.segment.index == (back_ ? 0 : segments_of(p_) - 1);
    return last && wanted != nullptr ? wanted + state(ring_.segment.sequence.index, unit) : nullptr;
  }

  // A warp's.
  __device__ __forceinline__ void leave_owed(float owed, const Unit& unit) const {
    const int tiles = (p_.values + kTile - 1) / kTile;
    const long long segment = static_cast<long long>(back_) * gridDim.y + blockIdx.y;
    const long long row = (segment * tiles + unit.tile) * kOwedParts + warp_of_four();
    if (lane() == 0) p_.owed[row * p_.heads + unit.head] = owed;
  }

  // The i-th that the block comes to.
  __device__ __forceinline__ int which(int i) const {
    return back_ != makes_ends(kPass) ? ring_.segment.end - 1 - i : ring_.segment.begin + i;
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
    sync_threads(1 + kChains, 128 * (kChains + helpers(kPass)));
  }

  const Params& p_;
  const Slots& slots_;
  const Mixing& mixing_;
  unsigned char* const shared_;
  Ring& ring_;
  const bool back_;
};

template <class T, Pass kPass, int kK>
__device__ __forceinline__ void pass(const PassParams& all, unsigned char* shared) {
  const Params& p = all.common;
  constexpr int kChains = chains(kK), kHelpers = helpers(kPass);
  constexpr bool kSplit = kChains + kHelpers > 1;  // whether registers are dealt out anew
  constexpr int kOfChains = kChains * chain_registers(kPass, kK), kOfHelpers = kHelpers * helper_registers(kPass);
  static_assert(kOfChains + kOfHelpers + loader_registers(kPass) <= all_registers(kPass),
                "warpgroups would wait forever for registers that none gives back");
  __shared__ Ring ring;
  using Block = PassBlock<T, kPass, kK>;
  if (threadIdx.x < 32) {
    if (p.cu_seqlens != nullptr && Block::comes_first(p)) await_kernel_before();
    const Segment segment = segment_of(p, blockIdx.y);
    if (lane() == 0) {
      ring.segment = segment;
      for (Handover& stage : ring.stages) stage.init(1 + 32 * kChains, 128 * (kChains + kHelpers));
      for (Handover& weights : ring.weights) weights.init(128, 128);
      if constexpr (kPass == kMixedEnds) {
        for (auto& stage : ring.mixed) stage[0].init(128), stage[1].init(128);
      }
      fence_barrier_init();
    }
  }
  __syncthreads();
  const Block block(all, shared, ring);
  const int warpgroup = uniform(threadIdx.x / 128);
  if (warpgroup < kChains) {
    if constexpr (kSplit) claim_registers<chain_registers(kPass, kK)>();
    block.run(kChains == 1 ? 0 : warpgroup);
  } else if (warpgroup < kChains + kHelpers) {
    if constexpr (kHelpers > 0) release_registers<helper_registers(kPass)>();
    if constexpr (kPass == kOutputs) block.weigh();
    if constexpr (kPass == kMixedEnds) {
      alignas(16) __shared__ float weights[kHelpers][kMixWeights];
      block.mix(warpgroup - kChains, weights[warpgroup - kChains]);
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
