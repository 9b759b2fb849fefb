// Everything of the backward that needs no walk from chunk to chunk, out of the states before each chunk (S) and the
// gradients of those after it (dS). Of a head and a chunk, with tokens j that write along rows and i that read along
// columns, or the other way round (gradients_traits.cuh has the roles, docs/ssd.md the derivation):
//
//   P^T = step L^T * (B C^T)       R^T = step L^T * (X dO^T)
//   dX += P^T dO + step to_end (B dS^T) + d dO
//   dB += R^T C + step to_end (X dS)
//   dC += R B + from_start (dO S)
#pragma once

#include "common/chunk_store.cuh"
#include "ssd/gates.cuh"
#include "ssd/gradients_traits.cuh"
#include "ssd/rows.cuh"

namespace hylo::ssd {

// What a block's warps share beside the tiles.
struct GradientsShared {
  Chunk chunk;
  Handover tiles[kTileKinds][kMostDepth];
  Handover factors[kFactorRing], sums[2];
  float skips[kFactorRing], rates[kFactorRing];
};

// Where a warp is with one kind of tiles, which it fills or empties for each head or for each group of heads.
class TileCursor {
 public:
  __device__ __forceinline__ int slot() const { return bits_ >> kSlotBit & 3; }
  __device__ __forceinline__ int turn() const { return bits_ >> kTurnBit; }
  __device__ __forceinline__ bool first() const { return within() == 0; }
  __device__ __forceinline__ bool last(const TileSlots& slots) const { return within() == slots.group - 1; }

  // On to the next head.
  __device__ __forceinline__ void advance(const TileSlots& slots) {
    if (!last(slots)) {
      ++bits_;
    } else if (slot() + 1 < slots.depth) {
      bits_ = (bits_ & ~kWithin) + (1 << kSlotBit);
    } else {
      bits_ = (turn() + 1) << kTurnBit;
    }
  }

 private:
  static constexpr int kSlotBit = 16, kTurnBit = 18, kWithin = (1 << kSlotBit) - 1;
  __device__ __forceinline__ int within() const { return bits_ & kWithin; }

  int bits_ = 0;  // in one register: there are five cursors
};

template <class T, int kV, int kK>
class GradientsBlock {
 public:
  static constexpr int kWarpgroups = kGradientWarpgroups;
  static constexpr int kThreads = 128 * kWarpgroups;
  static constexpr int kWideV = kV / kTile, kWideK = kK / kTile;

  __device__ __forceinline__ GradientsBlock(const GradientsParams& p, unsigned char* shared, GradientsShared& barriers)
      : p_(p), tiles_(shared), shared_(barriers) {}

  static __device__ __forceinline__ void init(GradientsShared& shared) {
    for (auto& kind : shared.tiles) {
      for (Handover& tile : kind) tile.init(1, kThreads);
    }
    for (Handover& factors : shared.factors) factors.init(32, kThreads + 32);
    for (Handover& sums : shared.sums) sums.init(kThreads, 32);
    fence_barrier_init();
  }

  // By one thread.
  __device__ __forceinline__ void load() const {
    const Params& p = p_.common;
    const Chunk& chunk = shared_.chunk;
    const TensorMap* const maps[] = {&p.x, &p.b, &p.c, &p.d_o};
    TileCursor cursors[kTileKinds];
    for (int i = 0; i < p_.set; ++i) {
      const int head = first_head() + i;
#pragma unroll
      for (int kind = 0; kind < kTileKinds; ++kind) {
        const TileSlots& slots = p_.slots[kind];
        const TileCursor& cursor = cursors[kind];
        if (cursor.first()) {
          Handover& barrier = shared_.tiles[kind][cursor.slot()];
          unsigned char* const to = tiles(kind, cursor);
          if (cursor.turn() > 0) barrier.empty.wait((cursor.turn() - 1) & 1);
          barrier.full.arrive_expecting(slots.size);
          if (kind == kTilesStates) {
            load_states(to, head, barrier.full);
          } else {
            for (int at = 0; at < slots.size; at += kTileSize) {
              copy_box(to + at, *maps[kind], barrier.full, at / kTileSize * kTile, head / slots.group, chunk.begin,
                       chunk.batch);
            }
          }
        }
        cursors[kind].advance(slots);
      }
    }
  }

  // Two warps take turns. All loads of a head are under way at once: in a row they took longer than all else.
  __device__ __forceinline__ void make_factors(int index) const {
    const Chunk& chunk = shared_.chunk;
    const Sequence only{0, chunk.batch, chunk.begin, chunk.tokens};
    for (int i = index; i < p_.set; i += kGradientGates) {
      const int head = first_head() + i, slot = i % kFactorRing, turn = i / kFactorRing;
      const Gates gates(p_.common, head, only);
      const Gates::Raw dt = gates.load(0);
      const Word skip = load_of_head(p_.common.d, head);
      if (turn > 0) shared_.factors[slot].empty.wait((turn - 1) & 1);
      const float2 raw = gates.raw(dt), step = gates.steps(raw, chunk.tokens), sum = gates.sums(step);
      float* const factors = factors_at(slot);
      Gates::write_ends(step, sum, factors);
      Gates::write_between<false>(step, sum, factors);
      Gates::write_slopes(gates.slopes(raw, chunk.tokens), factors);
      if (lane() == 0) {
        shared_.skips[slot] = number(p_.common.d.type, skip);
        shared_.rates[slot] = gates.rate();
      }
      shared_.factors[slot].full.arrive();
    }
  }

  // The gates' gradients, two tokens a lane.
  __device__ __forceinline__ void finish() const {
    for (int i = 0; i < p_.set; ++i) {
      const int slot = i % kFactorRing, buffer = i % 2;
      shared_.factors[slot].full.wait(i / kFactorRing & 1);
      shared_.sums[buffer].full.wait(i / 2 & 1);
      finish_head(first_head() + i, shared_.rates[slot], Factors{factors_at(slot)}, sums_at(buffer));
      shared_.factors[slot].empty.arrive();
      shared_.sums[buffer].empty.arrive();
    }
  }

  // The first warpgroup.
  __device__ __forceinline__ void make_dx() const {
    float dx[kWideV][32] = {};
    each_head(0, [&](const Tiles& at, const Factors& factors, float* sums, float skip, const TileCursor& states) {
      add_dx(at, factors, sums, skip, states, dx);
    }, [&](bool x, bool, bool, int head) {
      const Params& p = p_.common;
      if (x) flush(dx, p_.dx, p.heads / p.x_group, head / p.x_group, p.values, 0);
    });
  }

  // The second one.
  __device__ __forceinline__ void make_db_and_dc() const {
    float db[kWideK][32] = {}, dc[kWideK][32] = {};
    each_head(1, [&](const Tiles& at, const Factors& factors, float* sums, float, const TileCursor& states) {
      add_db(at, factors, states, db);
      add_dc(at, factors, sums, dc);
    }, [&](bool, bool b, bool c, int head) {
      const Params& p = p_.common;
      if (b) flush(db, p_.db, p.heads / p.b_group, head / p.b_group, p.width, 1);
      if (c) flush(dc, p_.dc, p.heads / p.c_group, head / p.c_group, p.width, 1);
    });
  }

  // Where the slot has no chunk: nothing of the heads' parts.
  __device__ __forceinline__ void leave_nothing() const {
    for (int i = threadIdx.x; i < 3 * p_.set; i += blockDim.x) *part(i / p_.set, first_head() + i % p_.set) = 0.0f;
  }

 private:
  static constexpr int kStates = kWideV * kWideK * kTileSize;  // bytes of S, or of dS behind it
  static constexpr int kAllBarrier = 1 + kWarpgroups;

  __device__ __forceinline__ int first_head() const { return blockIdx.x * p_.set; }
  __device__ __forceinline__ int offset(int kind, const TileCursor& cursor) const {
    return p_.slots[kind].offset + cursor.slot() * p_.slots[kind].size;
  }
  __device__ __forceinline__ unsigned char* tiles(int kind, const TileCursor& cursor) const {
    return tiles_ + offset(kind, cursor);
  }
  __device__ __forceinline__ void await(int kind, const TileCursor& cursor) const {
    if (cursor.first()) shared_.tiles[kind][cursor.slot()].full.wait(cursor.turn() & 1);
  }
  __device__ __forceinline__ float* factors_at(int slot) const {
    return reinterpret_cast<float*>(tiles_ + p_.factors + slot * kFactorsSize);
  }
  __device__ __forceinline__ float* sums_at(int buffer) const {
    return reinterpret_cast<float*>(tiles_ + p_.sums + buffer * kSumsSize);
  }

  __device__ __forceinline__ float* part(int which, int head) const {
    return p_.parts + (static_cast<long long>(which) * gridDim.y + blockIdx.y) * p_.common.heads + head;
  }

  // Calls add(tiles, factors, sums, skip, cursor of the states) for each head, then flush(whether it is the last one of
  // its x, of its b, of its c, head).
  template <class Add, class Flush>
  __device__ __forceinline__ void each_head(int warpgroup, const Add& add, const Flush& flush) const {
    TileCursor cursors[kTileKinds];
    for (int i = 0; i < p_.set; ++i) {
      const int slot = i % kFactorRing, buffer = i % 2;
      Tiles at;
      at.shared = tiles_;
#pragma unroll
      for (int kind = 0; kind < kTileKinds; ++kind) at.offsets[kind] = offset(kind, cursors[kind]);
#pragma unroll
      for (int kind = 0; kind < kTilesStates; ++kind) await(kind, cursors[kind]);
      if (p_.common.cu_seqlens != nullptr && shared_.chunk.tokens < kChunk) clear_tails(cursors);
      shared_.factors[slot].full.wait(i / kFactorRing & 1);
      if (i > 1) shared_.sums[buffer].empty.wait((i / 2 - 1) & 1);
      float* const sums = sums_at(buffer);
      add(at, Factors{factors_at(slot)}, sums, shared_.skips[slot], cursors[kTilesStates]);
      multiply_states(at.states(), warpgroup, sums);
      shared_.sums[buffer].full.arrive();
      shared_.factors[slot].empty.arrive();
      bool last[kTileKinds];
#pragma unroll
      for (int kind = 0; kind < kTileKinds; ++kind) {
        last[kind] = cursors[kind].last(p_.slots[kind]);
        if (last[kind]) shared_.tiles[kind][cursors[kind].slot()].empty.arrive();
        cursors[kind].advance(p_.slots[kind]);
      }
      flush(last[kTilesX], last[kTilesB], last[kTilesC], first_head() + i);
    }
  }

  // Where a head's tiles are. Offsets: five pointers would take twice the registers.
  struct Tiles {
    unsigned char* shared;
    int offsets[kTileKinds];

    __device__ __forceinline__ unsigned char* x() const { return shared + offsets[kTilesX]; }
    __device__ __forceinline__ unsigned char* b() const { return shared + offsets[kTilesB]; }
    __device__ __forceinline__ unsigned char* c() const { return shared + offsets[kTilesC]; }
    __device__ __forceinline__ unsigned char* d_o() const { return shared + offsets[kTilesDO]; }
    __device__ __forceinline__ unsigned char* states() const { return shared + offsets[kTilesStates]; }
    __device__ __forceinline__ unsigned char* dstates() const { return states() + kStates; }
  };

  __device__ __forceinline__ void load_states(unsigned char* to, int head, Barrier& full) const {
    for (int tile = 0; tile < kWideV * kWideK; ++tile) {
      const int column = tile % kWideK * kTile, row = tile / kWideK * kTile;
      copy_box(to + tile * kTileSize, p_.states, full, column, row, head, blockIdx.y);
      copy_box(to + kStates + tile * kTileSize, p_.dstates, full, column, row, head, blockIdx.y);
    }
  }

  __device__ __forceinline__ void clear_tails(const TileCursor (&cursors)[kTileKinds]) const {
#pragma unroll
    for (int kind = 0; kind < kTilesStates; ++kind) {
      if (!cursors[kind].first()) continue;
      unsigned char* const first = tiles(kind, cursors[kind]);
      each_row_from(shared_.chunk.tokens, threadIdx.x, kThreads, [&](int at) {
        for (int tile = 0; tile < p_.slots[kind].size; tile += kTileSize) clear_words(first + tile + at);
      });
    }
    fence_async();
    sync_threads(kAllBarrier, kThreads);
  }

  // d += a b^T, or a b, of two tiles' rows x K or V; over `steps` times 16. Where the rows of b run along the sum, its
  // tiles follow each other `wide` tiles apart.
  template <int kSteps, int kSize>
  static __device__ __forceinline__ void multiply_rows(float (&d)[kSize], const unsigned char* a,
                                                       const unsigned char* b) {
    const DoubleWord left = wgmma::descriptor_k_major(shared_address(a));
    const DoubleWord right = wgmma::descriptor_k_major(shared_address(b));
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int next = i / 4 * (kTileSize >> 4) + i % 4 * wgmma::kNextKMajor;
      wgmma::product_shared<T, wgmma::kAlongK, wgmma::kAlongK>(d, left + next, right + next, i > 0);
    }
    wgmma::commit();
  }
  template <int kSteps, int kWide, int kSize>
  static __device__ __forceinline__ void multiply_columns(float (&d)[kSize], const unsigned char* a,
                                                          const unsigned char* b) {
    const DoubleWord left = wgmma::descriptor_k_major(shared_address(a));
    const DoubleWord right = wgmma::descriptor_n_major(shared_address(b), kTileSize);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      wgmma::product_shared<T, wgmma::kAlongK, wgmma::kAlongMN>(
          d, left + i / 4 * (kTileSize >> 4) + i % 4 * wgmma::kNextKMajor,
          right + i / 4 * kWide * (kTileSize >> 4) + i % 4 * wgmma::kNextNMajor, i > 0);
    }
    wgmma::commit();
  }
  template <int kSize>
  static __device__ __forceinline__ void add_tokens(float (&d)[kSize], const Word (&a)[4][4], const unsigned char* b) {
    const DoubleWord right = wgmma::descriptor_n_major(shared_address(b), kTileSize);
#pragma unroll
    for (int i = 0; i < 4; ++i) wgmma::product<T, wgmma::kAlongMN>(d, a[i], right + i * wgmma::kNextNMajor, true);
    wgmma::commit();
  }

  // Calls f(register of an accumulator of 64 tokens x 64 columns, the numbers of a tile at its place and behind).
  template <class F>
  static __device__ __forceinline__ void each_of_tile(const unsigned char* tile, const F& f) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Word words[4];
      load_matrices(words, tile + straight_row(i));
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        float low, high;
        wgmma::unpack<T>(words[r], low, high);
        f(8 * i + 2 * r, low, high);
      }
    }
  }

  // The rows' products of an accumulator with a tile, times a factor of the row, to `sums`.
  static __device__ __forceinline__ void dot(const float (&d)[32], const unsigned char* tile, const float (&factors)[2],
                                             float* sums) {
    float dots[2] = {};
    each_of_tile(tile, [&](int at, float low, float high) { dots[at / 2 % 2] += low * d[at] + high * d[at + 1]; });
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float sum = factors[row] * sum_over_quad(dots[row]);
      if (lane() % 4 == 0) sums[row_token(row)] = sum;
    }
  }
  static __device__ __forceinline__ void scale_rows(float (&d)[32], const float (&factors)[2]) {
#pragma unroll
    for (int i = 0; i < 32; ++i) d[i] *= factors[i / 2 % 2];
    wgmma::pin(d);
  }
  static __device__ __forceinline__ void add(float (&to)[32], const float (&d)[32]) {
#pragma unroll
    for (int i = 0; i < 32; ++i) to[i] += d[i];
  }
  static __device__ __forceinline__ void settle(float (&d)[32]) {
    wgmma::wait<0>();
    wgmma::pin(d);
  }

  // Tokens that write along rows.
  __device__ __forceinline__ void add_dx(const Tiles& at, const Factors& factors, float* sums, float skip,
                                         const TileCursor& states, float (&dx)[kWideV][32]) const {
    Word weights[4][4];
    {
      float scores[32], products[32];
      wgmma::fence();
      multiply_rows<kK / 16>(scores, at.b(), at.c());
      multiply_rows<kV / 16>(products, at.x(), at.d_o());
      settle(scores);
      wgmma::pin(products);
      weigh_writers(weights, scores, products, factors, sums);
    }
    await(kTilesStates, states);
    const float to_end[2] = {factors.to_end(row_token(0)), factors.to_end(row_token(1))};
    const float written[2] = {factors.row(kWritten, row_token(0)), factors.row(kWritten, row_token(1))};
#pragma unroll
    for (int tile = 0; tile < kWideV; ++tile) {
      const unsigned char* const d_o = at.d_o() + tile * kTileSize;
      float added[32];
      wgmma::fence();
      multiply_rows<kK / 16>(added, at.b(), at.dstates() + tile * kWideK * kTileSize);
      settle(added);
      dot(added, at.x() + tile * kTileSize, to_end, sums + (kAtEnd + tile) * kChunk);
      scale_rows(added, written);
      wgmma::fence();
      add_tokens(added, weights, d_o);
      each_of_tile(d_o, [&](int e, float low, float high) {
        dx[tile][e] += skip * low;
        dx[tile][e + 1] += skip * high;
      });
      settle(added);
      add(dx[tile], added);
    }
  }

  // The same.
  __device__ __forceinline__ void add_db(const Tiles& at, const Factors& factors, const TileCursor& states,
                                         float (&db)[kWideK][32]) const {
    Word pairs[4][4];
    {
      float products[32];
      wgmma::fence();
      multiply_rows<kV / 16>(products, at.x(), at.d_o());
      settle(products);
      pair_writers(pairs, products, factors);
    }
    await(kTilesStates, states);
    const float written[2] = {factors.row(kWritten, row_token(0)), factors.row(kWritten, row_token(1))};
#pragma unroll
    for (int tile = 0; tile < kWideK; ++tile) {
      float added[32];
      wgmma::fence();
      multiply_columns<kV / 16, kWideK>(added, at.x(), at.dstates() + tile * kTileSize);
      settle(added);
      scale_rows(added, written);
      wgmma::fence();
      add_tokens(added, pairs, at.c() + tile * kTileSize);
      settle(added);
      add(db[tile], added);
    }
  }

  // Tokens that read along rows.
  __device__ __forceinline__ void add_dc(const Tiles& at, const Factors& factors, float* sums,
                                         float (&dc)[kWideK][32]) const {
    Word pairs[4][4];
    {
      float products[32];
      wgmma::fence();
      multiply_rows<kV / 16>(products, at.d_o(), at.x());
      settle(products);
      weigh_readers<T, false, kAnyWarp>(pairs, products, factors);
    }
    const float from_start[2] = {factors.row(kFromStart, row_token(0)), factors.row(kFromStart, row_token(1))};
#pragma unroll
    for (int tile = 0; tile < kWideK; ++tile) {
      float added[32];
      wgmma::fence();
      multiply_columns<kV / 16, kWideK>(added, at.d_o(), at.states() + tile * kTileSize);
      settle(added);
      dot(added, at.c() + tile * kTileSize, from_start, sums + (kOfState + tile) * kChunk);
      scale_rows(added, from_start);
      wgmma::fence();
      add_tokens(added, pairs, at.b() + tile * kTileSize);
      settle(added);
      add(dc[tile], added);
    }
  }

  // Packs what tokens that write are read with, and leaves what comes of its product with `products`: sums over the
  // tokens that read, those that write themselves among them, and over those that write; and x . dO.
  static __device__ __forceinline__ void weigh_writers(Word (&weights)[4][4], const float (&scores)[32],
                                                       const float (&products)[32], const Factors& factors,
                                                       float* sums) {
    const Decays<kAnyWarp> decays(factors);
    const float step[2] = {factors.row(kStep, row_token(0)), factors.row(kStep, row_token(1))};
    float above[2] = {}, skipped[2] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // of the tokens that read: their sums are added up across rows apart
      float below[8] = {};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int block = 4 * half + i;
        each_writer(decays, block, [&](int row, const float2& decay) {
          const int at = 4 * block + 2 * row;
          const float low = scores[at] * decay.x, high = scores[at + 1] * decay.y;
          const float both_low = low * products[at], both_high = high * products[at + 1];
          above[row] += both_low + both_high;
          below[2 * i] += step[row] * both_low;
          below[2 * i + 1] += step[row] * both_high;
          weights[block / 2][2 * (block % 2) + row] = wgmma::pack<T>(step[row] * low, step[row] * high);
          if (decays.same(block)) {
            const int itself = row_token(row) - 8 * block - 2 * (lane() % 4);
            skipped[row] += itself == 0 ? products[at] : itself == 1 ? products[at + 1] : 0.0f;
          }
        });
      }
      sums[(kBelow + decays.warp()) * kChunk + 32 * half + column_of_sum()] = sum_over_rows(below);
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float found[2] = {sum_over_quad(above[row]), sum_over_quad(skipped[row])};
      if (lane() % 4 == 0) {
        sums[kAbove * kChunk + row_token(row)] = found[0];
        sums[kSkipped * kChunk + row_token(row)] = found[1];
      }
    }
  }

  // Packs `products` with the same decays.
  static __device__ __forceinline__ void pair_writers(Word (&pairs)[4][4], const float (&products)[32],
                                                      const Factors& factors) {
    const Decays<kAnyWarp> decays(factors);
    const float step[2] = {factors.row(kStep, row_token(0)), factors.row(kStep, row_token(1))};
#pragma unroll
    for (int block = 0; block < 8; ++block) {
      each_writer(decays, block, [&](int row, const float2& decay) {
        const int at = 4 * block + 2 * row;
        pairs[block / 2][2 * (block % 2) + row] =
            wgmma::pack<T>(step[row] * (products[at] * decay.x), step[row] * (products[at + 1] * decay.y));
      });
    }
  }

  // Calls f(row, decays from its token, which writes, through two that read) for both rows.
  template <class F>
  static __device__ __forceinline__ void each_writer(const Decays<kAnyWarp>& decays, int block, const F& f) {
    const Factors& factors = decays.factors();
    const float2 in_block = factors.columns(kInBlock, block);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float to_block =
          block < 2 ? 0.0f : factors.row(static_cast<Factor>(kToBlock1 - 1 + block / 2), row_token(row));
      float2 decay = make_float2(to_block * in_block.x, to_block * in_block.y);
      if (decays.same(block)) decay = decays.template between<false>(block, row);
      f(row, decay);
    }
  }

  // Of eight columns, two of each block of eight tokens, sums over the lanes that have other rows: each gets one, and
  // which of 32 it is.
  static __device__ __forceinline__ float sum_over_rows(float (&of)[8]) {
    halve<4>(of);
    halve<2>(of);
    halve<1>(of);
    return of[0];
  }
  template <int kHalf>
  static __device__ __forceinline__ void halve(float (&of)[8]) {
    const bool upper = lane() & (4 * kHalf);
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float sent = upper ? of[i] : of[i + kHalf], kept = upper ? of[i + kHalf] : of[i];
      of[i] = kept + __shfl_xor_sync(kAllLanes, sent, 4 * kHalf);
    }
  }
  static __device__ __forceinline__ int column_of_sum() {
    const int which = lane() / 4 % 8;  // the bits of it, from the highest, chose halves
    return 8 * (which / 2) + 2 * (lane() % 4) + which % 2;
  }

  // Parts of the sum over all of S dS.
  __device__ __forceinline__ void multiply_states(const unsigned char* states, int warpgroup, float* sums) const {
    const unsigned char* dstates = states + kStates;
    float sum = 0.0f;
#pragma unroll 2
    for (int at = 16 * threadIdx.x; at < kStates; at += 16 * kThreads) {
      const uint4 a = *reinterpret_cast<const uint4*>(states + at), b = *reinterpret_cast<const uint4*>(dstates + at);
      const Word left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        float low, high, other_low, other_high;
        wgmma::unpack<T>(left[word], low, high);
        wgmma::unpack<T>(right[word], other_low, other_high);
        sum += low * other_low + high * other_high;
      }
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    if (lane() == 0) sums[kSums * kChunk + 4 * warpgroup + warp_of_four()] = sum;
  }

  __device__ __forceinline__ void finish_head(int head, float rate, const Factors& factors, const float* sums) const {
    const Chunk& chunk = shared_.chunk;
    const auto two = [&](const float* row) { return *reinterpret_cast<const float2*>(row + 2 * lane()); };
    const auto total = [&](int first, int count) {
      float2 sum = make_float2(0.0f, 0.0f);
      for (int i = 0; i < count; ++i) {
        const float2 more = two(sums + (first + i) * kChunk);
        sum.x += more.x, sum.y += more.y;
      }
      return sum;
    };
    const float2 step = two(factors.at + kStep * kChunk), slope = two(factors.at + kSlope * kChunk);
    const float2 below = total(kBelow, 4), of_state = total(kOfState, kWideK);
    const float2 above = total(kAbove, 1), at_end = total(kAtEnd, kWideV);
    float whole = 0.0f;
    for (int i = 0; i < 4 * kWarpgroups; ++i) whole += sums[kSums * kChunk + i];
    whole *= factors.whole();

    // A gate decays what later tokens read of earlier ones and of the state, and what earlier ones add to the next state.
    const float2 read = make_float2(below.x + of_state.x - step.x * above.x, below.y + of_state.y - step.y * above.y);
    const float2 added = make_float2(step.x * at_end.x, step.y * at_end.y);
    float from_here = read.x + read.y, through = added.x + added.y;
#pragma unroll
    for (int away = 1; away < 32; away *= 2) {
      const float later = __shfl_down_sync(kAllLanes, from_here, away);
      const float earlier = __shfl_up_sync(kAllLanes, through, away);
      if (lane() + away < 32) from_here += later;
      if (lane() >= away) through += earlier;
    }
    const float before = through - added.x - added.y;
    const float2 gate = make_float2(from_here + before + whole, from_here - read.x + before + added.x + whole);

    const float2 ddt = make_float2(slope.x * (above.x + at_end.x + rate * gate.x),
                                   slope.y * (above.y + at_end.y + rate * gate.y));
    const float2 skipped = two(sums + kSkipped * kChunk);
    store_ddt(head, chunk, ddt);
    float of_head[3] = {step.x * gate.x + step.y * gate.y, skipped.x + skipped.y, ddt.x + ddt.y};
#pragma unroll
    for (int which = 0; which < 3; ++which) {
#pragma unroll
      for (int away = 16; away > 0; away /= 2) of_head[which] += __shfl_xor_sync(kAllLanes, of_head[which], away);
      if (lane() == 0) *part(which, head) = of_head[which];
    }
  }

  __device__ __forceinline__ void store_ddt(int head, const Chunk& chunk, float2 ddt) const {
    const Params& p = p_.common;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const int token = 2 * lane() + which;
      if (token >= chunk.tokens) continue;
      const float value = which == 0 ? ddt.x : ddt.y;
      const long long row = static_cast<long long>(chunk.batch) * p.tokens + chunk.begin + token;
      const long long at = row * p.heads + head;
      switch (p.dt.type) {
        case kBf16Number: from_float(static_cast<bf16*>(p_.ddt)[at], value); break;
        case kFp16Number: from_float(static_cast<fp16*>(p_.ddt)[at], value); break;
        case kFp32Number: static_cast<float*>(p_.ddt)[at] = value; break;
        default: static_cast<double*>(p_.ddt)[at] = value;
      }
    }
  }

  // Sends gradients of a chunk's tokens to their place, and starts anew.
  template <int kTiles>
  __device__ __forceinline__ void flush(float (&d)[kTiles][32], void* tensor, int heads, int head, int width,
                                        int warpgroup) const {
    const Chunk& chunk = shared_.chunk;
    unsigned char* const tile = tiles_ + p_.staging + warpgroup * kTileSize;
    constexpr int kPieces = 8;  // of a row
    const int thread = threadIdx.x % 128, piece = thread % kPieces;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      sync_threads(1 + warpgroup, 128);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        Word packed[4];
        wgmma::pack_operand<T>(packed, d[i], j);
        store_matrices(tile + straight_row(j), packed);
      }
      sync_threads(1 + warpgroup, 128);
      const int column = i * kTile + 8 * piece;
      for (int row = thread / kPieces; row < chunk.tokens && column < width; row += 128 / kPieces) {
        const long long token = static_cast<long long>(chunk.batch) * p_.common.tokens + chunk.begin + row;
        *reinterpret_cast<uint4*>(static_cast<T*>(tensor) + (token * heads + head) * width + column) =
            *reinterpret_cast<const uint4*>(tile + wgmma::swizzled(row, piece));
      }
#pragma unroll
      for (int j = 0; j < 32; ++j) d[i][j] = 0.0f;
    }
  }

  const GradientsParams& p_;
  unsigned char* const tiles_;
  GradientsShared& shared_;
};

template <class T, int kV, int kK>
__device__ __forceinline__ void gradients(const GradientsParams& p, unsigned char* shared) {
  using Block = GradientsBlock<T, kV, kK>;
  __shared__ GradientsShared barriers;
  if (threadIdx.x < 32) {
    const Chunk chunk = chunk_at(p.common, blockIdx.y);
    if (lane() == 0) {
      barriers.chunk = chunk;
      Block::init(barriers);
    }
  }
  __syncthreads();
  const Block block(p, shared, barriers);
  if (barriers.chunk.tokens <= 0) return block.leave_nothing();
  const int warpgroup = uniform(threadIdx.x / 128);
  if (warpgroup < Block::kWarpgroups) {
    claim_registers<kGradientRegisters>();
    return warpgroup == 0 ? block.make_dx() : block.make_db_and_dc();
  }
  release_registers<kGradientLoaderRegisters>();
  const int warp = uniform(warp_of_four());
  if (warp < kGradientGates) {
    block.make_factors(warp);
  } else if (warp == kGradientGates) {
    block.finish();
  } else if (lane() == 0) {
    block.load();
  }
}

}  // namespace hylo::ssd

extern "C" __global__ void __launch_bounds__(hylo::ssd::kGradientThreads, 1)
    ssd_bwd_kernel_gradients(const __grid_constant__ hylo::ssd::GradientsParams p) {
  extern __shared__ unsigned char shared[];
  hylo::ssd::gradients<hylo::HYLO_T, HYLO_V, HYLO_K>(p, hylo::aligned(shared));
}
