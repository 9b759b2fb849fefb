// A pass over the chunks of a sequence, first to last or back, by warps of different roles (traits.cuh).
#pragma once

#include "gated_delta_rule/chain.cuh"
#include "gated_delta_rule/inverse.cuh"
#include "gated_delta_rule/solver.cuh"
#include "gated_delta_rule/takers.cuh"

namespace hylo::gated_delta_rule {

// Where a block's shared memory is in use: stages of inputs, what chains hand on, and solvers' records and matrices.
template <Pass kPass, int kK, int kChains>
struct Layout {
  static constexpr int kRing = stages(kPass, kK, kChains);
  static constexpr int kHanded = kRing * stage_size(kPass, kK, kChains);
  static constexpr int kRecords = kHanded + kChains * handed_size(kK);
  static constexpr int kLower = kRecords + kSolvers * kSlotSize;
};

// The sequence that a block works at, and which of its chunks.
struct Walk {
  Sequence sequence;
  int first, chunks;  // the sequence's first chunk among all, and how many it has
  int tail;           // which of them has fewer tokens than others, or -1
  Range range;
  bool leaves_state;  // whether the pass through the sequence ends where the block does, and the state there is wanted
  const int* ready;   // for each chunk and head whether its record is there, or null: all are
};

// Called by whole warps.
template <Pass kPass>
__device__ __forceinline__ Walk walk_of(const Params& p) {
  constexpr bool kBack = kPass == kGradients;
  const int piece = blockIdx.z - maker_layers(p.makers, gridDim.x), sequence = piece / p.pieces;
  const bool cut = cut_here(p, sequence, blockIdx.y);
  Walk walk;
  walk.sequence = sequence_at(p, sequence);
  walk.first = first_chunk(p, sequence);
  walk.chunks = chunks_of(walk.sequence.tokens);
  walk.range = range_of<kBack>(p, sequence, walk.chunks, blockIdx.y, piece % p.pieces, cut);
  walk.tail = walk.sequence.tokens % kChunk > 0 ? walk.chunks - 1 : -1;
  const bool last = kBack ? walk.range.begin == 0 : walk.range.end == walk.chunks;
  walk.leaves_state = last && p.last_state != nullptr;
  walk.ready = cut ? nullptr : p.ready;
  if (!taken(p, sequence, blockIdx.y)) walk.range = {0, 0, -1};
  return walk;
}

// Of each solver: who waits for its record, and gates.
template <bool kSolves>
struct SolverShare {
  Handover records[kSolvers];
  Gates gates[kSolvers][2];

  __device__ __forceinline__ void init(int takers) {
    for (Handover& record : records) record.init(kSolverThreads, takers);
  }
  __device__ __forceinline__ Handover* record(int solver) { return &records[solver]; }
};
template <>
struct SolverShare<false> {
  __device__ __forceinline__ void init(int) {}
  __device__ __forceinline__ Handover* record(int) { return nullptr; }
};

// What a block's warps share beside that: small things, for which some of them have no registers, and barriers.
template <Pass kPass, int kK, int kChains>
struct Ring {
  Walk walk;
  typename Stage<kPass, kK, kChains>::Barriers stages[stages(kPass, kK, kChains)];
  SolverShare<solves(kPass)> solvers;

  // By the block's first warp.
  __device__ __forceinline__ void init(const Params& p) {
    const Walk found = walk_of<kPass>(p);
    if (lane() > 0) return;
    walk = found;
    for (auto& stage : stages) stage.init();
    solvers.init(128 * chain_warpgroups(kPass, kChains));
    fence_barrier_init();
  }
};

// Which chunks a block runs through, and what each of its warps does with them.
template <class T, Pass kPass, int kK, int kChains>
class PassBlock {
 public:
  static constexpr bool kBack = kPass == kGradients;
  static constexpr int kTakers = makes_outputs(kPass) ? 128 : 32;
  using Inputs = Stage<kPass, kK, kChains>;
  using Places = Layout<kPass, kK, kChains>;

  __device__ __forceinline__ PassBlock(const Params& p, unsigned char* shared, Ring<kPass, kK, kChains>& ring)
      : p_(p), shared_(shared), ring_(ring), walk_(ring.walk) {}

  __device__ __forceinline__ void load() const {
    int known = walk_.ready == nullptr ? walk_.chunks : walk_.range.first;  // records of chunks before that are there
    each_chunk([&](int i, int at, int turn, int c) {
      auto& barriers = ring_.stages[at];
      const Inputs inputs = stage(i, at);
      const Chunk chunk = chunk_of(walk_.sequence, c);
      const unsigned char* record = Inputs::kSolves ? nullptr : this->record(c);
      if constexpr (has_makers(kPass)) {
        if (c >= known) known = c + await_ready(walk_.ready + record_index(c), p_.heads, walk_.chunks - c);
      }
      if (turn > 0) barriers.tokens.empty.wait((turn - 1) & 1);
      load_tokens(p_, inputs, barriers.tokens.full, chunk, record, blockIdx.y, value(0));
      if constexpr (Inputs::kReadsQueries) {
        if (Inputs::kApart && turn > 0) barriers.queries.empty.wait((turn - 1) & 1);
        load_queries(p_, inputs, barriers.of_queries().full, chunk, record, blockIdx.y);
      }
    });
  }

  __device__ __forceinline__ void chain(int index) const {
    const Handing<kTakers> handing(index);
    Chain<T, kPass, kK, kChains> chain(p_, handed(index));
    const bool at_end = walk_.range.first == (kBack ? walk_.chunks : 0);  // of the sequence, not within it
    // In registers where there are some: to look into shared memory takes as long as a product.
    constexpr bool kHolds = kK > 64;
    const int tail = walk_.tail;
    const bool leaves_state = kBack && walk_.leaves_state;
    chain.start(at_end ? p_.first_state : nullptr, state_offset(), value(index));
    each_chunk([&](int i, int at, int turn, int c) {
      const Inputs inputs = stage(i, at);
      ring_.stages[at].tokens.full.wait(turn & 1);
      if (c == (kHolds ? tail : walk_.tail)) {
        inputs.await_record();  // the solver has read what is about to change
        chain.clear_tail(inputs, walk_.sequence.tokens % kChunk, handing);
      }
      chain.run(inputs, handing);
      chain.hand_result(handing);
      chain.settle();
      if constexpr (kBack) {
        if (kHolds ? leaves_state : walk_.leaves_state) chain.add_remainder(inputs);
      }
      ring_.stages[at].tokens.empty.arrive();
      inputs.release_record();
    });
    if (walk_.leaves_state) chain.finish(p_.last_state, state_offset(), value(index));
  }

  __device__ __forceinline__ void outputs(int index) const {
    const Handing<kTakers> handing(index);
    Outputs<T, kPass, kK, kChains> outputs(p_, blockIdx.y, value(index), handed(index), results(index));
    handing.arrive(handing.kStateFree);
    each_chunk([&](int i, int at, int turn, int c) {
      Handover& queries = ring_.stages[at].of_queries();
      outputs.run(handing, stage(i, at), queries, turn & 1, chunk_of(walk_.sequence, c), counts(c));
    });
    await_copies_out<0>();
  }

  __device__ __forceinline__ void store(int index) const {
    const Handing<kTakers> handing(index);
    Storer<T> storer(p_, blockIdx.y, value(index), handed(index), results(index));
    handing.arrive(handing.kStateFree);
    each_chunk([&](int, int, int, int c) {
      storer.run(handing, walk_.first + c, chunk_of(walk_.sequence, c), counts(c));
    });
    await_copies_out<0>();
  }

  // Solvers take turns, so each has as long for a chunk as the chain has for as many as there are solvers. Where
  // records are wanted, the block of the first columns leaves them.
  __device__ __forceinline__ void solve(int index) const {
    float* lower = reinterpret_cast<float*>(shared_ + Places::kLower + index * kLowerSize);
    Solver<T, kK> solver(p_, blockIdx.y, lower, ring_.solvers.gates[index], kSolverBarrier + index);
    const bool leaves = p_.records != nullptr && blockIdx.x == 0;
    const bool copies = threadIdx.x % kSolverThreads == 0;
    const auto chunk = [&](int c) { return c < walk_.range.end ? chunk_of(walk_.sequence, c) : Chunk{}; };
    solver.start(chunk(walk_.range.first + index), chunk(walk_.range.first + index + kSolvers));
    each_chunk([&](int i, int at, int turn, int c) {
      if (i % kSolvers != index) return;
      auto& barriers = ring_.stages[at];
      const Inputs inputs = stage(i, at);
      barriers.tokens.full.wait(turn & 1);
      barriers.queries.full.wait(turn & 1);
      if (copies) await_copies_out<0>();
      solver.solve(inputs.keys(), inputs.queries(), chunk(c), chunk(c + 2 * kSolvers), [&] {
        barriers.tokens.empty.arrive();
        barriers.queries.empty.arrive();
      });
      if (i >= kSolvers) inputs.solved->empty.wait((inputs.record_turn - 1) & 1);
      solver.template write<false>(inputs.record);
      fence_async();
      inputs.solved->full.arrive();
      if (leaves && counts(c)) {
        solver.sync();
        if (copies) copy_out(this->record(c), inputs.record, kRecordSize);
        if (copies) commit_copies_out();
      }
    });
    if (copies) await_copies_out<0>();
  }

 private:
  static constexpr int kSolverBarrier = 8;  // behind those of one chain

  // Calls f(how manieth, stage of the ring, how often the ring went round, chunk) in the pass's order.
  template <class F>
  __device__ __forceinline__ void each_chunk(const F& f) const {
    const int count = kBack ? walk_.range.first - walk_.range.begin : walk_.range.end - walk_.range.first;
    for (int i = 0, at = 0, turn = 0; i < count; ++i) {
      f(i, at, turn, kBack ? walk_.range.first - 1 - i : walk_.range.first + i);
      if (++at == Places::kRing) at = 0, ++turn;
    }
  }

  // Before it does, the state warms up.
  __device__ __forceinline__ bool counts(int c) const { return c >= walk_.range.begin && c < walk_.range.end; }
  __device__ __forceinline__ int value(int index) const { return (blockIdx.x * kChains + index) * kTile; }
  __device__ __forceinline__ long long state_offset() const {
    return static_cast<long long>(walk_.sequence.index * p_.heads + blockIdx.y) * p_.keys * p_.values;
  }
  __device__ __forceinline__ long long record_index(int c) const {
    return static_cast<long long>(walk_.first + c) * p_.heads + blockIdx.y;
  }
  __device__ __forceinline__ unsigned char* record(int c) const { return p_.records + record_index(c) * kRecordSize; }
  __device__ __forceinline__ Inputs stage(int i, int at) const {
    const int solver = i % kSolvers;
    return {shared_ + at * Inputs::kSize, shared_ + Places::kRecords + solver * kSlotSize, ring_.solvers.record(solver),
            i / kSolvers};
  }
  __device__ __forceinline__ unsigned char* handed(int index) const {
    return shared_ + Places::kHanded + index * handed_size(kK);
  }
  __device__ __forceinline__ unsigned char* results(int index) const { return handed(index) + kK / kTile * kTileSize; }

  const Params& p_;
  unsigned char* const shared_;
  Ring<kPass, kK, kChains>& ring_;
  const Walk& walk_;
};

// What a block does that makes records for the others. Such blocks come first in the grid, so that none who wait for
// them keep them from their places.
template <class T, Pass kPass, int kK>
__device__ __forceinline__ void make_records(const Params& p, unsigned char* shared) {
  constexpr bool kClaims = launch_registers(kPass, kK, 1) < kMakerRegisters;
  const int warpgroup = uniform(threadIdx.x / 128);
  const int maker = blockIdx.z * gridDim.x + blockIdx.x;
  if (maker >= p.makers) return;
  if (warpgroup >= kMakers) {
    if constexpr (kClaims) release_registers<24>();
    return;
  }
  if constexpr (kClaims) claim_registers<kMakerRegisters>();
  unsigned char* own = shared + warpgroup * maker_shared(kK);
  Maker<T, kK>(p, own, blockIdx.y, p.makers * kMakers, 1 + warpgroup).run(maker * kMakers + warpgroup);
}

template <class T, Pass kPass, int kK, int kChains>
__device__ __forceinline__ void pass(const Params& p, unsigned char* shared) {
  if constexpr (has_makers(kPass)) {
    if (blockIdx.z < maker_layers(p.makers, gridDim.x)) return make_records<T, kPass, kK>(p, shared);
  }
  constexpr bool kShares = shares_registers(kPass, kK, kChains);
  constexpr int kWithChains = chain_warpgroups(kPass, kChains);
  using Block = PassBlock<T, kPass, kK, kChains>;
  __shared__ Ring<kPass, kK, kChains> ring;
  if (threadIdx.x < 32) ring.init(p);
  __syncthreads();
  if (ring.walk.range.empty()) return;
  const Block block(p, shared, ring);

  const int warpgroup = uniform(threadIdx.x / 128);
  if (warpgroup < kChains) {
    if constexpr (kShares) claim_registers<chain_registers(kPass, kK, kChains)>();
    block.chain(kChains == 1 ? 0 : warpgroup);
  } else if (warpgroup < kWithChains) {
    if constexpr (makes_outputs(kPass)) {
      release_registers<output_registers(kPass, kK)>();
      block.outputs(kChains == 1 ? 0 : warpgroup - kChains);
    }
  } else if (warpgroup < pass_warpgroups(kPass, kChains)) {
    if constexpr (solves(kPass)) {
      release_registers<solver_registers(kPass)>();
      block.solve(warpgroup - kWithChains);
    }
  } else {
    if constexpr (kShares) release_registers<loader_registers(kPass, kK, kChains)>();
    const int warp = uniform(threadIdx.x / 32 % 4);
    if (warp == 0) {
      if (lane() == 0) block.load();
    } else if constexpr (!makes_outputs(kPass)) {
      if (warp <= kChains) block.store(kChains == 1 ? 0 : warp - 1);
    }
  }
}

}  // namespace hylo::gated_delta_rule
