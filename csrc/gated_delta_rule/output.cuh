// The pass over the chunks of a sequence. The state lives transposed in registers, 64 of its V columns a warpgroup: as
// an accumulator of the update and, packed to 16 bits, as the A operand of the products that read it. So nothing of the
// chain from chunk to chunk goes through memory:
//
//     [R | O]^T = S^T [K | Q]^T      X = beta (V - decay R)      Vn^T = X^T A^T      O^T += Vn^T P^T
//     S^T = decay S^T + (decay to the end * Vn)^T K
//
// A warp of its own loads what the products take from shared memory, others store what comes out.
#pragma once

#include "common/copy_engine.cuh"
#include "common/wgmma.cuh"
#include "gated_delta_rule/chunks.cuh"

namespace hylo::gated_delta_rule {

// The chunks a block runs through, of a sequence's: the state is right from `begin` on.
struct Range {
  int first, begin, end;
};

__device__ __forceinline__ float log_bound(const Params& p, int chunk, int head) {
  const long long index = static_cast<long long>(chunk) * p.heads + head;
  return *reinterpret_cast<const float*>(p.records + index * kRecordSize + kRecordFactors + 3 * kChunk * 4);
}

// A long sequence is cut into segments that run beside each other. Each starts from an empty state as many chunks early
// as the decays need to make what came before negligible. Where they decay too slowly at any of the cuts, the first
// block runs the whole sequence and the others nothing. Called by whole warps; lane i looks at cut i.
__device__ __forceinline__ Range range_of(const Params& p, int first, int chunks, int head, int segment) {
  const int each = (chunks + p.segments - 1) / p.segments;
  const int cut = lane() * each;
  int start = cut;
  bool negligible = cut == 0 || cut >= chunks;
  if (lane() < p.segments && !negligible) {
    float bound = 0.0f;
    while (!negligible && cut - start < kMaxWarmUp) {
      bound += log_bound(p, first + --start, head);
      negligible = bound < p.negligible || start == 0;
    }
  }
  const bool cuttable = __all_sync(kAllLanes, negligible || lane() >= p.segments);
  const int from = __shfl_sync(kAllLanes, start, segment);
  if (!uniform(cuttable)) return segment == 0 ? Range{0, 0, chunks} : Range{0, 0, -1};
  const int begin = segment * each;
  if (begin >= chunks && segment > 0) return {0, 0, -1};
  return {from, begin, begin + each < chunks ? begin + each : chunks};
}

// One stage of the ring in shared memory: per 64 columns of K a tile of keys and one of queries, then values, record.
template <int kK, int kWarpgroups>
struct Stage {
  static constexpr int kPairs = kK / kTile;
  static constexpr int kPairSize = 2 * kTileSize;
  static constexpr int kSize = stage_size(kK, kWarpgroups);

  unsigned char* base;

  __device__ __forceinline__ unsigned char* keys(int i) const { return base + i * kPairSize; }
  __device__ __forceinline__ unsigned char* queries(int i) const { return keys(i) + kTileSize; }
  __device__ __forceinline__ unsigned char* values(int i) const { return base + kPairs * kPairSize + i * kTileSize; }
  __device__ __forceinline__ unsigned char* record() const { return values(kWarpgroups); }
  __device__ __forceinline__ const float* factors(int which) const {
    return reinterpret_cast<const float*>(record() + kRecordFactors) + which * kChunk;
  }
};

template <int kK, int kWarpgroups>
__device__ __forceinline__ void load_stage(const Params& p, const Stage<kK, kWarpgroups>& stage, Barrier& full,
                                           const Chunk& chunk, long long record, int head, int first_value) {
  full.arrive_expecting(stage.kSize);
#pragma unroll
  for (int i = 0; i < stage.kPairs; ++i) {
    copy_box(stage.keys(i), p.k, full, i * kTile, head / p.group, chunk.begin, chunk.batch);
    copy_box(stage.queries(i), p.q, full, i * kTile, head / p.group, chunk.begin, chunk.batch);
  }
#pragma unroll
  for (int i = 0; i < kWarpgroups; ++i) {
    copy_box(stage.values(i), p.v, full, first_value + i * kTile, head, chunk.begin, chunk.batch);
  }
  copy_in(stage.record(), p.records + record * kRecordSize, kRecordSize, full);
}

// What one warpgroup does: 64 columns of V.
template <class T, int kK, int kWarpgroups>
class Columns {
 public:
  using Inputs = Stage<kK, kWarpgroups>;

  __device__ __forceinline__ Columns(const Params& p, int head, int sequence, int first_value, unsigned char* staging)
      : p_(p),
        value_(first_value + warp() * 16 + lane() / 4),
        state_(static_cast<long long>(sequence * p.heads + head) * kK * p.values),
        staging_(staging) {}

  // Volatile, so that the compiler does not compute all addresses before the first load: it has no registers for them.
  __device__ __forceinline__ void start(bool from_initial_state) {
#pragma unroll
    for (int i = 0; i < kK / 2; ++i) s_[i] = 0.0f;
    if (!from_initial_state) return;
#pragma unroll
    for (int i = 0; i < kK / 2; ++i) {
      asm volatile("ld.global.f32 %0, [%1];" : "=f"(s_[i]) : "l"(p_.initial_state + state_ + offset(i)));
    }
  }

  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int i = 0; i < kK / 2; ++i) {
      asm volatile("st.global.f32 [%0], %1;" ::"l"(p_.final_state + state_ + offset(i)), "f"(s_[i]) : "memory");
    }
  }

  // Everything of one chunk; its outputs go to the staging tile. Nobody else may touch either before it returns.
  __device__ __forceinline__ void run(const Inputs& stage, int tokens) {
    if (tokens < kChunk) clear_tail(stage, tokens);
    float r[32], o[32];
    read_state(stage, r, o);
    Word x[4][4];
    write_strengths(stage, r, x);

    // Vn^T = X^T A^T; the state decays meanwhile.
    const float* from_start = stage.factors(1);
    const float decay = from_start[kChunk - 1];
    wgmma::fence();
    multiply(r, x, stage.record() + kRecordInverse, false);
    wgmma::commit();
#pragma unroll
    for (int i = 0; i < kK / 2; ++i) s_[i] *= decay;
    scale_tokens(o, from_start);
    wgmma::wait<0>();
    wgmma::pin(r);

    Word written[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) wgmma::pack_operand<T>(x[i], r, i);
    scale_tokens(r, stage.factors(2));
#pragma unroll
    for (int i = 0; i < 4; ++i) wgmma::pack_operand<T>(written[i], r, i);

    wgmma::pin(o);
    wgmma::pin(s_);
    wgmma::fence();
    multiply(o, x, stage.record() + kRecordScores, true);
    wgmma::commit();
    const DoubleWord keys = wgmma::descriptor_n_major(shared_address(stage.keys(0)), Inputs::kPairSize);
#pragma unroll
    for (int i = 0; i < 4; ++i) wgmma::product_n_major<T>(s_, written[i], keys + i * wgmma::kNextNMajor, true);
    wgmma::commit();
    wgmma::wait<0>();
    wgmma::pin(o);
    wgmma::pin(s_);
    stage_output(o);
  }

 private:
  static __device__ __forceinline__ int warpgroup() { return threadIdx.x / 128; }
  static __device__ __forceinline__ int warp() { return threadIdx.x / 32 % 4; }
  __device__ __forceinline__ void sync() const { sync_threads(kWarpgroups == 1 ? 1 : 1 + warpgroup(), 128); }

  // Of an element of the state, within its head's [K, V].
  __device__ __forceinline__ int offset(int i) const {
    return (8 * (i / 4) + 2 * (lane() % 4) + i % 2) * p_.values + value_ + 8 * (i / 2 % 2);
  }

  // [R | O]^T = S^T [K | Q]^T, 64 columns of K at a time: few packed copies of S are alive, and the compiler sees that
  // no product in flight reads what it packs next.
  __device__ __forceinline__ void read_state(const Inputs& stage, float (&r)[32], float (&o)[32]) {
#pragma unroll
    for (int i = 0; i < Inputs::kPairs; ++i) {
      Word a[4][4];
#pragma unroll
      for (int j = 0; j < 4; ++j) wgmma::pack_operand<T>(a[j], s_, 4 * i + j);
      wgmma::fence();
      const DoubleWord pair = wgmma::descriptor_k_major(shared_address(stage.keys(i)));
#pragma unroll
      for (int j = 0; j < 4; ++j) wgmma::product_128<T>(r, o, a[j], pair + j * wgmma::kNextKMajor, i + j > 0);
      wgmma::commit();
      wgmma::wait<0>();
      wgmma::pin(r);
      wgmma::pin(o);
    }
  }

  // X = beta (V - decay R) as an operand; tokens that do not exist write nothing.
  __device__ __forceinline__ void write_strengths(const Inputs& stage, const float (&r)[32], Word (&x)[4][4]) {
    const float* beta = stage.factors(0);
    const float* from_start = stage.factors(1);
    const unsigned char* values = stage.values(warpgroup());
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Word v[4];
      load_transposed(v, values + matrix_row(i));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = 16 * i + 8 * half + 2 * (lane() % 4);
        const float2 strength = *reinterpret_cast<const float2*>(beta + token);
        const float2 decay = *reinterpret_cast<const float2*>(from_start + token);
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          const int at = 8 * i + 4 * half + 2 * row;
          float low, high;
          wgmma::unpack<T>(v[2 * half + row], low, high);
          low = strength.x == 0.0f ? 0.0f : strength.x * (low - decay.x * r[at]);
          high = strength.y == 0.0f ? 0.0f : strength.y * (high - decay.y * r[at + 1]);
          x[i][2 * half + row] = wgmma::pack<T>(low, high);
        }
      }
    }
  }

  // d += a b^T for a 64 x 64 tile b.
  static __device__ __forceinline__ void multiply(float (&d)[32], const Word (&a)[4][4],
                                                  const unsigned char* tile, bool accumulate) {
    const DoubleWord b = wgmma::descriptor_k_major(shared_address(tile));
#pragma unroll
    for (int i = 0; i < 4; ++i) wgmma::product_64<T>(d, a[i], b + i * wgmma::kNextKMajor, accumulate || i > 0);
  }

  static __device__ __forceinline__ void scale_tokens(float (&d)[32], const float* factors) {
#pragma unroll
    for (int block = 0; block < 8; ++block) {
      const float2 factor = *reinterpret_cast<const float2*>(factors + 8 * block + 2 * (lane() % 4));
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        d[4 * block + 2 * row] *= factor.x;
        d[4 * block + 2 * row + 1] *= factor.y;
      }
    }
  }

  // This lane's row address, within a tile of tokens x values, for the transposed moves of tokens 16 i to 16 i + 15.
  static __device__ __forceinline__ int matrix_row(int i) {
    return wgmma::swizzled(16 * i + 8 * (lane() / 16) + lane() % 8, 2 * warp() + lane() / 8 % 2);
  }

  __device__ __forceinline__ void stage_output(float (&o)[32]) {
#pragma unroll
    for (int i = 0; i < 32; ++i) o[i] *= p_.scale;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Word packed[4];
      wgmma::pack_operand<T>(packed, o, i);
      store_transposed(staging_ + matrix_row(i), packed);
    }
  }

  // The rows after a sequence's end belong to its neighbour: no number of theirs may enter a product with zero.
  __device__ __forceinline__ void clear_tail(const Inputs& stage, int tokens) {
    for (int i = threadIdx.x % 128; i < (kChunk - tokens) * 8; i += 128) {
      const int at = wgmma::swizzled(tokens + i / 8, i % 8);
      for (int pair = 0; pair < Inputs::kPairs; ++pair) {
        *reinterpret_cast<uint4*>(stage.keys(pair) + at) = make_uint4(0, 0, 0, 0);
      }
    }
    fence_async();
    sync();
  }

  const Params& p_;
  const int value_;
  const long long state_;
  unsigned char* const staging_;
  float s_[kK / 2];  // S^T: 64 columns of V x K
};

// A warp's copy of the staged outputs of one chunk and 64 columns to where they belong.
template <class T>
__device__ __forceinline__ void store_output(const Params& p, const Chunk& chunk, int head, int first_value,
                                             const unsigned char* staging) {
  T* out = static_cast<T*>(p.o) + first_value + 8 * (lane() % 8);
#pragma unroll 4
  for (int row = lane() / 8; row < chunk.tokens; row += 4) {
    const long long token = static_cast<long long>(chunk.batch) * p.tokens + chunk.begin + row;
    *reinterpret_cast<uint4*>(out + (token * p.heads + head) * p.values) =
        *reinterpret_cast<const uint4*>(staging + wgmma::swizzled(row, lane() % 8));
  }
}

// A stage of inputs, or a staging tile, that some warps fill and others empty.
struct Handover {
  Barrier full, empty;

  __device__ __forceinline__ void init(int fillers, int emptiers) {
    full.init(fillers);
    empty.init(emptiers);
  }
};

template <class T, int kK, int kWarpgroups>
__device__ __forceinline__ void output(const Params& p, unsigned char* shared) {
  constexpr int kStages = stages(kK, kWarpgroups);
  constexpr int kSize = stage_size(kK, kWarpgroups);
  __shared__ Handover inputs[kStages], outputs[kWarpgroups];
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) inputs[i].init(1, 4 * kWarpgroups);
    for (int i = 0; i < kWarpgroups; ++i) outputs[i].init(4, 1);
    fence_barrier_init();
  }
  __syncthreads();

  const int first_value = blockIdx.x * kWarpgroups * kTile;
  const int head = blockIdx.y;
  const int sequence_index = blockIdx.z / p.segments;
  const Sequence sequence = sequence_at(p, sequence_index);
  const int first = first_chunk(p, sequence_index);
  const int chunks = chunks_of(sequence.tokens);
  const Range range = range_of(p, first, chunks, head, blockIdx.z % p.segments);
  if (range.end < 0) return;
  const auto stage_of = [&](int i) { return Stage<kK, kWarpgroups>{shared + i % kStages * kSize}; };
  const auto staging_of = [&](int i) { return shared + kStages * kSize + i * kTileSize; };

  const int warpgroup = uniform(threadIdx.x / 128);
  if (warpgroup == kWarpgroups) {
    if constexpr (kWarpgroups > 1) release_registers<kLoaderRegisters>();
    const int warp = uniform(threadIdx.x / 32 % 4);
    if (warp == 0 && lane() == 0) {
      for (int c = range.first, i = 0; c < range.end; ++c, ++i) {
        Handover& input = inputs[i % kStages];
        if (i >= kStages) input.empty.wait((i / kStages - 1) & 1);
        const long long record = static_cast<long long>(first + c) * p.heads + head;
        load_stage(p, stage_of(i), input.full, chunk_of(sequence, c), record, head, first_value);
      }
    } else if (warp > 0 && warp <= kWarpgroups) {
      const int columns = warp - 1;
      for (int c = range.first, i = 0; c < range.end; ++c, ++i) {
        outputs[columns].full.wait(i & 1);
        if (c >= range.begin) {  // before, the state warms up
          store_output<T>(p, chunk_of(sequence, c), head, first_value + columns * kTile, staging_of(columns));
        }
        __syncwarp();
        if (lane() == 0) outputs[columns].empty.arrive();
      }
    }
    return;
  }

  if constexpr (kWarpgroups > 1) claim_registers<kColumnsRegisters>();
  Columns<T, kK, kWarpgroups> columns(p, head, sequence_index, first_value + warpgroup * kTile, staging_of(warpgroup));
  columns.start(range.first == 0 && p.initial_state != nullptr);
  for (int c = range.first, i = 0; c < range.end; ++c, ++i) {
    inputs[i % kStages].full.wait(i / kStages & 1);
    if (i > 0) outputs[warpgroup].empty.wait((i - 1) & 1);
    columns.run(stage_of(i), chunk_of(sequence, c).tokens);
    __syncwarp();
    if (lane() == 0) {
      inputs[i % kStages].empty.arrive();
      outputs[warpgroup].full.arrive();
    }
  }
  if (range.end == chunks) columns.finish();
}

}  // namespace hylo::gated_delta_rule
