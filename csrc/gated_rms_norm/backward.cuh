// Gated RMS norm, backward. A translation unit of its own, built with the same -DHYLO_ names as kernel.cuh. The
// formulas are derived in docs/gated_rms_norm.md.
#include "common/dependent.cuh"
#include "common/dtype.cuh"
#include "common/global_access.cuh"
#include "common/reduce.cuh"
#include "gated_rms_norm/params.h"
#include "gated_rms_norm/traits.cuh"

namespace hylo::gated_rms_norm {

// As precise as the forward's silu.
template <bool kPrecise>
__device__ __forceinline__ float sigmoid(float z) {
  if constexpr (kPrecise) return 1.0f / (1.0f + expf(-z));
  return __fdividef(1.0f, 1.0f + __expf(-z));
}

struct Gate {
  float silu, slope;  // of silu
};

template <bool kPrecise>
__device__ __forceinline__ Gate gate_of(float z) {
  const float open = sigmoid<kPrecise>(z);
  const float silu = z * open;
  return {silu, open + silu * (1.0f - open)};
}

struct Sums {
  float squares, products;  // of u, and of u and the gradient of u / rms(u)
};

template <int kLanes>
__device__ __forceinline__ Sums sum_over_lanes(Sums sums) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    sums.squares += __shfl_xor_sync(0xffffffffu, sums.squares, offset);
    sums.products += __shfl_xor_sync(0xffffffffu, sums.products, offset);
  }
  return sums;
}

// Totals over each group of kThreads neighbours, as sum_over_threads: with one barrier, since calls in turn get two
// buffers in turn, each of an entry a warp.
template <int kThreads>
__device__ __forceinline__ Sums total(Sums own, Sums* s_partial) {
  if constexpr (kThreads <= kWarpThreads) {
    return sum_over_lanes<kThreads>(own);
  } else {
    constexpr int kWarps = kThreads / kWarpThreads;
    const int warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
    own = sum_over_lanes<kWarpThreads>(own);
    if (lane == 0) s_partial[warp] = own;
    __syncthreads();
    return sum_over_lanes<kWarps>(s_partial[warp / kWarps * kWarps + lane % kWarps]);
  }
}

template <int kBytes>
struct StoredAs {
  using Type = Word;
};
template <>
struct StoredAs<2> {
  using Type = unsigned short;
};

// kVec neighbours as they lie in memory. As values of their own 16-bit ones would take a register each.
template <class T, int kVec>
struct alignas(access_bytes(sizeof(T) * kVec)) Packed {
  static constexpr int kBytes = sizeof(T) * kVec;
  typename StoredAs<kBytes>::Type parts[kBytes < 4 ? 1 : kBytes / 4];

  __device__ __forceinline__ float at(int j) const {
    if constexpr (sizeof(T) == 4) {
      return __uint_as_float(parts[j]);
    } else {
      const Word pair = parts[j / 2];
      // bf16 is the upper half of fp32
      if constexpr (kIsBf16<T>) return __uint_as_float(j % 2 == 0 ? pair << 16 : pair & 0xffff0000u);
      return __half2float(__ushort_as_half(static_cast<unsigned short>(j % 2 == 0 ? pair : pair >> 16)));
    }
  }
};

// The compiler would keep what it once unpacked: twice the registers.
template <class T, int kVec>
__device__ __forceinline__ void forget_unpacked(Packed<T, kVec>& packed) {
  if constexpr (sizeof(packed) == sizeof(Words)) forget_uses(reinterpret_cast<Words&>(packed));
}

// Neighbouring columns of one row.
template <class T, int kVec>
struct Piece {
  Packed<T, kVec> x, gate, dy;
};

// One element of a row. u is what gets normalised, n = u / rms(u), and y = weight * n, or that times silu(gate).
template <bool kNormBeforeGate>
struct Element {
  float x, dy, weight;
  Gate gate;

  __device__ __forceinline__ float u() const { return kNormBeforeGate ? x : x * gate.silu; }
  // Gradients of weight * n and of n.
  __device__ __forceinline__ float d_weighted() const { return kNormBeforeGate ? dy * gate.silu : dy; }
  __device__ __forceinline__ float dn() const { return d_weighted() * weight; }
};

// What all elements of a row need: du = scale * dn - pull * n.
struct Norm {
  float scale, pull;  // 1 / rms(u), and mean(n * dn) * scale

  __device__ __forceinline__ Norm(const Sums& sums, int width, float eps)
      : scale(rsqrtf(sums.squares * (1.0f / width) + eps)), pull(sums.products * (1.0f / width) * scale * scale) {}
};

// Walks over tiles of rows. A thread always meets the same head and columns: it keeps their weights and sums up what
// the weights gain, in the order of the rows.
template <class T, class W, int kV, int kVec, bool kNormBeforeGate>
struct Walk {
  static_assert(0 < kV && kV <= kMaxWidth && kV % kVec == 0);
  static constexpr bool kPrecise = sizeof(T) == 4;
  static constexpr int kElements = backward_elements(kV, kVec, sizeof(T));
  static constexpr int kThreads = threads_per_row(kV, kVec, kElements);
  static constexpr int kRows = rows_per_block(kV, kVec, kElements);
  static constexpr int kVectors = vectors_per_thread(kV, kVec, kElements);
  static constexpr int kBlock = kThreads * kRows;
  static constexpr int kStep = kThreads * kVec;
  static constexpr bool kFull = kVectors * kStep == kV;

  using PieceT = Piece<T, kVec>;
  using Weights = Packed<W, kVec>;
  using ElementT = Element<kNormBeforeGate>;

  // Of the tensors, this thread's first element of a row.
  struct Sources {
    const T *x, *gate, *dy;
  };

  const BackwardParams& p;
  const int first = static_cast<int>(kRows == 1 ? threadIdx.x : threadIdx.x % kThreads) * kVec;
  const unsigned slot = kRows == 1 ? 0 : threadIdx.x / kThreads;  // all threads are seen to have one row
  unsigned row = blockIdx.x * kRows + slot;
  const W* const g_weight = static_cast<const W*>(p.weight) + row % p.heads * p.weight_stride_h + first;
  Sources g = sources();
  float r_dweight[kVectors][kVec] = {};

  __device__ __forceinline__ bool has_columns(int i) const { return kFull || first + i * kStep < kV; }

  __device__ __forceinline__ void next_row() {
    row += gridDim.x * kRows;
    if (reads_twice(kV) || p.batches > 1) {
      g = sources();
      return;
    }
    g = {g.x + p.x_step, g.gate + p.gate_step, g.dy + p.dy_step};
  }

  template <class E>
  static __device__ __forceinline__ Packed<E, kVec> read(const E* g_first, int i) {
    return *reinterpret_cast<const Packed<E, kVec>*>(g_first + i * kStep);
  }

  __device__ __forceinline__ Sources sources() const {
    const unsigned token = row / p.heads;
    const unsigned head = row - token * p.heads;
    const unsigned batch = token / p.tokens;
    const unsigned t = token - batch * p.tokens;
    const auto start = [&](const void* tensor, const Strides& s) {
      return static_cast<const T*>(tensor) + (batch * s.b + t * s.t + head * s.h + first);
    };
    return {start(p.x, p.x_strides), start(p.gate, p.gate_strides), start(p.dy, p.dy_strides)};
  }

  __device__ __forceinline__ PieceT read_piece(int i) const { return {read(g.x, i), read(g.gate, i), read(g.dy, i)}; }

  __device__ __forceinline__ void read_row(PieceT (&r_row)[kVectors]) const {
    if (row >= p.rows) return;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (has_columns(i)) r_row[i] = read_piece(i);
    }
  }

  static __device__ __forceinline__ ElementT element(const PieceT& piece, const Weights& weights, const Gate& gate,
                                                     int j) {
    return {piece.x.at(j), piece.dy.at(j), weights.at(j), gate};
  }

  static __device__ __forceinline__ Gate gate_at(const PieceT& piece, int j) {
    return gate_of<kPrecise>(piece.gate.at(j));
  }

  static __device__ __forceinline__ void add(Sums& sums, const ElementT& e) {
    sums.squares += e.u() * e.u();
    sums.products += e.u() * e.dn();
  }

  // Of one piece, whose elements are given: dx, dgate, and what the weights gain.
  template <class ElementAt>
  __device__ __forceinline__ void finish(const Norm& norm, long long at, int i, const ElementAt& element_at) {
    float dx[kVec], dgate[kVec];
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      const ElementT e = element_at(j);
      const float n = e.u() * norm.scale;
      const float du = norm.scale * e.dn() - norm.pull * n;
      r_dweight[i][j] += e.d_weighted() * n;
      dx[j] = kNormBeforeGate ? du : du * e.gate.silu;
      dgate[j] = e.gate.slope * (kNormBeforeGate ? e.dy * e.weight * n : e.x * du);
    }
    store(static_cast<T*>(p.dx) + at + i * kStep, dx);
    store(static_cast<T*>(p.dgate) + at + i * kStep, dgate);
  }

  __device__ __forceinline__ long long row_start() const { return static_cast<long long>(row) * kV + first; }

  // A row is unpacked, the next one asked for, and only then the row's sums are waited for.
  template <class Partial>
  __device__ __forceinline__ void run(Partial& s_partial) {
    Weights r_weight[kVectors];
    PieceT r_row[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (has_columns(i)) r_weight[i] = read(g_weight, i);
    }
    read_row(r_row);
    for (unsigned tile = blockIdx.x, turn = 0; tile < p.tiles; tile += gridDim.x, turn ^= 1) {
      const bool exists = row < p.rows;
      const long long at = row_start();
      PieceT r_kept[kVectors];
      Gate r_gate[kVectors][kVec];
      Sums sums = {0.0f, 0.0f};
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        r_kept[i] = r_row[i];
        if (!exists || !has_columns(i)) continue;
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          r_gate[i][j] = gate_at(r_row[i], j);
          add(sums, element(r_row[i], r_weight[i], r_gate[i][j], j));
        }
        forget_unpacked(r_kept[i].x);
        forget_unpacked(r_kept[i].dy);
        forget_unpacked(r_weight[i]);
      }
      next_row();
      read_row(r_row);
      const Norm norm(total<kThreads>(sums, s_partial[turn]), kV, p.eps);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        if (!exists || !has_columns(i)) continue;
        finish(norm, at, i, [&](int j) { return element(r_kept[i], r_weight[i], r_gate[i][j], j); });
      }
    }
  }

  // The same for rows too wide to be kept. What is read again mostly is in the first cache.
  template <class Partial>
  __device__ __forceinline__ void run_reading_twice(Partial& s_partial) {
    for (unsigned tile = blockIdx.x, turn = 0; tile < p.tiles; tile += gridDim.x, turn ^= 1, next_row()) {
      const bool exists = row < p.rows;
      Sums sums = {0.0f, 0.0f};
#pragma unroll 1
      for (int i = 0; i < kVectors; ++i) {
        if (!exists || !has_columns(i)) continue;
        const PieceT piece = read_piece(i);
        const Weights weights = read(g_weight, i);
#pragma unroll
        for (int j = 0; j < kVec; ++j) add(sums, element(piece, weights, gate_at(piece, j), j));
      }
      const Norm norm(total<kThreads>(sums, s_partial[turn]), kV, p.eps);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        if (!exists || !has_columns(i)) continue;
        const PieceT piece = read_piece(i);
        const Weights weights = read(g_weight, i);
        finish(norm, row_start(), i, [&](int j) { return element(piece, weights, gate_at(piece, j), j); });
      }
    }
  }

  // A line for each row of the block, or one for all of them where they share the weight: added up in their order.
  __device__ __forceinline__ void store_dweight(float* s_lines) const {
    const bool joins = kRows > 1 && p.shared_weight;
    const unsigned line = joins ? slot : blockIdx.x * kRows + slot;
    float* lines = (joins ? s_lines : p.partials) + static_cast<long long>(line) * kV + first;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (has_columns(i)) store(lines + i * kStep, r_dweight[i]);
    }
    if (!joins) return;
    __syncthreads();
    for (int column = threadIdx.x; column < kV; column += kBlock) {
      float sum = 0.0f;
      for (int i = 0; i < kRows; ++i) sum += s_lines[i * kV + column];
      p.partials[static_cast<long long>(blockIdx.x) * kV + column] = sum;
    }
  }
};

template <class T, class W, int kV, int kVec, bool kNormBeforeGate>
__device__ __forceinline__ void backward(const BackwardParams& p) {
  using Rows = Walk<T, W, kV, backward_vector(kV, kVec), kNormBeforeGate>;
  __shared__ Sums s_partial[2][Rows::kBlock / kWarpThreads];
  alignas(kMaxAccessBytes) __shared__ float s_lines[Rows::kRows == 1 ? 1 : Rows::kRows * kV];
  await_kernel_before();
  start_next_kernel();
  Rows walk{p};
  if constexpr (reads_twice(kV)) {
    walk.run_reading_twice(s_partial);
  } else {
    walk.run(s_partial);
  }
  walk.store_dweight(s_lines);
}

// Adds the lines of partials up: each warp takes every 32nd line, then the warps' sums in order.
template <class W>
__device__ __forceinline__ void dweight(const DweightParams& p) {
  constexpr unsigned kWarps = kDweightThreads / kDweightColumns;
  __shared__ float s_sums[kWarps][kDweightColumns];
  const unsigned warp = threadIdx.x / kDweightColumns, lane = threadIdx.x % kDweightColumns;
  const unsigned column = blockIdx.x * kDweightColumns + lane;
  await_kernel_before();
  start_next_kernel();
  float sum = 0.0f;
  if (column < p.columns) {
#pragma unroll 8
    for (unsigned line = warp; line < p.terms; line += kWarps) {
      sum += p.partials[static_cast<long long>(line) * p.columns + column];
    }
  }
  s_sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || column >= p.columns) return;
  for (unsigned i = 1; i < kWarps; ++i) sum += s_sums[i][lane];
  from_float(static_cast<W*>(p.dweight)[column], sum);
}

}  // namespace hylo::gated_rms_norm

#define HYLO_BOUNDS                                                                                             \
  __launch_bounds__(                                                                                            \
      hylo::gated_rms_norm::block_threads(HYLO_V, HYLO_VEC, hylo::gated_rms_norm::backward_elements(            \
                                                                HYLO_V, HYLO_VEC, sizeof(hylo::HYLO_T))),       \
      hylo::gated_rms_norm::backward_blocks(HYLO_V, HYLO_VEC, sizeof(hylo::HYLO_T), sizeof(hylo::HYLO_W)))

extern "C" __global__ void HYLO_BOUNDS
    gated_rms_norm_bwd_kernel_norm_first(const __grid_constant__ hylo::gated_rms_norm::BackwardParams p) {
  hylo::gated_rms_norm::backward<hylo::HYLO_T, hylo::HYLO_W, HYLO_V, HYLO_VEC, true>(p);
}

extern "C" __global__ void HYLO_BOUNDS
    gated_rms_norm_bwd_kernel_gate_first(const __grid_constant__ hylo::gated_rms_norm::BackwardParams p) {
  hylo::gated_rms_norm::backward<hylo::HYLO_T, hylo::HYLO_W, HYLO_V, HYLO_VEC, false>(p);
}

extern "C" __global__ void __launch_bounds__(hylo::gated_rms_norm::kDweightThreads)
    gated_rms_norm_bwd_kernel_dweight(const __grid_constant__ hylo::gated_rms_norm::DweightParams p) {
  hylo::gated_rms_norm::dweight<hylo::HYLO_W>(p);
}
