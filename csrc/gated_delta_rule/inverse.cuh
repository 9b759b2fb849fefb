// Makes the records for the passes that do not solve themselves.
#pragma once

#include "gated_delta_rule/pipeline.cuh"
#include "gated_delta_rule/solver.cuh"

namespace hylo::gated_delta_rule {

// A block makes one record after the other, of its head's chunks, and loads the next one's inputs before it writes one.
template <class T, int kK>
__device__ __forceinline__ void inverse(const Params& p, unsigned char* shared) {
  constexpr int kTiles = kK / kTile;
  __shared__ Gates gates[2];
  __shared__ Barrier loaded;
  unsigned char* keys = shared;
  unsigned char* queries = keys + kTiles * kTileSize;
  unsigned char* record = shared + inverse_inputs(kK);
  float* lower = reinterpret_cast<float*>(record);

  const int head = blockIdx.y;
  const auto load = [&](const Chunk& chunk) {
    if (threadIdx.x > 0 || chunk.tokens == 0) return;
    loaded.arrive_expecting(2 * kTiles * kTileSize);
    for (int i = 0; i < kTiles; ++i) {
      copy_box(keys + i * kTileSize, p.k, loaded, i * kTile, head / p.group, chunk.begin, chunk.batch);
      copy_box(queries + i * kTileSize, p.q, loaded, i * kTile, head / p.group, chunk.begin, chunk.batch);
    }
  };
  // The next chunk that this pass is to have; with cu_seqlens fewer may exist than there is room for.
  int sequence = -1;
  bool others = false;  // the sequence is the solving pass's
  const auto next = [&](int& index) {
    for (; index < p.chunks; index += gridDim.x) {
      const Chunk chunk = chunk_at(p, index);
      if (chunk.tokens == 0) break;
      if (p.shares_heads && chunk.sequence != sequence) {
        sequence = chunk.sequence;
        others = cuttable(p, sequence, head);
      }
      if (!others) return chunk;
    }
    return Chunk{};
  };

  int index = blockIdx.x;
  Chunk chunk = next(index);
  if (chunk.tokens == 0) return;
  if (threadIdx.x == 0) {
    loaded.init(1);
    fence_barrier_init();
  }
  Solver<T, kK> solver(p, head, lower, gates, 0);
  solver.sync();
  load(chunk);
  int after = index + gridDim.x;
  Chunk following = next(after);
  solver.start(chunk, following);
  for (int turn = 0; chunk.tokens > 0; ++turn) {
    int later = after + gridDim.x;
    const Chunk last = following.tokens > 0 ? next(later) : Chunk{};
    loaded.wait(turn & 1);
    if (threadIdx.x == 0) await_copies_out<0>();
    solver.solve(keys, queries, chunk, last, [] {});
    load(following);
    solver.template write<true>(record);
    fence_async();
    solver.sync();
    if (threadIdx.x == 0) {
      copy_out(p.records + (static_cast<long long>(index) * p.heads + head) * kRecordSize, record, kRecordSize);
      commit_copies_out();
    }
    index = after, after = later;
    chunk = following, following = last;
  }
  if (threadIdx.x == 0) await_copies_out<0>();
}

}  // namespace hylo::gated_delta_rule
