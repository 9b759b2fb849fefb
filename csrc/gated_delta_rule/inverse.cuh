// Everything of a chunk that needs no state: A = (I + L)^-1 with L = strictly lower(beta G * k k^T), the scores
// P = lower(G * q k^T), and the decays. One block of four warps a chunk and head.
#pragma once

#include "common/copy_engine.cuh"
#include "common/wgmma.cuh"
#include "gated_delta_rule/chunks.cuh"

namespace hylo::gated_delta_rule {

constexpr double kLog2E = 1.4426950408889634;
constexpr float kLn2 = 0.6931471805599453f;
constexpr double kEmptiesState = -1e4;  // stands for a gate of -inf: 2 to any difference across it is 0

// log2 of the decay from the chunk's start to each token is a sum of two floats: one alone costs accuracy.
struct alignas(16) Gates {
  float high[kChunk], low[kChunk];
  float beta[kChunk];
  float key_norm2[kChunk];

  __device__ __forceinline__ float log2_ratio(int i, int j) const { return (high[i] - high[j]) + (low[i] - low[j]); }
};

// The first warp loads a chunk's gates and sums them up in float64: float32 sums cost as much accuracy as all the rest.
__device__ __forceinline__ void load_gates(const Params& p, const Chunk& chunk, int head, Gates& gates) {
  double log2_decay[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int t = 2 * lane() + i;
    const bool exists = t < chunk.tokens;
    const long long at = (static_cast<long long>(chunk.batch) * p.tokens + chunk.begin + t) * p.heads + head;
    const double g = exists ? p.g[at] : 0.0;
    log2_decay[i] = (g > kEmptiesState ? g : kEmptiesState) * kLog2E;
    gates.beta[t] = exists ? p.beta[at] : 0.0f;
  }
  double through = log2_decay[0] + log2_decay[1];
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const double other = __shfl_up_sync(kAllLanes, through, step);
    if (lane() >= step) through += other;
  }
  const double sums[2] = {through - log2_decay[1], through};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float high = static_cast<float>(sums[i]);
    gates.high[2 * lane() + i] = high;
    gates.low[2 * lane() + i] = static_cast<float>(sums[i] - high);
  }
}

// Turns the products k k^T and q k^T of a thread's rows and columns into L and P.
template <class T>
__device__ __forceinline__ void decay_products(const float (&keys)[32], const float (&scores)[32], int tokens,
                                               Gates& gates, float* lower, unsigned char* score_tile) {
  const int warp = uniform(threadIdx.x / 32);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int i = warp * 16 + lane() / 4 + 8 * r;
    const float high = gates.high[i], low = gates.low[i], beta = gates.beta[i];
#pragma unroll
    for (int block = 0; block < 8; ++block) {
      const int j = 8 * block + 2 * (lane() % 4);
      float p[2] = {};
      if (block < 2 * warp + 2) {  // the rest lies above the diagonal
        const float2 other = *reinterpret_cast<const float2*>(gates.high + j);
        const float2 rest = *reinterpret_cast<const float2*>(gates.low + j);
        const float ratio[2] = {exp2_fast((high - other.x) + (low - rest.x)),
                                exp2_fast((high - other.y) + (low - rest.y))};
        float l[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int d = 4 * block + 2 * r + e;
          const bool seen = j + e <= i && i < tokens;
          p[e] = seen ? ratio[e] * scores[d] : 0.0f;
          l[e] = seen && j + e < i ? beta * ratio[e] * keys[d] : 0.0f;
          if (j + e == i) gates.key_norm2[i] = seen ? keys[d] : 0.0f;
        }
        *reinterpret_cast<float2*>(lower + i * kLowerStride + j) = make_float2(l[0], l[1]);
      }
      *reinterpret_cast<Word*>(score_tile + wgmma::swizzled(i, block) + 4 * (lane() % 4)) =
          wgmma::pack<T>(p[0], p[1]);
    }
  }
}

// The inverse grows in place of L: its blocks on the diagonal first, then twice as large ones out of two neighbours,
//
//     (I + [L11 0; L21 L22])^-1 = [A11 0; -A22 L21 A11, A22] ,
//
// with L21 A11 kept for a moment above the diagonal, where nothing else is.
constexpr int kBlock = 16;

__device__ __forceinline__ float* block_at(float* matrix, int row, int column) {
  return matrix + row * kLowerStride + column;
}

// A block on the diagonal by forward substitution, a thread a column, in registers. Each warp inverts two.
__device__ __forceinline__ void invert_diagonal(float* lower) {
  const int first = threadIdx.x / kBlock * kBlock, column = threadIdx.x % kBlock;
  float* block = block_at(lower, first, first);
  float a[kBlock] = {};
#pragma unroll
  for (int i = 0; i < kBlock; ++i) {
    float sum[4] = {i == column ? 1.0f : 0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int j = 0; j < i; j += 4) {  // L is zero from column i on
      const float4 row = *reinterpret_cast<const float4*>(block + i * kLowerStride + j);
      sum[0] -= row.x * a[j];
      sum[1] -= row.y * a[j + 1];
      sum[2] -= row.z * a[j + 2];
      sum[3] -= row.w * a[j + 3];
    }
    a[i] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kBlock; ++i) block[i * kLowerStride + column] = a[i];
}

__device__ __forceinline__ Word to_tf32(float value) {
  Word bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

// A warp's c [16, 8] = sign * a [16, first to end] * b [first to end, 8]. TF32 rounds at an eighth of what the result,
// in 16 bits, rounds at.
__device__ __forceinline__ void multiply_blocks(float* c, const float* a, const float* b, int first, int end,
                                                float sign) {
  const int row = lane() / 4, pair = lane() % 4;
  float sum[4] = {};
  for (int k = first; k < end; k += 8) {
    const float* g_a = a + row * kLowerStride + k + pair;
    const float* g_b = b + (k + pair) * kLowerStride + row;
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(to_tf32(g_a[0])), "r"(to_tf32(g_a[8 * kLowerStride])), "r"(to_tf32(g_a[4])),
                   "r"(to_tf32(g_a[8 * kLowerStride + 4])), "r"(to_tf32(g_b[0])), "r"(to_tf32(g_b[4 * kLowerStride])));
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) c[(row + i / 2 * 8) * kLowerStride + 2 * pair + i % 2] = sign * sum[i];
}

// Where diagonal blocks of kSize rows are joined, the warps share out the result's [16, 8] pieces: calls f(row where the
// two blocks start, the piece's row and column). A lambda with a template parameter would do, but NVRTC 13.0 takes none.
template <int kSize, class F>
__device__ __forceinline__ void each_piece(const F& f) {
  constexpr int kPieces = kSize * kSize / (kBlock * 8) * (kChunk / (2 * kSize)) / 4;  // a warp's
  const int warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const int piece = warp * kPieces + i;
    const int across = piece % (kSize / 8) * 8, down = piece / (kSize / 8) * kBlock;
    f(down / kSize * 2 * kSize, down % kSize, across);
  }
}

template <int kSize>
__device__ __forceinline__ void join_blocks(float* lower) {
  each_piece<kSize>([&](int start, int down, int across) {  // A11 has nothing above its own diagonal blocks
    multiply_blocks(block_at(lower, start + down, start + kSize + across),
                    block_at(lower, start + kSize + down, start), block_at(lower, start, start + across),
                    across / kBlock * kBlock, kSize, 1.0f);
  });
  __syncthreads();
  each_piece<kSize>([&](int start, int down, int across) {  // nor has A22
    multiply_blocks(block_at(lower, start + kSize + down, start + across),
                    block_at(lower, start + kSize + down, start + kSize),
                    block_at(lower, start, start + kSize + across), 0, down + kBlock, -1.0f);
  });
  __syncthreads();
}

// Half a row a thread.
template <class T>
__device__ __forceinline__ void write_inverse(const float* lower, unsigned char* tile) {
  const int row = threadIdx.x / 2;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int piece = threadIdx.x % 2 * 4 + i;
    Word packed[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int column = 8 * piece + 2 * j;
      const float2 both = *reinterpret_cast<const float2*>(lower + row * kLowerStride + column);
      packed[j] = wgmma::pack<T>(column <= row ? both.x : 0.0f, column + 1 <= row ? both.y : 0.0f);
    }
    *reinterpret_cast<uint4*>(tile + wgmma::swizzled(row, piece)) =
        make_uint4(packed[0], packed[1], packed[2], packed[3]);
  }
}

// By threads 64 to 127: what the state pass multiplies tokens with, and how far the chunk shrinks what came before.
// Each token multiplies the state by exp(g) (I - beta k k^T), whose norm is exp(g) max(1, |1 - beta k^2|).
__device__ __forceinline__ void write_factors(const Gates& gates, float* factors) {
  const int t = threadIdx.x - kChunk;
  factors[kBeta * kChunk + t] = gates.beta[t];
  factors[kFromStart * kChunk + t] = exp2_fast(gates.high[t] + gates.low[t]);
  factors[kToEnd * kChunk + t] = exp2_fast(gates.log2_ratio(kChunk - 1, t));
  factors[kDecayHigh * kChunk + t] = gates.high[t];
  factors[kDecayLow * kChunk + t] = gates.low[t];
  const auto growth = [&](int i) { return __logf(fmaxf(1.0f, fabsf(1.0f - gates.beta[i] * gates.key_norm2[i]))); };
  float bound = growth(lane()) + growth(lane() + 32);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) bound += __shfl_xor_sync(kAllLanes, bound, step);
  // Four floats, so that all of the record is written.
  if (t < 4) factors[kFactors * kChunk + t] = bound + kLn2 * gates.high[kChunk - 1];
}

template <class T, int kK>
__device__ __forceinline__ void inverse(const Params& p, unsigned char* shared) {
  constexpr int kTiles = kK / kTile;
  __shared__ Gates gates;
  __shared__ Barrier loaded;
  unsigned char* keys = shared;
  unsigned char* queries = keys + kTiles * kTileSize;
  unsigned char* record = shared + inverse_inputs(kK);
  float* lower = reinterpret_cast<float*>(keys);  // once the products are done

  const int head = blockIdx.y;
  const Chunk chunk = chunk_at(p, blockIdx.x);
  if (chunk.tokens == 0) return;
  if (threadIdx.x == 0) {
    loaded.init(1);
    fence_barrier_init();
    loaded.arrive_expecting(2 * kTiles * kTileSize);
    for (int i = 0; i < kTiles; ++i) {
      copy_box(keys + i * kTileSize, p.k, loaded, i * kTile, head / p.group, chunk.begin, chunk.batch);
      copy_box(queries + i * kTileSize, p.q, loaded, i * kTile, head / p.group, chunk.begin, chunk.batch);
    }
  }
  if (threadIdx.x < 32) load_gates(p, chunk, head, gates);
  __syncthreads();
  loaded.wait(0);

  float r_keys[32], r_scores[32];
  wgmma::fence();
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const DoubleWord k = wgmma::descriptor_k_major(shared_address(keys + i * kTileSize));
    const DoubleWord q = wgmma::descriptor_k_major(shared_address(queries + i * kTileSize));
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const DoubleWord step = s * wgmma::kNextKMajor;
      wgmma::product_shared<T, wgmma::kAlongK, wgmma::kAlongK>(r_keys, k + step, k + step, i + s > 0);
      wgmma::product_shared<T, wgmma::kAlongK, wgmma::kAlongK>(r_scores, q + step, k + step, i + s > 0);
    }
  }
  wgmma::commit();
  wgmma::wait<0>();
  wgmma::pin(r_keys);
  wgmma::pin(r_scores);
  __syncthreads();

  decay_products<T>(r_keys, r_scores, chunk.tokens, gates, lower, record + kRecordScores);
  __syncthreads();
  if (threadIdx.x < kChunk) {
    invert_diagonal(lower);
  } else {
    write_factors(gates, reinterpret_cast<float*>(record + kRecordFactors));
  }
  __syncthreads();
  join_blocks<kBlock>(lower);
  join_blocks<2 * kBlock>(lower);
  write_inverse<T>(lower, record + kRecordInverse);
  fence_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    const long long index = static_cast<long long>(blockIdx.x) * p.heads + head;
    copy_out(p.records + index * kRecordSize, record, kRecordSize);
    commit_copies_out();
    await_copies_out<0>();
  }
}

}  // namespace hylo::gated_delta_rule
