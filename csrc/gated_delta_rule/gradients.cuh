// Everything of the backward that needs no walk from chunk to chunk. A translation unit of its own: the build passes
// HYLO_T (type of q, k, v and their gradients: bf16 or fp16) and HYLO_K (key width).
//
// With h the state before a chunk, dh the gradient of that after it, fs and te a token's decay from the start and to
// the end, Vn what the tokens wrote and dX the gradient of what they solved for, all of one chunk and value head; of dX
// there is Z = handed dX, with beta = handed left (solver.cuh):
//
//     read = scale fs (dO h^T)       removed = fs (Z h^T)        written = te (Vn dh^T)                [C, K]
//     dP = scale D * (dO Vn^T)       E = -left D * (Z Vn^T), below the diagonal                        [C, C]
//     dQ = read + dP K               dK = written - left removed + dP^T Q + (E + E^T) K
//     dV = left Z                    dbeta = (Z . V + sum_j (E / left) (k_i . k_j) - k . removed) / handed
//
// and dg of gradients_sums.cuh. A block runs through chunks and key heads, for a part of K. One warp loads, ahead into
// the next chunk; each warpgroup that computes has 64 columns of K and one of the two [C, C] products (both, if alone).
#include "common/copy_engine.cuh"
#include "common/wgmma.cuh"
#include "gated_delta_rule/gradients_params.h"
#include "gated_delta_rule/gradients_sums.cuh"
#include "gated_delta_rule/gradients_traits.cuh"
#include "gated_delta_rule/pipeline.cuh"

namespace hylo::gated_delta_rule {

// What comes with the first stage of a chunk and value head.
struct alignas(16) Head {
  float factors[kFactors * kChunk];
  int batch, begin, tokens;  // of the chunk; no tokens: nothing is left to do
  int key_head, part;
  int inputs_phase;  // of the barrier that says when its queries and keys are there

  __device__ __forceinline__ const float* factor(Factor which) const { return factors + which * kChunk; }
};

// Sums by token; of those over K, each warpgroup has its columns'.
template <int kWarpgroups>
struct TokenSums {
  float reads[kWarpgroups][kChunk];    // q . read - left k . removed
  float removed[kWarpgroups][kChunk];  // k . removed
  float writes[kWarpgroups][kChunk];   // k . written
  // Of the pairs dP * q k^T and E * k k^T, in warp w's rows 16 w to 16 w + 15:
  float rows[2][kChunk];               // rows before column 16 w
  float columns[2][4][kChunk];         // and columns, for each w
  float within[2][kChunk];             // the block on the diagonal (`sum_across`)
  float solve[kChunk];                 // sum_j (E / left) (k_i . k_j)
  float values[kChunk];                // z . v
  float kept[4 * kWarpgroups];         // h . dh, of each warp
};

template <int kK>
struct GradientsShape {
  static constexpr int kWarpgroups = gradients_warpgroups(kK);
  static constexpr int kThreads = 128 * kWarpgroups;  // that compute
  static constexpr int kParts = gradients_parts(kK);
  static constexpr int kStages = gradients_stages(kK);
  // A stage is filled when all have emptied the one kStages before it, so are past the value heads before that one's.
  static constexpr int kHeads = kStages + 1;
};

// Shared memory: stages, inputs and scores are tiles, of 64 rows of 128 bytes; the rest is `Small`.
template <int kK>
struct Memory {
  using Shape = GradientsShape<kK>;
  static constexpr int kWarpgroups = Shape::kWarpgroups;

  struct Small {
    Handover stages[Shape::kStages], inputs;
    Head heads[Shape::kHeads];
    TokenSums<kWarpgroups> sums;
  };

  Small& small;
  unsigned char* tiles;

  // Of stage i: h and dh, a tile of 64 rows a warpgroup; then tokens.
  enum Tokens { kDo, kDx, kWritten, kValues };
  __device__ __forceinline__ unsigned char* stage(int i) const { return tiles + i * gradients_stage_size(kK); }
  __device__ __forceinline__ unsigned char* states(int i) const { return stage(i); }
  __device__ __forceinline__ unsigned char* dstates(int i) const { return stage(i) + kWarpgroups * kTileSize; }
  __device__ __forceinline__ unsigned char* tokens(int i, Tokens which) const {
    return stage(i) + (2 * kWarpgroups + which) * kTileSize;
  }
  // A tile a warpgroup.
  __device__ __forceinline__ unsigned char* queries() const { return stage(Shape::kStages); }
  __device__ __forceinline__ unsigned char* keys() const { return queries() + kWarpgroups * kTileSize; }
  // dP, then E.
  __device__ __forceinline__ unsigned char* scores(int which) const {
    return queries() + gradients_inputs_size(kK) + which * kTileSize;
  }
  __device__ __forceinline__ unsigned char* kept_dk() const { return scores(2); }
};

// --- the warp that loads ---

template <int kK>
class Loader {
 public:
  using Shape = GradientsShape<kK>;

  __device__ __forceinline__ Loader(const GradientsParams& p, const Memory<kK>& memory) : p_(p), memory_(memory) {}

  // Called by a whole warp: chunks are found by all lanes.
  __device__ __forceinline__ void run() {
    const int key_heads = p_.common.heads / p_.common.group;
    const int work = p_.common.chunks * key_heads * Shape::kParts;
    for (int i = blockIdx.x; i < work; i += gridDim.x) {
      part_ = i % Shape::kParts;
      key_head_ = i / Shape::kParts % key_heads;
      index_ = i / Shape::kParts / key_heads;
      chunk_ = chunk_at(p_.common, index_);
      if (chunk_.tokens <= 0) break;
      if (lane() == 0) load_chunk();
      __syncwarp();
    }
    chunk_.tokens = 0;
    if (lane() == 0) {
      announce();
      memory_.small.stages[stage_ % Shape::kStages].full.arrive();
    }
  }

 private:
  static constexpr int kRows = Shape::kWarpgroups * kTile;  // of K

  // The queries and keys come as late as the ring allows: their place is free when the chunk before is done, that of
  // the stages sooner.
  __device__ __forceinline__ void load_chunk() {
    const int ahead = stage_ + Shape::kStages;
    bool loaded = false;
    for (int r = 0; r < p_.common.group; ++r, ++head_) {
      for (int tile = 0; tile * kTile < p_.common.values; ++tile) {
        if (!loaded && stage_ == ahead) load_inputs(), loaded = true;
        if (tile == 0) announce();
        load_stage(key_head_ * p_.common.group + r, tile);
        ++stage_;
      }
    }
    if (!loaded) load_inputs();
    ++input_;
  }

  // Waits for the next stage, with which the head comes.
  __device__ __forceinline__ void announce() {
    await_stage();
    Head& head = memory_.small.heads[head_ % Shape::kHeads];
    head.batch = chunk_.batch;
    head.begin = chunk_.begin;
    head.tokens = chunk_.tokens;
    head.key_head = key_head_;
    head.part = part_;
    head.inputs_phase = input_ & 1;
  }

  // The phase before the first counts as done.
  __device__ __forceinline__ void await_stage() {
    memory_.small.stages[stage_ % Shape::kStages].empty.wait(stage_ / Shape::kStages & 1 ^ 1);
  }

  __device__ __forceinline__ void load_stage(int head, int tile) {
    await_stage();
    const int at = stage_ % Shape::kStages, x = tile * kTile;
    const bool first = tile == 0, values = tile % Shape::kParts == part_;
    Barrier& full = memory_.small.stages[at].full;
    constexpr int kTiles = 2 * Shape::kWarpgroups + 3;
    full.arrive_expecting(kTiles * kTileSize + (values ? kTileSize : 0) + (first ? kFactorsSize : 0));
    copy_box(memory_.states(at), p_.h, full, x, part_ * kRows, head, index_);
    copy_box(memory_.tokens(at, Memory<kK>::kDo), p_.d_o, full, x, head, chunk_.begin, chunk_.batch);
    copy_box(memory_.tokens(at, Memory<kK>::kDx), p_.dx, full, x, head, chunk_.begin, chunk_.batch);
    copy_box(memory_.dstates(at), p_.dh, full, x, part_ * kRows, head, index_);
    copy_box(memory_.tokens(at, Memory<kK>::kWritten), p_.v_new, full, x, head, chunk_.begin, chunk_.batch);
    if (values) {
      copy_box(memory_.tokens(at, Memory<kK>::kValues), p_.common.v, full, x, head, chunk_.begin, chunk_.batch);
    }
    if (first) {
      const long long record = static_cast<long long>(index_) * p_.common.heads + head;
      copy_in(memory_.small.heads[head_ % Shape::kHeads].factors,
              p_.common.records + record * kRecordSize + kRecordFactors, kFactorsSize, full);
    }
  }

  __device__ __forceinline__ void load_inputs() {
    Handover& inputs = memory_.small.inputs;
    inputs.empty.wait(input_ & 1 ^ 1);
    inputs.full.arrive_expecting(gradients_inputs_size(kK));
#pragma unroll
    for (int i = 0; i < Shape::kWarpgroups; ++i) {
      const int x = part_ * kRows + i * kTile;
      copy_box(memory_.queries() + i * kTileSize, p_.common.q, inputs.full, x, key_head_, chunk_.begin, chunk_.batch);
      copy_box(memory_.keys() + i * kTileSize, p_.common.k, inputs.full, x, key_head_, chunk_.begin, chunk_.batch);
    }
  }

  const GradientsParams& p_;
  const Memory<kK>& memory_;
  int index_, key_head_, part_;
  Chunk chunk_;
  int stage_ = 0, head_ = 0, input_ = 0;  // so many so far
};

// --- the warpgroups that compute ---

// 8 x 8 matrices of 16-bit numbers; lane 8 i + n gives the address of row n of matrix i.
__device__ __forceinline__ void load_matrices(Word (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared::cta.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a b^T over the 64 columns of two tiles.
template <class T>
__device__ __forceinline__ void multiply_rows(float (&d)[32], const unsigned char* a, const unsigned char* b) {
  const DoubleWord left = wgmma::descriptor_k_major(shared_address(a));
  const DoubleWord right = wgmma::descriptor_k_major(shared_address(b));
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const DoubleWord step = i * wgmma::kNextKMajor;
    wgmma::product_shared<T, wgmma::kAlongK, wgmma::kAlongK>(d, left + step, right + step, true);
  }
}

// d += a b or, along M, a^T b.
template <class T, wgmma::Major kMajor>
__device__ __forceinline__ void multiply_tiles(float (&d)[32], const unsigned char* a, const unsigned char* b) {
  constexpr bool kTransposed = kMajor == wgmma::kAlongMN;
  const DoubleWord left = kTransposed ? wgmma::descriptor_n_major(shared_address(a), kTileSize)
                                      : wgmma::descriptor_k_major(shared_address(a));
  const DoubleWord right = wgmma::descriptor_n_major(shared_address(b), kTileSize);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    wgmma::product_shared<T, kMajor, wgmma::kAlongMN>(
        d, left + i * (kTransposed ? wgmma::kNextNMajor : wgmma::kNextKMajor), right + i * wgmma::kNextNMajor, true);
  }
}

__device__ __forceinline__ void clear(float (&d)[32]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) d[i] = 0.0f;
}

template <class T, int kK>
class Gradients {
 public:
  using Shape = GradientsShape<kK>;
  static constexpr int kWarpgroups = Shape::kWarpgroups;

  __device__ __forceinline__ Gradients(const GradientsParams& p, const Memory<kK>& memory)
      : p_(p),
        memory_(memory),
        warpgroup_(kWarpgroups == 1 ? 0 : uniform(threadIdx.x / 128)),
        warp_(uniform(threadIdx.x / 32 % 4)) {}

  __device__ __forceinline__ void run() {
    auto& small = memory_.small;
    for (int stage = 0, index = 0;;) {
      const Head* head;
      for (int r = 0; r < p_.common.group; ++r, ++index) {
        small.stages[stage % Shape::kStages].full.wait(stage / Shape::kStages & 1);
        head = &small.heads[index % Shape::kHeads];
        tokens_ = uniform(head->tokens);
        if (tokens_ == 0) return;
        const int value_head = head->key_head * p_.common.group + r;
        run_through_values(*head, value_head, stage);
        small.inputs.full.wait(head->inputs_phase);
        finish_head(*head, value_head, r == 0, r + 1 == p_.common.group);
      }
      store_gradients(*head);
      small.inputs.empty.arrive();
    }
  }

 private:
  static constexpr int kProducts = 2 / kWarpgroups;  // of [C, C], a warpgroup's
  static constexpr int kPasses = 4 / kWarpgroups;    // over a tile's rows, 16 bytes a thread

  __device__ __forceinline__ void sync() const { sync_threads(1, Shape::kThreads); }
  __device__ __forceinline__ void sync_warpgroup() const {
    if constexpr (kWarpgroups == 1) {
      sync();
    } else {
      sync_threads(2 + warpgroup_, 128);
    }
  }

  // This thread's rows of an accumulator are row() and row() + 8.
  __device__ __forceinline__ int row() const { return 16 * warp_ + lane() / 4; }
  // Where this lane points `load_matrices` and `store_matrices` for columns 16 i to 16 i + 15 of an accumulator's tile.
  __device__ __forceinline__ int matrix_row(int i) const {
    return wgmma::swizzled(16 * warp_ + lane() % 16, 2 * i + lane() / 16);
  }

  // --- over the columns of V ---

  __device__ __forceinline__ void run_through_values(const Head& head, int value_head, int& stage) {
    clear(dq_);
    clear(removed_);
    clear(dk_);
#pragma unroll
    for (int i = 0; i < kProducts; ++i) clear(pairs_[i]);
#pragma unroll
    for (int i = 0; i < 2; ++i) kept_[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) values_[i] = 0.0f;
    const int part = uniform(head.part);
    for (int tile = 0; tile * kTile < p_.common.values; ++tile, ++stage) {
      const int at = stage % Shape::kStages;
      memory_.small.stages[at].full.wait(stage / Shape::kStages & 1);
      if (tokens_ < kChunk) clear_tail(memory_.tokens(at, Memory<kK>::kDo), 3);
      multiply_stage(at);
      keep(at);
      if (tile % Shape::kParts == part) pass_values(head, value_head, tile, at);
      wgmma::wait<0>();
      pin_products();
      memory_.small.stages[at].empty.arrive();
    }
  }

  // The rows after a sequence's end belong to its neighbour: no number of theirs may enter a product with zero.
  __device__ __forceinline__ void clear_tail(unsigned char* tiles, int count) const {
#pragma unroll 1
    for (int i = threadIdx.x; i < (kChunk - tokens_) * 8; i += Shape::kThreads) {
      unsigned char* at = tiles + wgmma::swizzled(tokens_ + i / 8, i % 8);
#pragma unroll 1
      for (int tile = 0; tile < count; ++tile) {
        *reinterpret_cast<uint4*>(at + tile * kTileSize) = make_uint4(0, 0, 0, 0);
      }
    }
    fence_async();
    sync();
  }

  __device__ __forceinline__ void multiply_stage(int at) {
    const unsigned char* d_o = memory_.tokens(at, Memory<kK>::kDo);
    const unsigned char* dx = memory_.tokens(at, Memory<kK>::kDx);
    const unsigned char* v_new = memory_.tokens(at, Memory<kK>::kWritten);
    const unsigned char* h = memory_.states(at) + warpgroup_ * kTileSize;
    pin_products();
    wgmma::fence();
    multiply_rows<T>(dq_, d_o, h);
    multiply_rows<T>(removed_, dx, h);
    multiply_rows<T>(dk_, v_new, memory_.dstates(at) + warpgroup_ * kTileSize);
    if constexpr (kWarpgroups == 1) {
      multiply_rows<T>(pairs_[0], d_o, v_new);
      multiply_rows<T>(pairs_[1], dx, v_new);
    } else {
      multiply_rows<T>(pairs_[0], warpgroup_ == 0 ? d_o : dx, v_new);
    }
    wgmma::commit();
  }

  __device__ __forceinline__ void pin_products() {
    wgmma::pin(dq_);
    wgmma::pin(removed_);
    wgmma::pin(dk_);
#pragma unroll
    for (int i = 0; i < kProducts; ++i) wgmma::pin(pairs_[i]);
  }

  // h . dh of this warpgroup's rows: the same places of both tiles.
  __device__ __forceinline__ void keep(int at) {
    const int first = warpgroup_ * kTileSize + threadIdx.x % 128 * 16;
#pragma unroll 1  // the registers are the accumulators', and the products take longer anyway
    for (int i = 0; i < kTileSize / (128 * 16); ++i) {
      const uint4 a = *reinterpret_cast<const uint4*>(memory_.states(at) + first + i * 128 * 16);
      const uint4 b = *reinterpret_cast<const uint4*>(memory_.dstates(at) + first + i * 128 * 16);
      add_products(kept_, a, b);
    }
  }

  // Even and odd elements apart, so that no sum waits for the one just before it.
  static __device__ __forceinline__ void add_products(float (&sums)[2], const uint4& a, const uint4& b) {
    const Word left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float low[2], high[2];
      wgmma::unpack<T>(left[i], low[0], high[0]);
      wgmma::unpack<T>(right[i], low[1], high[1]);
      sums[0] += low[0] * low[1];
      sums[1] += high[0] * high[1];
    }
  }

  // dv = left z, and z . v. Eight lanes have a row.
  __device__ __forceinline__ void pass_values(const Head& head, int value_head, int tile, int at) {
    const int column = tile * kTile + 8 * (lane() % 8);
    const long long token = static_cast<long long>(head.batch) * p_.common.tokens + head.begin;
    T* dv = static_cast<T*>(p_.dv) + column;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int row = value_row(i);
      if (row >= tokens_ || column >= p_.common.values) continue;
      const int place = wgmma::swizzled(row, lane() % 8);
      const uint4 dx = *reinterpret_cast<const uint4*>(memory_.tokens(at, Memory<kK>::kDx) + place);
      const uint4 v = *reinterpret_cast<const uint4*>(memory_.tokens(at, Memory<kK>::kValues) + place);
      float sums[2] = {values_[i], 0.0f};
      add_products(sums, dx, v);
      values_[i] = sums[0] + sums[1];
      *reinterpret_cast<uint4*>(dv + ((token + row) * p_.common.heads + value_head) * p_.common.values) =
          scaled(dx, head.factor(kLeft)[row]);
    }
  }

  static __device__ __forceinline__ int value_row(int i) { return threadIdx.x / 8 + i * (Shape::kThreads / 8); }

  static __device__ __forceinline__ uint4 scaled(const uint4& x, float factor) {
    const auto scale = [&](Word both) {
      float low, high;
      wgmma::unpack<T>(both, low, high);
      return wgmma::pack<T>(factor * low, factor * high);
    };
    return make_uint4(scale(x.x), scale(x.y), scale(x.z), scale(x.w));
  }

  // --- once a value head ---

  __device__ __forceinline__ void finish_head(const Head& head, int value_head, bool first, bool last) {
    if (first && tokens_ < kChunk) clear_tail(memory_.queries(), 2 * kWarpgroups);
    StateSums states;
    add_states(head, first, states);
    sync();  // all are done with what the head before left in shared memory
    leave_values();
    leave_states(head, states);
#pragma unroll
    for (int i = 0; i < kProducts; ++i) differentiate_scores(head, kWarpgroups == 1 ? i : warpgroup_, pairs_[i]);
    fence_async();
    sync();

    add_scores();
    const int warp = 4 * warpgroup_ + warp_;
    if (warp == 0) write_gates(head, value_head);
    if (warp == 1) write_strengths(head, value_head);
    wgmma::wait<0>();
    wgmma::pin(dq_);
    wgmma::pin(dk_);
    if (!first) recall_dk();
    if (!last) keep_gradients();
  }

  // What was summed over the columns of V.
  __device__ __forceinline__ void leave_values() {
    auto& sums = memory_.small.sums;
    float kept = kept_[0] + kept_[1];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) kept += __shfl_xor_sync(kAllLanes, kept, step);
    if (lane() == 0) sums.kept[4 * warpgroup_ + warp_] = kept;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
#pragma unroll
      for (int step = 4; step > 0; step /= 2) values_[i] += __shfl_xor_sync(kAllLanes, values_[i], step);
      if (lane() % 8 == 0) sums.values[value_row(i)] = values_[i];
    }
  }

  // q . read, k . removed and k . written before their factors, of this thread's rows and columns.
  struct StateSums {
    float reads[2] = {}, removed[2] = {}, writes[2] = {};
  };

  // Makes the products with the states the first part of dq and dk; dq has the value heads before as well.
  __device__ __forceinline__ void add_states(const Head& head, bool first, StateSums& sums) {
    const unsigned char* queries = memory_.queries() + warpgroup_ * kTileSize;
    const unsigned char* keys = memory_.keys() + warpgroup_ * kTileSize;
    float read_factor[2], removed_factor[2], written_factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float from_start = head.factor(kFromStart)[row() + 8 * r];
      read_factor[r] = p_.common.scale * from_start;
      removed_factor[r] = -head.factor(kLeft)[row() + 8 * r] * from_start;
      written_factor[r] = head.factor(kToEnd)[row() + 8 * r];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float before[8] = {};
      if (!first) recall_dq(i, before);
      Word q[4], k[4];
      load_matrices(q, queries + matrix_row(i));
      load_matrices(k, keys + matrix_row(i));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int r = j % 2;
        float q_pair[2], k_pair[2];
        wgmma::unpack<T>(q[j], q_pair[0], q_pair[1]);
        wgmma::unpack<T>(k[j], k_pair[0], k_pair[1]);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int d = 8 * i + 2 * j + e;
          sums.reads[r] += q_pair[e] * dq_[d];
          sums.removed[r] += k_pair[e] * removed_[d];
          sums.writes[r] += k_pair[e] * dk_[d];
          dq_[d] = before[2 * j + e] + read_factor[r] * dq_[d];
          dk_[d] = written_factor[r] * dk_[d] + removed_factor[r] * removed_[d];
        }
      }
    }
  }

  __device__ __forceinline__ void leave_states(const Head& head, const StateSums& states) {
    auto& sums = memory_.small.sums;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = row() + 8 * r;
      const float from_start = head.factor(kFromStart)[i];
      const float read = p_.common.scale * from_start * sum_columns(states.reads[r]);
      const float removed = from_start * sum_columns(states.removed[r]);
      const float written = head.factor(kToEnd)[i] * sum_columns(states.writes[r]);
      if (lane() % 4 == 0) {
        sums.reads[warpgroup_][i] = read - head.factor(kLeft)[i] * removed;
        sums.removed[warpgroup_][i] = removed;
        sums.writes[warpgroup_][i] = written;
      }
    }
  }

  // dP (which 0) or E (1) as an operand, out of their product without decays, and the sums of its pairs. Only what this
  // block's columns of K add to q . k or k . k: the sums are linear in it.
  __device__ __forceinline__ void differentiate_scores(const Head& head, int which, const float (&scores)[32]) {
    float products[32];
    multiply_inputs(products, which == 0 ? memory_.queries() : memory_.keys(), memory_.keys());
    const float* high = head.factor(kDecayHigh);
    const float* low = head.factor(kDecayLow);
    const int seen = which == 0 ? 1 : 0;  // a query sees its own key
    float factor[2], row_high[2], row_low[2], solve[2] = {}, rows[2] = {};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      factor[r] = which == 0 ? p_.common.scale : -head.factor(kLeft)[row() + 8 * r];
      row_high[r] = high[row() + 8 * r];
      row_low[r] = low[row() + 8 * r];
    }
#pragma unroll
    for (int block = 0; block < 4; ++block) {
      Word packed[4] = {};
      if (block <= warp_) {  // the rest lies above the diagonal
        float pairs[2][4];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int column = 16 * block + 8 * h + 2 * (lane() % 4);
          const float2 column_high = *reinterpret_cast<const float2*>(high + column);
          const float2 column_low = *reinterpret_cast<const float2*>(low + column);
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const int below = row() + 8 * r - column;
            float score[2];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int d = 8 * block + 4 * h + 2 * r + e;
              const float ratio = exp2_fast((row_high[r] - (e == 0 ? column_high.x : column_high.y)) +
                                            (row_low[r] - (e == 0 ? column_low.x : column_low.y)));
              const float decayed = below + seen > e ? ratio * scores[d] : 0.0f;
              const float pair = below > e ? decayed * products[d] : 0.0f;
              score[e] = factor[r] * decayed;
              solve[r] -= pair;
              pairs[r][2 * h + e] = factor[r] * pair;
            }
            packed[2 * h + r] = wgmma::pack<T>(score[0], score[1]);
          }
        }
        leave_pairs(which, block, pairs, rows);
      }
      store_matrices(memory_.scores(which) + matrix_row(block), packed);
    }
    leave_row(memory_.small.sums.rows[which], rows);
    if (which == 1) leave_row(memory_.small.sums.solve, solve);
  }

  // The sums over columns 16 block to 16 block + 15 of this warp's pairs.
  __device__ __forceinline__ void leave_pairs(int which, int block, const float (&pairs)[2][4], float (&rows)[2]) {
    auto& sums = memory_.small.sums;
    float columns[4];
    if (block < warp_) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        rows[0] += pairs[0][i];
        rows[1] += pairs[1][i];
        columns[i] = pairs[0][i] + pairs[1][i];
      }
    } else {
      sum_across(pairs, columns);
    }
    const float sum = sum_rows(columns);
    float* out = block < warp_ ? sums.columns[which][warp_] : sums.within[which];
    const int column = 16 * block + lane() / 16 * 8 + lane() % 4 * 2 + lane() / 8 % 2;  // lane() / 8 is 2 h + e
    if (lane() / 4 % 2 == 0) out[column] = sum;                                         // two lanes have the same
  }

  __device__ __forceinline__ void leave_row(float* out, const float (&values)[2]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = sum_columns(values[r]);
      if (lane() % 4 == 0) out[row() + 8 * r] = sum;
    }
  }

  // d = a b^T over all of the block's columns.
  static __device__ __forceinline__ void multiply_inputs(float (&d)[32], const unsigned char* a,
                                                         const unsigned char* b) {
    clear(d);
    wgmma::pin(d);
    wgmma::fence();
#pragma unroll
    for (int i = 0; i < kWarpgroups; ++i) multiply_rows<T>(d, a + i * kTileSize, b + i * kTileSize);
    wgmma::commit();
    wgmma::wait<0>();
    wgmma::pin(d);
  }

  // dq += dP K, dk += dP^T Q + (E + E^T) K, in flight.
  __device__ __forceinline__ void add_scores() {
    const unsigned char* queries = memory_.queries() + warpgroup_ * kTileSize;
    const unsigned char* keys = memory_.keys() + warpgroup_ * kTileSize;
    wgmma::pin(dq_);
    wgmma::pin(dk_);
    wgmma::fence();
    multiply_tiles<T, wgmma::kAlongK>(dq_, memory_.scores(0), keys);
    multiply_tiles<T, wgmma::kAlongMN>(dk_, memory_.scores(0), queries);
    multiply_tiles<T, wgmma::kAlongK>(dk_, memory_.scores(1), keys);
    multiply_tiles<T, wgmma::kAlongMN>(dk_, memory_.scores(1), keys);
    wgmma::commit();
  }

  // A warp's, two tokens a lane. Past a gate of -inf all decays are 0, so its gradient comes out as 0.
  __device__ __forceinline__ void write_gates(const Head& head, int value_head) const {
    const auto& sums = memory_.small.sums;
    const int t = 2 * lane();
    float reads[2], writes[2], rows[2], out[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      reads[e] = over_columns(sums.reads, t + e);
      writes[e] = over_columns(sums.writes, t + e);
      rows[e] = sums.rows[0][t + e] + sums.rows[1][t + e];
      out[e] = sums.within[0][t + e] + sums.within[1][t + e];
    }
    sum_to_end<32>(reads);
    sum_to_end<8>(rows);  // within the 16 tokens of a warp
    sum_before(writes);
    float kept = 0.0f;
#pragma unroll
    for (int i = 0; i < 4 * kWarpgroups; ++i) kept += sums.kept[i];
    kept *= head.factor(kFromStart)[kChunk - 1];
#pragma unroll
    for (int w = 1; w < 4; ++w) {  // pairs with rows of later warps
      const bool later = 16 * w > t;
      float columns[2] = {};
#pragma unroll
      for (int e = 0; e < 2 && later; ++e) columns[e] = sums.columns[0][w][t + e] + sums.columns[1][w][t + e];
      sum_before(columns);
      if (later) out[0] += columns[0], out[1] += columns[1];
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (t + e < tokens_) p_.dg[gate(head, value_head, t + e)] = out[e] + rows[e] + reads[e] + writes[e] + kept;
    }
  }

  __device__ __forceinline__ void write_strengths(const Head& head, int value_head) const {
    const auto& sums = memory_.small.sums;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int t = lane() + 32 * e;
      if (t < tokens_) {
        const float sum = sums.values[t] + sums.solve[t] - over_columns(sums.removed, t);
        p_.dbeta[gate(head, value_head, t)] = sum / head.factor(kHanded)[t];
      }
    }
  }

  static __device__ __forceinline__ float over_columns(const float (&sums)[kWarpgroups][kChunk], int t) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kWarpgroups; ++i) sum += sums[i][t];
    return sum;
  }

  // Where a token's gate is in dg and dbeta.
  __device__ __forceinline__ long long gate(const Head& head, int value_head, int t) const {
    const long long token = static_cast<long long>(head.batch) * p_.common.tokens + head.begin + t;
    return head.part * p_.gates + token * p_.common.heads + value_head;
  }

  // dq and dk of the value heads so far, for the next one. There are registers for dq at most, and in a single
  // warpgroup not for that: it lies where dP and E come later. Every thread has its own places.
  __device__ __forceinline__ void keep_gradients() {
    if constexpr (kWarpgroups == 1) sync();  // no product reads dP and E
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      kept_dk(i) = make_float4(dk_[4 * i], dk_[4 * i + 1], dk_[4 * i + 2], dk_[4 * i + 3]);
      if constexpr (kWarpgroups == 1) {
        kept_dq(i) = make_float4(dq_[4 * i], dq_[4 * i + 1], dq_[4 * i + 2], dq_[4 * i + 3]);
      } else {
#pragma unroll
        for (int d = 4 * i; d < 4 * i + 4; ++d) dq_before_[d] = dq_[d];
      }
    }
  }

  // Columns 16 block to 16 block + 15 of dq.
  __device__ __forceinline__ void recall_dq(int block, float (&out)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      if constexpr (kWarpgroups == 1) {
        const float4 x = kept_dq((8 * block + i) / 4);
        out[i] = x.x, out[i + 1] = x.y, out[i + 2] = x.z, out[i + 3] = x.w;
      } else {
#pragma unroll
        for (int d = i; d < i + 4; ++d) out[d] = dq_before_[8 * block + d];
      }
    }
  }

  __device__ __forceinline__ void recall_dk() {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float4 x = kept_dk(i);
      dk_[4 * i] += x.x, dk_[4 * i + 1] += x.y, dk_[4 * i + 2] += x.z, dk_[4 * i + 3] += x.w;
    }
  }

  __device__ __forceinline__ float4& kept_dq(int i) const {
    return reinterpret_cast<float4*>(memory_.scores(0))[i * Shape::kThreads + threadIdx.x];
  }
  __device__ __forceinline__ float4& kept_dk(int i) const {
    return reinterpret_cast<float4*>(memory_.kept_dk())[i * Shape::kThreads + threadIdx.x];
  }

  // --- once a chunk ---

  // In place of the queries and keys.
  __device__ __forceinline__ void store_gradients(const Head& head) {
    unsigned char* queries = memory_.queries() + warpgroup_ * kTileSize;
    unsigned char* keys = memory_.keys() + warpgroup_ * kTileSize;
    sync_warpgroup();  // no product of it reads them
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Word packed[4];
      wgmma::pack_operand<T>(packed, dq_, i);
      store_matrices(queries + matrix_row(i), packed);
      wgmma::pack_operand<T>(packed, dk_, i);
      store_matrices(keys + matrix_row(i), packed);
    }
    __syncwarp();
    const int column = (head.part * kWarpgroups + warpgroup_) * kTile + 8 * (lane() % 8);
    const int key_heads = p_.common.heads / p_.common.group;
    const long long token = static_cast<long long>(head.batch) * p_.common.tokens + head.begin;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = 16 * warp_ + 4 * i + lane() / 8;
      if (row >= tokens_ || column >= p_.common.keys) continue;
      const int place = wgmma::swizzled(row, lane() % 8);
      const long long at = ((token + row) * key_heads + head.key_head) * p_.common.keys + column;
      *reinterpret_cast<uint4*>(static_cast<T*>(p_.dq) + at) = *reinterpret_cast<const uint4*>(queries + place);
      *reinterpret_cast<uint4*>(static_cast<T*>(p_.dk) + at) = *reinterpret_cast<const uint4*>(keys + place);
    }
    fence_async();
  }

  const GradientsParams& p_;
  const Memory<kK>& memory_;
  const int warpgroup_, warp_;
  int tokens_;  // of the chunk
  float dq_[32], dk_[32];  // from `read` and `written` on
  float removed_[32], pairs_[kProducts][32];
  [[maybe_unused]] float dq_before_[32];  // of the value heads before
  float kept_[2], values_[kPasses];
};

template <class T, int kK>
__device__ __forceinline__ void gradients(const GradientsParams& p, unsigned char* shared) {
  using Shape = GradientsShape<kK>;
  __shared__ typename Memory<kK>::Small small;
  if (threadIdx.x == 0) {
    for (Handover& stage : small.stages) stage.init(1, Shape::kThreads);
    small.inputs.init(1, Shape::kThreads);
    fence_barrier_init();
  }
  __syncthreads();
  const Memory<kK> memory{small, shared + (-shared_address(shared) & 1023)};
  if (uniform(threadIdx.x / 128) == Shape::kWarpgroups) {
    release_registers<kGradientsLoaderRegisters>();
    if (uniform(threadIdx.x / 32 % 4) == 0) Loader<kK>(p, memory).run();
  } else {
    claim_registers<gradients_registers(kK)>();
    Gradients<T, kK>(p, memory).run();
  }
}

}  // namespace hylo::gated_delta_rule

extern "C" __global__ void __launch_bounds__(hylo::gated_delta_rule::gradients_threads(HYLO_K),
                                             hylo::gated_delta_rule::gradients_blocks(HYLO_K))
    gated_delta_rule_bwd_kernel_gradients(const __grid_constant__ hylo::gated_delta_rule::GradientsParams p) {
  extern __shared__ unsigned char shared[];
  hylo::gated_delta_rule::gradients<hylo::HYLO_T, HYLO_K>(p, shared);
}
