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
#include "common/dependent.cuh"
#include "ssd/gates.cuh"
#include "ssd/gradients_traits.cuh"
#include "ssd/rows.cuh"

namespace hylo::ssd {

// Where a head's tiles are, a bit for each kind whose tiles serve no head before it, or none after it; the head and its
// chunk. What the loader says here holds until all warpgroups are done with the head after it.
struct alignas(16) HeadTiles {
  int places[kTileKinds];
  unsigned first, last;
  Chunk chunk;
  int index, head;  // of the chunk among all
};

// What a block's warps share beside the tiles. The barriers of the heads, in a ring: `ready` when tiles of tokens and
// factors are there, `states` when the others are; `done` when the three warpgroups have read all that and left their
// sums; `finished` when those are read, too.
struct GradientsShared {
  TileSlots slots[kTileKinds];
  HeadTiles heads[kHeadRing];
  Barrier ready[kHeadRing], states[kHeadRing], done[kHeadRing], finished[kHeadRing];
  Handover pairs;
  float skips[kHeadRing], rates[kHeadRing];
};

// The loader's way through the slots of all kinds of tiles: each of its first lanes follows one kind.
class TileTurns {
 public:
  __device__ __forceinline__ explicit TileTurns(const TileSlots (&slots)[kTileKinds])
      : slots_(slots[lane() < kTileKinds ? lane() : 0]) {}

  __device__ __forceinline__ int place() const { return slots_.offset + slot_ * slots_.size; }
  __device__ __forceinline__ int size() const { return slots_.size; }
  // Whether the tiles are new with this head, or serve it as the last one.
  __device__ __forceinline__ bool first() const { return within_ == 0; }
  __device__ __forceinline__ bool last() const { return within_ == slots_.turns - 1; }
  // Heads that must be done before the slot is free.
  __device__ __forceinline__ int before(int turn) const { return turn - (slots_.depth - 1) * slots_.turns; }

  // On to the next head.
  __device__ __forceinline__ void advance() {
    if (!last()) {
      ++within_;
      return;
    }
    within_ = 0;
    slot_ = slot_ + 1 < slots_.depth ? slot_ + 1 : 0;
  }

 private:
  const TileSlots& slots_;
  int within_ = 0, slot_ = 0;
};

template <class T, int kV, int kK>
class GradientsBlock {
 public:
  static constexpr int kThreads = 128 * kGradientWarpgroups;
  static constexpr int kWideV = kV / kTile, kWideK = kK / kTile;

  __device__ __forceinline__ GradientsBlock(const GradientsParams& p, unsigned char* shared, GradientsShared& barriers)
      : p_(p), tiles_(shared), shared_(barriers) {}

  static __device__ __forceinline__ void init(const GradientsParams& p, GradientsShared& shared) {
    for (int kind = 0; kind < kTileKinds; ++kind) shared.slots[kind] = p.slots[kind];
    for (Barrier& ready : shared.ready) ready.init(32 + 32);
    for (Barrier& states : shared.states) states.init(1);
    for (Barrier& done : shared.done) done.init(kThreads);
    for (Barrier& finished : shared.finished) finished.init(32);
    shared.pairs.init(128, 256);
    fence_barrier_init();
  }

  // A warp.
  __device__ __forceinline__ void load() const {
    if (lane() < kTileKinds) prefetch_map(p_.tiles[lane()]);
    TileTurns turns(shared_.slots);
    int done = 0;
    each_head([&](const Place& at) {
      const int slot = at.turn % kHeadRing, place = turns.place();
      const bool states = lane() >= kTilesStates, wanted = lane() < kTileKinds && turns.first();
      const unsigned first = __ballot_sync(kAllLanes, wanted), last = __ballot_sync(kAllLanes, turns.last());
      const int before = wanted ? turns.before(at.turn) : 0, size = wanted ? turns.size() : 0;
      done = await_done(done, __reduce_max_sync(kAllLanes, states ? 0 : before));
      if (lane() < kTileKinds) shared_.heads[slot].places[lane()] = place;
      if (lane() == 0) {
        shared_.heads[slot].first = first;
        shared_.heads[slot].last = last;
        shared_.heads[slot].chunk = at.chunk;
        shared_.heads[slot].index = at.index;
        shared_.heads[slot].head = at.head;
      }
      const int bytes = __reduce_add_sync(kAllLanes, states ? 0 : size);
      if (lane() == 0) {
        shared_.ready[slot].arrive_expecting(bytes);
      } else {
        shared_.ready[slot].arrive();
      }
      load_tiles(first, 0, kTilesStates, place, at, shared_.ready[slot]);
      done = await_done(done, __reduce_max_sync(kAllLanes, before));
      if (at.turn == 0) await_kernel_before();  // which makes the states
      const int of_states = __reduce_add_sync(kAllLanes, states ? size : 0);
      if (lane() == 0) shared_.states[slot].arrive_expecting(of_states);
      __syncwarp();
      load_tiles(first, kTilesStates, kTileKinds, place, at, shared_.states[slot]);
      turns.advance();
    });
  }

  // Two warps take turns. All loads of a head are under way at once: in a row they took longer than all else.
  __device__ __forceinline__ void make_factors(int index) const {
    each_head([&](const Place& at) {
      if (at.turn % kGradientGates != index) return;
      const int slot = at.turn % kHeadRing;
      const Sequence only{0, at.chunk.batch, at.chunk.begin, at.chunk.tokens};
      const Gates gates(p_.common, at.head, only);
      const Gates::Raw dt = gates.load(0);
      const Word skip = load_of_head(p_.common.d, at.head);
      shared_.finished[slot].wait((at.turn / kHeadRing & 1) ^ 1);
      const float2 raw = gates.raw(dt), step = gates.steps(raw, only.tokens), sum = gates.sums(step);
      float* const factors = factors_at(slot);
      Gates::write_ends(step, sum, factors);
      Gates::write_between<false>(step, sum, factors);
      Gates::write_slopes(gates.slopes(raw, only.tokens), factors);
      if (lane() == 0) {
        shared_.skips[slot] = number(p_.common.d.type, skip);
        shared_.rates[slot] = gates.rate();
      }
      shared_.ready[slot].arrive();
    });
  }

  // The gates' gradients, two tokens a lane.
  __device__ __forceinline__ void finish() const {
    each_head([&](const Place& at) {
      const int slot = at.turn % kHeadRing;
      shared_.done[slot].wait(at.turn / kHeadRing & 1);
      finish_head(at, shared_.rates[slot], Factors{factors_at(slot)}, sums_at(slot));
      shared_.finished[slot].arrive();
    });
  }

  // The first warpgroup.
  __device__ __forceinline__ void make_dx() const {
    float dx[kWideV][32] = {};
    each_head([&](const Place& at) {
      const int slot = at.turn % kHeadRing;
      const Tiles tiles = begin(at);
      add_dx(tiles, Factors{factors_at(slot)}, sums_at(slot), shared_.skips[slot], dx);
      shared_.done[slot].arrive();
      if (tiles.last(kTilesX)) flush(kMakesDX, dx, shared_.heads[slot]);
    });
    finish_copies();
  }

  // The second or the third: one code for both, since two of them, beside the first's, did not stay in the instruction
  // cache.
  __device__ __forceinline__ void make_db_or_dc(int role) const {
    float d[kWideK][32] = {};
    each_head([&](const Place& at) {
      const int slot = at.turn % kHeadRing;
      const Tiles tiles = begin(at);
      add_db_or_dc(role, tiles, Factors{factors_at(slot)}, sums_at(slot), d);
      shared_.done[slot].arrive();
      if (!tiles.last(role)) return;
      if (p_.earlier >> role & 1) add_earlier(role, shared_.heads[slot].index, d);
      if (p_.later >> role & 1) {
        leave_sums(role, shared_.heads[slot].index, d);
      } else {
        flush(role, d, shared_.heads[slot]);
      }
    });
    finish_copies();
  }

 private:
  static constexpr int kAllBarrier = 1 + kGradientWarpgroups;  // those before it are the warpgroups' own

  // A head of a chunk, and how many this block took before it.
  struct Place {
    Chunk chunk;
    int index;  // of the chunk among all
    int head, turn;
  };

  template <class F>
  __device__ __forceinline__ void each_head(const F& f) const {
    Place at;
    at.turn = 0;
#pragma unroll 1
    for (int item = blockIdx.x; item < p_.common.chunks * p_.sets; item += gridDim.x) {
      at.index = item / p_.sets;
      at.chunk = chunk_at(p_.common, at.index);
      if (at.chunk.tokens <= 0) continue;
      const int first = p_.common.window.first + item % p_.sets * p_.set;
#pragma unroll 1
      for (at.head = first; at.head < first + p_.set; ++at.head, ++at.turn) f(at);
    }
  }

  __device__ __forceinline__ float* factors_at(int slot) const {
    return reinterpret_cast<float*>(tiles_ + p_.factors + slot * kFactorsSize);
  }
  __device__ __forceinline__ float* sums_at(int buffer) const {
    return reinterpret_cast<float*>(tiles_ + p_.sums + buffer * kSumsSize);
  }
  __device__ __forceinline__ float* part(int which, const Place& at) const {
    return p_.parts + (static_cast<long long>(which) * p_.common.chunks + at.index) * p_.common.heads + at.head;
  }

  // A head's tiles.
  class Tiles {
   public:
    __device__ __forceinline__ Tiles(const GradientsBlock& block, int turn)
        : shared_(block.tiles_), head_(block.shared_.heads[turn % kHeadRing]), turn_(turn), block_(block) {}

    __device__ __forceinline__ int turn() const { return turn_; }
    __device__ __forceinline__ unsigned char* at(int kind) const { return shared_ + head_.places[kind]; }
    __device__ __forceinline__ bool first(int kind) const { return head_.first >> kind & 1; }
    __device__ __forceinline__ bool last(int kind) const { return head_.last >> kind & 1; }
    __device__ __forceinline__ void await_states() const {
      block_.shared_.states[turn_ % kHeadRing].wait(turn_ / kHeadRing & 1);
    }

   private:
    unsigned char* const shared_;
    const HeadTiles head_;
    const int turn_;
    const GradientsBlock& block_;
  };

  // Of a warpgroup: waits for what it needs of a head, but for the states.
  __device__ __forceinline__ Tiles begin(const Place& at) const {
    shared_.ready[at.turn % kHeadRing].wait(at.turn / kHeadRing & 1);
    const Tiles tiles(*this, at.turn);
    if (p_.common.cu_seqlens != nullptr) {
      const int tokens = shared_.heads[at.turn % kHeadRing].chunk.tokens;
      if (tokens < kChunk) clear_tails(tiles, tokens);
    }
    return tiles;
  }

  static __device__ __forceinline__ void finish_copies() {
    if (threadIdx.x % 128 == 0) await_copies_out<0>();
  }

  // Waits until so many heads are done, of which `done` are known to be. Returns how many then are.
  __device__ __forceinline__ int await_done(int done, int wanted) const {
#pragma unroll 1
    for (; done < wanted; ++done) shared_.done[done % kHeadRing].wait(done / kHeadRing & 1);
    return done;
  }

  // Of the kinds from first to end those whose bits are set; lanes have their places. A tile a lane.
  __device__ __forceinline__ void load_tiles(unsigned kinds, int first, int end, int places, const Place& at,
                                             Barrier& full) const {
#pragma unroll 1
    for (int kind = first; kind < end; ++kind) {
      unsigned char* const to = tiles_ + __shfl_sync(kAllLanes, places, kind);
      const TileSlots& slots = shared_.slots[kind];
      const int tile = lane();
      if (!(kinds >> kind & 1) || tile >= slots.size / kTileSize) continue;
      const bool states = kind >= kTilesStates;
      const int column = states ? tile % kWideK * kTile : tile * kTile;
      const int y = states ? tile / kWideK * kTile : at.head / slots.group;
      copy_box(to + tile * kTileSize, p_.tiles[kind], full, column, y,
               states ? at.head - p_.common.window.first : at.chunk.begin, states ? at.index : at.chunk.batch);
    }
  }

  // By all warpgroups.
  __device__ __forceinline__ void clear_tails(const Tiles& tiles, int tokens) const {
#pragma unroll
    for (int kind = 0; kind < kTilesStates; ++kind) {
      if (!tiles.first(kind)) continue;
      unsigned char* const first = tiles.at(kind);
      const int size = shared_.slots[kind].size;
#pragma unroll 1
      for (int tile = 0; tile < size; tile += kTileSize) {
        each_row_from(tokens, threadIdx.x, kThreads, [&](int at) { clear_words(first + tile + at); });
      }
    }
    fence_async();
    sync_threads(kAllBarrier, kThreads);
  }

  // d = a b^T, or a b, of two tiles' rows x K or V, or it is added to d; over kSteps times 16. Where the rows of b run
  // along the sum, its tiles follow each other kWide tiles apart.
  template <int kSteps, int kSize>
  static __device__ __forceinline__ void multiply_rows(float (&d)[kSize], const unsigned char* a,
                                                       const unsigned char* b, bool onto = false) {
    const DoubleWord left = wgmma::descriptor_k_major(shared_address(a));
    const DoubleWord right = wgmma::descriptor_k_major(shared_address(b));
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int next = i / 4 * (kTileSize >> 4) + i % 4 * wgmma::kNextKMajor;
      wgmma::product_shared<T, wgmma::kAlongK, wgmma::kAlongK>(d, left + next, right + next, onto || i > 0);
    }
    wgmma::commit();
  }
  template <int kSteps, int kWide, int kSize>
  static __device__ __forceinline__ void multiply_columns(float (&d)[kSize], const unsigned char* a,
                                                          const unsigned char* b, bool onto = false) {
    const DoubleWord left = wgmma::descriptor_k_major(shared_address(a));
    const DoubleWord right = wgmma::descriptor_n_major(shared_address(b), kTileSize);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      wgmma::product_shared<T, wgmma::kAlongK, wgmma::kAlongMN>(
          d, left + i / 4 * (kTileSize >> 4) + i % 4 * wgmma::kNextKMajor,
          right + i / 4 * kWide * (kTileSize >> 4) + i % 4 * wgmma::kNextNMajor, onto || i > 0);
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
  __device__ __forceinline__ void add_dx(const Tiles& tiles, const Factors& factors, float* sums, float skip,
                                         float (&dx)[kWideV][32]) const {
    Word weights[4][4];
    {
      float scores[32], products[32];
      wgmma::fence();
      multiply_rows<kK / 16>(scores, tiles.at(kTilesB), tiles.at(kTilesC));
      multiply_rows<kV / 16>(products, tiles.at(kTilesX), tiles.at(kTilesDO));
      settle(scores);
      wgmma::pin(products);
      weigh_writers(weights, scores, products, factors, sums);
    }
    tiles.await_states();
    const float written[2] = {factors.row(kWritten, row_token(0)), factors.row(kWritten, row_token(1))};
#pragma unroll
    for (int tile = 0; tile < kWideV; ++tile) {
      const unsigned char* const d_o = tiles.at(kTilesDO) + tile * kTileSize;
      float added[32];
      wgmma::fence();
      multiply_rows<kK / 16>(added, tiles.at(kTilesB), tiles.at(kTilesDStates) + tile * kWideK * kTileSize);
      settle(added);
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

  // Tokens that write along rows, or those that read.
  __device__ __forceinline__ void add_db_or_dc(int role, const Tiles& tiles, const Factors& factors, float* sums,
                                               float (&d)[kWideK][32]) const {
    const bool read = role == kMakesDC;
    if (!read) make_pairs(tiles, factors, sums);
    tiles.await_states();
    if (read) multiply_states(tiles.at(kTilesStates), tiles.at(kTilesDStates), sums);
    // All are asked for first: a choice of what to ask for would put the turns into memory.
    const unsigned char *const x = tiles.at(kTilesX), *const b = tiles.at(kTilesB), *const c = tiles.at(kTilesC);
    const unsigned char *const d_o = tiles.at(kTilesDO), *const s = tiles.at(kTilesStates), *const ds = tiles.at(kTilesDStates);
    const unsigned char *const rows = read ? d_o : x, *const states = read ? s : ds;
    const unsigned char *const own = read ? c : b, *const others = read ? b : c;
    const unsigned char* const pairs = tiles_ + p_.pairs + (read ? kTileSize : 0);
    float through[2], scale[2];  // the decay between the state and a row's token; with the step of one that writes
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int token = row_token(row);
      scale[row] = factors.row(read ? kFromStart : kWritten, token);
      through[row] = read ? scale[row] : factors.to_end(token);
    }
#pragma unroll
    for (int tile = 0; tile < kWideK; ++tile) {
      float added[32];
      wgmma::fence();
      multiply_columns<kV / 16, kWideK>(added, rows, states + tile * kTileSize);
      settle(added);
      dot(added, own + tile * kTileSize, through, sums + ((read ? kOfState : kAtEnd) + tile) * kChunk);
      scale_rows(added, scale);
      if (tile == 0) shared_.pairs.full.wait(tiles.turn() & 1);
      wgmma::fence();
      multiply_columns<kChunk / 16, 1>(added, pairs, others + tile * kTileSize, true);
      settle(added);
      add(d[tile], added);
    }
    shared_.pairs.empty.arrive();
  }

  // Leaves X dO^T, with decays and steps, for both ways in which its rows and columns are summed over, and x . dO.
  __device__ __forceinline__ void make_pairs(const Tiles& tiles, const Factors& factors, float* sums) const {
    Word pairs[4][4];
    {
      float products[32];
      wgmma::fence();
      multiply_rows<kV / 16>(products, tiles.at(kTilesX), tiles.at(kTilesDO));
      settle(products);
      const float2 skipped = on_diagonal(products);
      if (has_diagonal()) sums[kSkipped * kChunk + row_token(0)] = skipped.x;
      if (has_diagonal()) sums[kSkipped * kChunk + row_token(1)] = skipped.y;
      pair_writers(pairs, products, factors);
    }
    shared_.pairs.empty.wait((tiles.turn() & 1) ^ 1);
    unsigned char* const writers = tiles_ + p_.pairs;
    unsigned char* const readers = writers + kTileSize;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      store_matrices(writers + straight_row(i), pairs[i]);
      store_transposed(readers + transposed_row(i), pairs[i]);
    }
    fence_async();
    shared_.pairs.full.arrive();
  }

  // Packs what tokens that write are read with, and leaves what comes of its product with `products`: sums over the
  // tokens that read, those that write themselves among them, and over those that write.
  static __device__ __forceinline__ void weigh_writers(Word (&weights)[4][4], const float (&scores)[32],
                                                       const float (&products)[32], const Factors& factors,
                                                       float* sums) {
    const Writers writers(factors);
    float above[2] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // of the tokens that read: their sums are added up across rows apart
      float below[8] = {};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int block = 4 * half + i;
        writers.each(block, [&](int row, float step, const float2& decay) {
          const int at = 4 * block + 2 * row;
          const float low = scores[at] * decay.x, high = scores[at + 1] * decay.y;
          const float both_low = low * products[at], both_high = high * products[at + 1];
          above[row] += both_low + both_high;
          below[2 * i] += step * both_low;
          below[2 * i + 1] += step * both_high;
          weights[block / 2][2 * (block % 2) + row] = wgmma::pack<T>(step * low, step * high);
        });
      }
      sums[(kBelow + warp_of_four()) * kChunk + 32 * half + column_of_sum()] = sum_over_rows(below);
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float found = sum_over_quad(above[row]);
      if (lane() % 4 == 0) sums[kAbove * kChunk + row_token(row)] = found;
    }
  }

  // Packs `products` with the same decays.
  static __device__ __forceinline__ void pair_writers(Word (&pairs)[4][4], const float (&products)[32],
                                                      const Factors& factors) {
    const Writers writers(factors);
#pragma unroll
    for (int block = 0; block < 8; ++block) {
      writers.each(block, [&](int row, float step, const float2& decay) {
        const int at = 4 * block + 2 * row;
        pairs[block / 2][2 * (block % 2) + row] =
            wgmma::pack<T>(step * (products[at] * decay.x), step * (products[at + 1] * decay.y));
      });
    }
  }

  // Decays and steps where rows are tokens that write.
  class Writers {
   public:
    __device__ __forceinline__ explicit Writers(const Factors& factors) : factors_(factors), decays_(factors) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        step_[row] = factors.row(kStep, row_token(row));
        to_block_[0][row] = 0.0f;
#pragma unroll
        for (int block = 1; block < kChunk / kBlock; ++block) {
          to_block_[block][row] = factors.row(static_cast<Factor>(kToBlock1 + block - 1), row_token(row));
        }
      }
    }

    // Calls f(row, step of its token, decays from it through the two tokens that read) for both rows.
    template <class F>
    __device__ __forceinline__ void each(int block, const F& f) const {
      const float2 in_block = factors_.columns(kInBlock, block);
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const float to_block = to_block_[block / 2][row];
        const float2 other = make_float2(to_block * in_block.x, to_block * in_block.y);
        f(row, step_[row], decays_.choose(block, decays_.own(block % 2, row), other));
      }
    }

   private:
    const Factors factors_;
    const Decays<kAnyWarp, false> decays_;
    float step_[2], to_block_[kChunk / kBlock][2];
  };

  // Of an accumulator of 64 x 64, the numbers on its diagonal of both of a thread's rows, if it has them.
  static __device__ __forceinline__ bool has_diagonal() { return lane() % 4 == lane() / 8; }
  static __device__ __forceinline__ float2 on_diagonal(const float (&d)[32]) {
    const int warp = uniform(warp_of_four());
    float found[2][2] = {};
#pragma unroll
    for (int row = 0; row < 2; ++row) {
#pragma unroll
      for (int which = 0; which < 4; ++which) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (which == warp) found[row][e] = d[4 * (2 * which + row) + 2 * row + e];
        }
      }
    }
    const bool odd = lane() / 4 % 2;
    return make_float2(odd ? found[0][1] : found[0][0], odd ? found[1][1] : found[1][0]);
  }

  // The sum over all of S dS, in parts: the diagonal of S dS^T. The tensor cores have time for the rest of it.
  static __device__ __forceinline__ void multiply_states(const unsigned char* states, const unsigned char* dstates,
                                                         float* sums) {
    float products[32];
    wgmma::fence();
#pragma unroll
    for (int tile = 0; tile < kWideV; ++tile) {
      const int row = tile * kWideK * kTileSize;
      multiply_rows<kK / 16>(products, states + row, dstates + row, tile > 0);
    }
    settle(products);
    const float2 found = on_diagonal(products);
    float sum = has_diagonal() ? found.x + found.y : 0.0f;
#pragma unroll
    for (int away = 16; away > 0; away /= 2) sum += __shfl_xor_sync(kAllLanes, sum, away);
    if (lane() == 0) sums[kSums * kChunk + warp_of_four()] = sum;
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

  __device__ __forceinline__ void finish_head(const Place& place, float rate, const Factors& factors, const float* sums) const {
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
    const float2 above = total(kAbove, 1), at_end = total(kAtEnd, kWideK);
    float whole = 0.0f;
    for (int i = 0; i < kStateParts; ++i) whole += sums[kSums * kChunk + i];
    whole *= factors.whole();

    // A gate decays what later tokens read of earlier ones and of the state, and what earlier ones add to the next state.
    const float2 pairs = make_float2(below.x - step.x * above.x, below.y - step.y * above.y);
    const float2 added = make_float2(step.x * at_end.x, step.y * at_end.y);
    float within = pairs.x + pairs.y, from_state = of_state.x + of_state.y, through = added.x + added.y;
#pragma unroll
    for (int away = 1; away < 32; away *= 2) {
      const float later_within = __shfl_down_sync(kAllLanes, within, away);
      const float later_from_state = __shfl_down_sync(kAllLanes, from_state, away);
      const float earlier = __shfl_up_sync(kAllLanes, through, away);
      if (lane() + away < 32) within += later_within, from_state += later_from_state;
      if (lane() >= away) through += earlier;
    }
    const float2 of_pairs = make_float2(within, within - pairs.x);
    const float others = whole + from_state + (through - added.x - added.y);
    const float2 gate = make_float2(of_pairs.x + others, of_pairs.y + (others - of_state.x + added.x));

    const float2 ddt = make_float2(slope.x * (above.x + at_end.x + rate * gate.x),
                                   slope.y * (above.y + at_end.y + rate * gate.y));
    const float2 skipped = two(sums + kSkipped * kChunk);
    store_ddt(place, ddt);
    // Of a only what passes between the chunk's tokens: the walks know the rest of it better (chain.cuh).
    float of_head[kHeadParts] = {skipped.x + skipped.y, ddt.x + ddt.y, step.x * of_pairs.x + step.y * of_pairs.y};
#pragma unroll
    for (int which = 0; which < kHeadParts; ++which) {
#pragma unroll
      for (int away = 16; away > 0; away /= 2) of_head[which] += __shfl_xor_sync(kAllLanes, of_head[which], away);
      if (lane() == 0) *part(which, place) = of_head[which];
    }
  }

  __device__ __forceinline__ void store_ddt(const Place& place, float2 ddt) const {
    const Params& p = p_.common;
    const Chunk& chunk = place.chunk;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const int token = 2 * lane() + which;
      if (token >= chunk.tokens) continue;
      const long long row = static_cast<long long>(chunk.batch) * p.tokens + chunk.begin + token;
      store_number(p.dt.type, p_.ddt, row * p.heads + place.head, which == 0 ? ddt.x : ddt.y);
    }
  }

  // Calls f(its sums so far, of two neighbours) for all of this thread's.
  template <class F>
  __device__ __forceinline__ void each_sum(int role, int chunk, float (&d)[kWideK][32], const F& f) const {
    const long long of_chunk = static_cast<long long>(role - kMakesDB) * p_.common.chunks + chunk;
    float2* const sums = reinterpret_cast<float2*>(p_.sums_so_far) + of_chunk * (kWideK * 16 * 128) + threadIdx.x % 128;
#pragma unroll
    for (int tile = 0; tile < kWideK; ++tile) {
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        f(d[tile][2 * i], d[tile][2 * i + 1], sums + (tile * 16 + i) * 128);
        if (i % 4 == 3) asm volatile("" ::: "memory");  // all loads at once would take registers that are not there
      }
    }
  }

  // Adds what the windows before have summed up; leaves that for the next one, and starts anew.
  __device__ __forceinline__ void add_earlier(int role, int chunk, float (&d)[kWideK][32]) const {
    each_sum(role, chunk, d, [](float& low, float& high, const float2* at) {
      const float2 sum = *at;
      low += sum.x, high += sum.y;
    });
  }
  __device__ __forceinline__ void leave_sums(int role, int chunk, float (&d)[kWideK][32]) const {
    each_sum(role, chunk, d, [](float& low, float& high, float2* at) {
      *at = make_float2(low, high);
      low = high = 0.0f;
    });
  }

  // Sends gradients of a chunk's tokens to their place, and starts anew.
  template <int kWide>
  __device__ __forceinline__ void flush(int role, float (&d)[kWide][32], const HeadTiles& of) const {
    const Params& p = p_.common;
    const int group = shared_.slots[role].group, width = role == kMakesDX ? p.values : p.width;
    unsigned char* const staged = tiles_ + p_.staging + role * kTileSize;
#pragma unroll
    for (int tile = 0; tile < kWide; ++tile) {
      if (threadIdx.x % 128 == 0) await_copies_out<0>();
      sync_threads(1 + role, 128);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        Word packed[4];
        wgmma::pack_operand<T>(packed, d[tile], i);
        store_matrices(staged + straight_row(i), packed);
      }
      fence_async();
      sync_threads(1 + role, 128);
      store_tokens<T, 128>(p_.maps[role], p_.gradients[role], p.cu_seqlens != nullptr, of.chunk, p_.strides[role],
                           of.head / group, width, tile * kTile, staged, threadIdx.x % 128);
#pragma unroll
      for (int i = 0; i < 32; ++i) d[tile][i] = 0.0f;
    }
  }

  const GradientsParams& p_;
  unsigned char* const tiles_;
  GradientsShared& shared_;
};
static_assert(int{kMakesDX} == int{kTilesX} && int{kMakesDB} == int{kTilesB} && int{kMakesDC} == int{kTilesC},
              "a gradient is made of the heads that share what it is the gradient of");

template <class T, int kV, int kK>
__device__ __forceinline__ void gradients(const GradientsParams& p, unsigned char* shared) {
  using Block = GradientsBlock<T, kV, kK>;
  __shared__ GradientsShared barriers;
  if (threadIdx.x == 0) Block::init(p, barriers);
  __syncthreads();
  start_next_kernel();
  const Block block(p, shared, barriers);
  const int role = uniform(threadIdx.x / 128);
  if (role == kMakesDX) {
    claim_registers<kDXRegisters>();
    return block.make_dx();
  }
  if (role == kMakesDB || role == kMakesDC) {
    claim_registers<kDKeyRegisters>();
    return block.make_db_or_dc(role);
  }
  release_registers<kGradientLoaderRegisters>();
  const int warp = uniform(warp_of_four());
  if (warp < kGradientGates) {
    block.make_factors(warp);
  } else if (warp == kGradientGates) {
    block.finish();
  } else {
    block.load();
  }
}

}  // namespace hylo::ssd

extern "C" __global__ void __launch_bounds__(hylo::ssd::kGradientThreads, 1)
    ssd_bwd_kernel_gradients(const __grid_constant__ hylo::ssd::GradientsParams p) {
  extern __shared__ unsigned char shared[];
  hylo::ssd::gradients<hylo::HYLO_T, HYLO_V, HYLO_K>(p, hylo::aligned(shared));
}
