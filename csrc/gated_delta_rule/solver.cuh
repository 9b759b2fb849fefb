// Everything of a chunk that needs no state, the record (traits.cuh): A = (I + L)^-1 with L = strictly lower(beta G * k
// k^T), the scores P = lower(G * q k^T), and the decays. Made by a warpgroup, in a kernel of its own (inverse.cuh) or
// within a pass.
#pragma once

#include "common/copy_engine.cuh"
#include "common/wgmma.cuh"
#include "gated_delta_rule/chunks.cuh"

namespace hylo::gated_delta_rule {

constexpr double kLog2E = 1.4426950408889634;

// log2 of the decay from the chunk's start to each token is a sum of two floats: one alone costs accuracy.
struct alignas(16) Gates {
  float high[kChunk], low[kChunk];
  float beta[kChunk];

  __device__ __forceinline__ float log2_ratio(int i, int j) const { return (high[i] - high[j]) + (low[i] - low[j]); }
};

// The pass back hands on the gradient of a token's write times beta, so that it is that of v and not rounded twice; but
// not where beta is near zero, since the gradient of beta divides by it.
constexpr float kLeastHanded = 0.0625f;

constexpr int kBlock = 8;  // rows of the blocks on the diagonal that forward substitution inverts

__device__ __forceinline__ float* block_at(float* matrix, int row, int column) {
  return matrix + row * kLowerStride + column;
}

// The products below cut off the bits that TF32 does not have; half of the last that stays is added first, so that they
// round to the nearest. One instruction, where cvt.rna.tf32 becomes four.
__device__ __forceinline__ float to_tf32(float value) { return __uint_as_float(__float_as_uint(value) + 0x1000); }

__device__ __forceinline__ void multiply_tf32(float (&sum)[4], const float (&a)[4], const float (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
                 "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}

// A warp's c [16, 8] = sign * a [16, kSum] * b [kSum, 8]. TF32 rounds at an eighth of what the result, in 16 bits,
// rounds at. Nothing is skipped where a or b is zero: what counts is that all loads are under way at once.
template <int kSum>
__device__ __forceinline__ void multiply_blocks(float* c, const float* a, const float* b, float sign, int lane) {
  constexpr int kSteps = kSum / 8;
  const int row = lane / 4, pair = lane % 4;
  const float* from_a = a + row * kLowerStride + pair;
  const float* from_b = b + pair * kLowerStride + row;
  float of_a[kSteps][4], of_b[kSteps][2], sum[4] = {};
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) of_a[k][i] = from_a[i % 2 * 8 * kLowerStride + 8 * k + i / 2 * 4];
#pragma unroll
    for (int i = 0; i < 2; ++i) of_b[k][i] = from_b[(8 * k + 4 * i) * kLowerStride];
  }
#pragma unroll
  for (int k = 0; k < kSteps; ++k) multiply_tf32(sum, of_a[k], of_b[k]);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    *reinterpret_cast<float2*>(c + (row + 8 * i) * kLowerStride + 2 * pair) =
        make_float2(to_tf32(sign * sum[2 * i]), to_tf32(sign * sum[2 * i + 1]));
  }
}

// The same of two blocks of 8 x 8.
__device__ __forceinline__ void multiply_small(float* c, const float* a, const float* b, float sign, int lane) {
  const int row = lane / 4, pair = lane % 4;
  const float of_a[4] = {a[row * kLowerStride + pair], 0.0f, a[row * kLowerStride + pair + 4], 0.0f};
  const float of_b[2] = {b[pair * kLowerStride + row], b[(pair + 4) * kLowerStride + row]};
  float sum[4] = {};
  multiply_tf32(sum, of_a, of_b);
  *reinterpret_cast<float2*>(c + row * kLowerStride + 2 * pair) =
      make_float2(to_tf32(sign * sum[0]), to_tf32(sign * sum[1]));
}

template <class T, int kK>
class Solver {
 public:
  // lower: kLowerSize bytes. barrier: a named one for these 128 threads.
  __device__ __forceinline__ Solver(const Params& p, int head, float* lower, Gates (&gates)[2], int barrier)
      : p_(p), head_(head), lower_(lower), gates_(gates), barrier_(barrier) {}

  __device__ __forceinline__ void sync() const { sync_threads(barrier_, kSolverThreads); }

  // Before the first chunk.
  __device__ __forceinline__ void start(const Chunk& first, const Chunk& second) {
    if (warp() == kGatesWarp) {
      look_ahead(first);
      sum_gates(gates_[0]);
      look_ahead(second);
    }
    sync();
  }

  // Calls done_reading() when keys and queries, tiles of 64 columns, are no longer needed. after_next: the one after
  // the next chunk to solve.
  template <class F>
  __device__ __forceinline__ void solve(unsigned char* keys, unsigned char* queries, const Chunk& chunk,
                                        const Chunk& after_next, const F& done_reading) {
    float products[32];
    const Gates& gates = gates_[turn_];
    turn_ ^= 1;
    if (chunk.tokens < kChunk) clear_tail(keys, queries, chunk.tokens);
    multiply(products, keys, keys);
    settle(products);
    write_lower(products, gates);
    multiply(products, queries, keys);  // under way while the diagonal is inverted
    sync();
    if (thread() < kChunk) {
      invert_diagonal();
    } else {
      find_factors(gates);
      if (warp() == kGatesWarp) {
        sum_gates(gates_[turn_]);
        look_ahead(after_next);
      }
    }
    settle(products);
    pack_scores(products);
    sync();
    done_reading();
    join_small();
    sync();
    join_blocks<2 * kBlock>();
    join_blocks<4 * kBlock>();
  }

  // To where wgmma or the copy engine read it once all threads fenced. kInPlace: `lower` is there too.
  template <bool kInPlace>
  __device__ __forceinline__ void write(unsigned char* record) const {
    Word inverse[4][4];
    read_inverse(inverse);
    if constexpr (kInPlace) sync();
    write_inverse(record + kRecordInverse, inverse);
    write_scores(record + kRecordScores);
    if (thread() >= kChunk) write_factors(reinterpret_cast<float*>(record + kRecordFactors));
    __syncwarp();  // the next L's rows are a warp's as this inverse's were, but of other lanes
  }

 private:
  static constexpr int kGatesWarp = 2;  // one of those that do not invert the diagonal

  // Asks for a chunk's gates, so that they are there when its turn comes.
  __device__ __forceinline__ void look_ahead(const Chunk& chunk) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int t = 2 * lane() + i;
      const bool exists = t < chunk.tokens;
      const long long at = (static_cast<long long>(chunk.batch) * p_.tokens + chunk.begin + t) * p_.heads + head_;
      next_g_[i] = exists ? p_.g[at] : 0.0f;
      next_beta_[i] = exists ? p_.beta[at] : 0.0f;
    }
  }

  // Of the gates that were asked for last, in float64: float32 sums cost as much accuracy as all the rest.
  __device__ __forceinline__ void sum_gates(Gates& gates) const {
    double log2_decay[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      log2_decay[i] = static_cast<double>(fmaxf(next_g_[i], kEmptiesState)) * kLog2E;
      gates.beta[2 * lane() + i] = next_beta_[i];
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

  // Anew each time: places that follow from it would else be kept from chunk to chunk, for which there are no
  // registers.
  static __device__ __forceinline__ int thread() {
    int thread = threadIdx.x % kSolverThreads;
    asm volatile("" : "+r"(thread));
    return thread;
  }
  static __device__ __forceinline__ int warp() { return uniform(threadIdx.x / 32 % 4); }

  // The rows after a sequence's end belong to its neighbour: no number of theirs may enter a product with zero.
  __device__ __forceinline__ void clear_tail(unsigned char* keys, unsigned char* queries, int tokens) const {
    for (int i = thread(); i < (kChunk - tokens) * 8; i += kSolverThreads) {
      for (int tile = 0; tile < kK / kTile; ++tile) {
        const int at = tile * kTileSize + wgmma::swizzled(tokens + i / 8, i % 8);
        *reinterpret_cast<uint4*>(keys + at) = make_uint4(0, 0, 0, 0);
        *reinterpret_cast<uint4*>(queries + at) = make_uint4(0, 0, 0, 0);
      }
    }
    fence_async();
    sync();
  }

  // d = a b^T, under way on return.
  static __device__ __forceinline__ void multiply(float (&d)[32], const unsigned char* a, const unsigned char* b) {
    const DoubleWord rows = wgmma::descriptor_k_major(shared_address(a));
    const DoubleWord columns = wgmma::descriptor_k_major(shared_address(b));
    wgmma::fence();
#pragma unroll
    for (int i = 0; i < kK / 16; ++i) {
      const DoubleWord step = i / 4 * (kTileSize >> 4) + i % 4 * wgmma::kNextKMajor;
      wgmma::product_shared<T, wgmma::kAlongK, wgmma::kAlongK>(d, rows + step, columns + step, i > 0);
    }
    wgmma::commit();
  }

  static __device__ __forceinline__ void settle(float (&d)[32]) {
    wgmma::wait<0>();
    wgmma::pin(d);
  }

  // L out of k k^T, and on its diagonal what nobody reads. Keeps the decays for the scores, in fp16: they are at most
  // 1, and so are rounded once more, at an eighth of what bf16 rounds at. The upper right quarter is not written.
  __device__ __forceinline__ void write_lower(const float (&keys)[32], const Gates& gates) {
    write_columns<0>(keys, gates);
    if (warp() >= 2) {
      write_columns<4>(keys, gates);
    } else {
#pragma unroll
      for (int i = 8; i < 16; ++i) scores_[i / 4][i % 4] = 0;
    }
  }

  // The columns of four blocks of eight. One float for the log of a decay is good enough here: it is rounded to 16
  // bits.
  template <int kFirst>
  __device__ __forceinline__ void write_columns(const float (&keys)[32], const Gates& gates) {
    const int thread = Solver::thread();
    const int top = thread / 32 * 16 + thread % 32 / 4, left = 2 * (thread % 4);
    const float log[2] = {gates.high[top], gates.high[top + 8]};
    const float beta[2] = {gates.beta[top], gates.beta[top + 8]};
    float* to = block_at(lower_, top, left);
#pragma unroll
    for (int block = kFirst; block < kFirst + 4; ++block) {
      const float2 other = *reinterpret_cast<const float2*>(gates.high + left + 8 * block);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int above = top - left + 8 * (r - block);  // columns between this one and the diagonal
        const float first = above >= 0 ? exp2_fast(log[r] - other.x) : 0.0f;
        const float second = above > 0 ? exp2_fast(log[r] - other.y) : 0.0f;
        scores_[block / 2][block % 2 * 2 + r] = wgmma::pack<__half>(first, second);
        const int d = 4 * block + 2 * r;
        *reinterpret_cast<float2*>(to + 8 * r * kLowerStride + 8 * block) =
            make_float2(to_tf32(beta[r] * first * keys[d]), to_tf32(beta[r] * second * keys[d + 1]));
      }
    }
  }

  // P out of q k^T and the decays.
  __device__ __forceinline__ void pack_scores(const float (&products)[32]) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      float first, second;
      wgmma::unpack<__half>(scores_[i / 4][i % 4], first, second);
      scores_[i / 4][i % 4] = wgmma::pack<T>(first * products[2 * i], second * products[2 * i + 1]);
    }
  }

  // The inverse grows in place of L: its blocks on the diagonal first, by forward substitution, a thread a column, in
  // registers. Each warp of the first two inverts four.
  __device__ __forceinline__ void invert_diagonal() const {
    const int column_of_all = thread();
    const int first = column_of_all / kBlock * kBlock, column = column_of_all % kBlock;
    float* block = block_at(lower_, first, first);
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
    for (int i = 0; i < kBlock; ++i) block[i * kLowerStride + column] = to_tf32(a[i]);
  }

  // By threads 64 to 127: what a pass multiplies tokens with.
  __device__ __forceinline__ void find_factors(const Gates& gates) {
    const int t = thread() - kChunk;
    from_start_ = exp2_fast(gates.high[t] + gates.low[t]);
    to_end_ = exp2_fast(gates.log2_ratio(kChunk - 1, t));
  }

  // Where diagonal blocks of kSize rows are joined, the warps share out the result's [16, 8] pieces: calls f(row where
  // the two blocks start, the piece's row and column). A lambda with a template parameter would do, but NVRTC 13.0
  // takes none.
  template <int kSize, class F>
  static __device__ __forceinline__ void each_piece(const F& f) {
    constexpr int kPieces = kSize * kSize / (16 * 8) * (kChunk / (2 * kSize)) / 4;  // a warp's
#pragma unroll 1
    for (int i = 0; i < kPieces; ++i) {
      const int piece = warp() * kPieces + i;
      const int across = piece % (kSize / 8) * 8, down = piece / (kSize / 8) * 16;
      f(down / kSize * 2 * kSize, down % kSize, across);
    }
  }

  // The first level, a warp two neighbours.
  __device__ __forceinline__ void join_small() const {
    const int thread = Solver::thread();
    float* block = block_at(lower_, thread / 32 * 2 * kBlock, thread / 32 * 2 * kBlock);
    float* product = block_at(lower_, thread / 32 * kBlock, kChunk / 2);
    float* below = block_at(block, kBlock, 0);
    multiply_small(product, below, block, 1.0f, thread % 32);
    __syncwarp();
    multiply_small(below, block_at(below, 0, kBlock), product, -1.0f, thread % 32);
  }

  // Blocks twice as large out of two neighbours,
  //
  //     (I + [L11 0; L21 L22])^-1 = [A11 0; -A22 L21 A11, A22] ,
  //
  // with L21 A11 kept for a moment in the upper right quarter, which neither level reads as a zero.
  template <int kSize>
  __device__ __forceinline__ void join_blocks() const {
    float* products = block_at(lower_, 0, kChunk / 2);
    each_piece<kSize>([&](int start, int down, int across) {
      multiply_blocks<kSize>(block_at(products, start / 2 + down, across),
                             block_at(lower_, start + kSize + down, start), block_at(lower_, start, start + across),
                             1.0f, thread() % 32);
    });
    sync();
    each_piece<kSize>([&](int start, int down, int across) {
      multiply_blocks<kSize>(block_at(lower_, start + kSize + down, start + across),
                             block_at(lower_, start + kSize + down, start + kSize),
                             block_at(products, start / 2, across), -1.0f, thread() % 32);
    });
    sync();
  }

  // Half a row a thread. All that is above the diagonal is zero, but for the upper right quarter, where products were.
  __device__ __forceinline__ void read_inverse(Word (&inverse)[4][4]) const {
    const int thread = Solver::thread();
    const int row = thread / 2, half = thread % 2;
    const bool zero = half == 1 && row < kChunk / 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* from = block_at(lower_, row, half * (kChunk / 2) + 8 * i);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float4 a = reinterpret_cast<const float4*>(from)[j];
        inverse[i][2 * j] = zero ? 0 : wgmma::pack<T>(a.x, a.y);
        inverse[i][2 * j + 1] = zero ? 0 : wgmma::pack<T>(a.z, a.w);
      }
    }
  }

  static __device__ __forceinline__ void write_inverse(unsigned char* tile, const Word (&inverse)[4][4]) {
    const int thread = Solver::thread();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      *reinterpret_cast<uint4*>(tile + wgmma::swizzled(thread / 2, thread % 2 * 4 + i)) =
          make_uint4(inverse[i][0], inverse[i][1], inverse[i][2], inverse[i][3]);
    }
  }

  __device__ __forceinline__ void write_scores(unsigned char* tile) const {
    const int thread = Solver::thread();
    const int row = thread / 32 * 16 + thread % 16;
#pragma unroll
    for (int i = 0; i < 4; ++i) store_matrices(tile + wgmma::swizzled(row, 2 * i + thread % 32 / 16), scores_[i]);
  }

  __device__ __forceinline__ void write_factors(float* factors) const {
    const int t = thread() - kChunk;
    const Gates& gates = gates_[turn_ ^ 1];
    factors[kBeta * kChunk + t] = gates.beta[t];
    const bool hands = fabsf(gates.beta[t]) >= kLeastHanded;
    factors[kHanded * kChunk + t] = hands ? gates.beta[t] : 1.0f;
    factors[kLeft * kChunk + t] = hands ? 1.0f : gates.beta[t];
    factors[kFromStart * kChunk + t] = from_start_;
    factors[kToEnd * kChunk + t] = to_end_;
    factors[kRemoval * kChunk + t] = -gates.beta[t] * from_start_;
    factors[kDecayHigh * kChunk + t] = gates.high[t];
    factors[kDecayLow * kChunk + t] = gates.low[t];
  }

  const Params& p_;
  const int head_;
  float* const lower_;
  Gates (&gates_)[2];  // of the chunk to solve and of the next
  const int barrier_;
  int turn_ = 0;                    // which of them is that
  float next_g_[2], next_beta_[2];  // of the gates' warp
  float from_start_, to_end_;       // the last two warps'
  Word scores_[4][4];               // decays, then P, packed, as the products come; 16 columns at a time
};

}  // namespace hylo::gated_delta_rule
