// A pass over the chunks of a sequence, forth or back. A block has one or two chains, a warpgroup each: 64 columns of V
// of a head, whose state S [V, K] lives in registers as an accumulator. Beside them are a warp that loads and three that
// make the gates' factors; and, where there are outputs, a warpgroup that makes the weights of the chunk's own tokens,
// L * step * (C B^T), for all chains.
//
//   forth:   S <- whole S + (to_end step X)^T B
//   back:    S <- whole S + (from_start dO)^T C                    S: the gradient of the state
//   outputs: O = from_start C S^T + (L * step * (C B^T)) X + d X
//
// What a segment adds to the state (_ends) is a sum over its chunks, each decayed by those after it: that pass goes the
// other way round, so that it is the values that decays are multiplied to, not the state.
#pragma once

#include "common/chunk_store.cuh"
#include "common/dependent.cuh"
#include "ssd/gates.cuh"
#include "ssd/rows.cuh"

namespace hylo::ssd {

// 64 columns of V of a head.
struct Unit {
  int head, tile;
  __device__ __forceinline__ int column() const { return tile * kTile; }
};

// Units count through the tiles of a head, then through the heads; past the last one the last one is done again.
__device__ __forceinline__ Unit unit_at(const Params& p, int index) {
  const int tiles = (p.values + kTile - 1) / kTile, last = p.heads * tiles - 1;
  const int unit = index < last ? index : last;
  return {unit / tiles, unit % tiles};
}

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

// One stage of the ring: tiles, and the factors of either chain.
template <Pass kPass, int kK>
struct Stage {
  static constexpr int kWide = kK / kTile;

  unsigned char* base;
  const Slots& slots;

  __device__ __forceinline__ unsigned char* values(int chain) const {
    return base + (slots.values == 1 ? 0 : chain) * kTileSize;
  }
  __device__ __forceinline__ unsigned char* keys(int chain) const {
    return base + (slots.values + (slots.keys == 1 ? 0 : chain) * kWide) * kTileSize;
  }
  __device__ __forceinline__ unsigned char* queries(int chain) const {
    return base + (slots.values + (slots.keys + (slots.queries == 1 ? 0 : chain)) * kWide) * kTileSize;
  }
  __device__ __forceinline__ float* factors(int chain) const {
    const int tiles = slots.values + kWide * (slots.keys + (kPass == kOutputs ? slots.queries : 0));
    return reinterpret_cast<float*>(base + tiles * kTileSize + chain * kPassFactorsSize);
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
    if (from != nullptr) {
      each_pair(from, [](float& low, float& high, const float* at) {
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
    each_pair(to, [](float low, float high, float* at) { *reinterpret_cast<float2*>(at) = make_float2(low, high); });
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
    update_state<true>(stage, factors);
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
    store_tokens<T, 128>(p_.o, p_.o_at, p_.cu_seqlens != nullptr, chunk, p_.heads, unit_.head, p_.values,
                         unit_.column(), results_, threadIdx.x % 128);
  }

  // The state alone.
  template <bool kWrites>
  __device__ __forceinline__ void run(const Inputs& stage) {
    const Factors factors{stage.factors(index_)};
    update_state<kWrites>(stage, factors);
    passed_ *= factors.whole();
    wgmma::wait<0>();
    wgmma::pin(s_);
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
        copy_box_out(states, state_ + i * kTileSize, i * kTile, unit_.column(), unit_.head, chunk);
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

  // Calls f(element, the one behind it, their place in a head's [V, K]) for what this thread has of the state. Places are
  // a fixed distance apart, so that they need no registers of their own.
  template <class Number, class F>
  __device__ __forceinline__ void each_pair(Number* matrix, const F& f) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int value = unit_.column() + 16 * warp_of_four() + lane() / 4 + 8 * row;
      if (value >= p_.values) continue;
      Number* const first = matrix + (static_cast<long long>(value) * p_.width + 2 * (lane() % 4));
#pragma unroll
      for (int block = 0; block < kK / 8; ++block) {
        const int at = 4 * block + 2 * row;
        if (8 * block < p_.width) f(s_[at], s_[at + 1], first + 8 * block);
      }
    }
  }

  // S <- whole S + (factors values)^T keys, under way on return: each token adds its part of the state at the chunk's end
  // or, going back, of the gradient of the state at its start. Of a segment's end, S <- S + passed (factors values)^T keys.
  template <bool kWrites>
  __device__ __forceinline__ void update_state(const Inputs& stage, const Factors& factors) {
    Word values[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) load_transposed(values[i], stage.values(index_) + anew(transposed_row(i)));
    scale_values(values, factors, kWrites ? kWritten : kFromStart);
    if constexpr (kPass != kEnds) scale_state(factors.whole());
    wgmma::fence();
    const DoubleWord b = wgmma::descriptor_n_major(shared_address(stage.keys(index_)), kTileSize);
#pragma unroll
    for (int i = 0; i < 4; ++i) wgmma::product<T, wgmma::kAlongMN>(s_, values[i], b + i * wgmma::kNextNMajor, true);
    wgmma::commit();
  }

  __device__ __forceinline__ void scale_state(float decay) {
#pragma unroll
    for (int i = 0; i < kK / 2; ++i) s_[i] *= decay;
    wgmma::pin(s_);
  }

  __device__ __forceinline__ void scale_values(Word (&values)[4][4], const Factors& factors, Factor which) const {
#pragma unroll
    for (int block = 0; block < 8; ++block) {
      float2 factor = factors.columns(which, block);
      if constexpr (kPass == kEnds) factor.x *= passed_, factor.y *= passed_;
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        Word& both = values[block / 2][2 * (block % 2) + row];
        float low, high;
        wgmma::unpack<T>(both, low, high);
        both = wgmma::pack<T>(factor.x * low, factor.y * high);
      }
    }
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
  float passed_ = 1.0f;
  float s_[kK / 2];
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

  // A warp, of which each lane has a box of a stage's tiles: there are at most 10.
  __device__ __forceinline__ void load() const {
    const int size = stage_size(kPass, kK, slots_) - kChains * kPassFactorsSize;
    const Box box = box_at(lane());
    const bool exists = lane() < size / kTileSize;
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
      stage.full.arrive();
    }
  }

  __device__ __forceinline__ void run(int index) const {
    const Unit unit = this->unit(index);
    Chain<T, kPass, kK> chain(p_, index, unit, of_chain(index));
    await_kernel_before();  // which makes what segments begin with, or the inputs
    const float skip = kPass == kOutputs ? number_of_head(p_.d, unit.head) : 0.0f;
    const int ring = stages(kPass, kK, slots_);
    chain.start(kPass == kEnds ? nullptr : begins_with(unit));
    each_chunk([&](int at, int turn, const Chunk& chunk, int c) {
      const Inputs inputs = stage(at);
      if constexpr (kPass == kStates) chain.leave_state(p_.states[back_], ring_.segment.first + c);
      ring_.stages[at].full.wait(turn & 1);
      if (p_.cu_seqlens != nullptr && chunk.tokens < kChunk) clear_tail(inputs, index, chunk.tokens);
      if constexpr (kPass == kOutputs) {
        chain.run_with_outputs(inputs, chunk, skip, ring_.weights[index], (turn * ring + at) & 1);
      } else if (back_) {
        chain.template run<false>(inputs);
      } else {
        chain.template run<true>(inputs);
      }
      ring_.stages[at].empty.arrive();
    });
    if (kPass == kEnds && threadIdx.x % 128 == 0) p_.totals[piece() * p_.heads + unit.head] = chain.passed();
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
    const int keys = index - slots_.values, queries = keys - slots_.keys * kWide;
    const TensorMap* const of_keys = back_ ? &p_.c : &p_.b;
    if (keys < 0) {
      const Unit unit = this->unit(index);
      return {back_ ? &p_.d_o : &p_.x, unit.column(), unit.head / (back_ ? 1 : p_.x_group)};
    }
    if (kPass != kOutputs || queries < 0) {
      return {of_keys, keys % kWide * kTile, unit(keys / kWide).head / (back_ ? p_.c_group : p_.b_group)};
    }
    return {&p_.c, queries % kWide * kTile, unit(queries / kWide).head / p_.c_group};
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
  __device__ __forceinline__ long long piece() const {
    return static_cast<long long>(blockIdx.z) * gridDim.y + blockIdx.y;
  }
  __device__ __forceinline__ long long state(long long of, const Unit& unit) const {
    return (of * p_.heads + unit.head) * p_.values * p_.width;
  }

  __device__ __forceinline__ const float* begins_with(const Unit& unit) const {
    if (p_.segments > 1) return p_.ends + state(piece(), unit);
    const float* given = back_ ? p_.last_gradient : p_.first_state;
    return given == nullptr ? nullptr : given + state(ring_.segment.sequence.index, unit);
  }
  __device__ __forceinline__ float* ends_in(const Unit& unit) const {
    if constexpr (kPass == kEnds) return p_.ends + state(piece(), unit);
    float* wanted = back_ ? p_.first_gradient : kPass == kOutputs ? p_.last_state : nullptr;
    const bool last = ring_.segment.index == (back_ ? 0 : p_.segments - 1);
    return last && wanted != nullptr ? wanted + state(ring_.segment.sequence.index, unit) : nullptr;
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
