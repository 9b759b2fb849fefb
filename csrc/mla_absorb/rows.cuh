// Two warpgroups that attend together, for so many query rows that they fill the tensor core's 64:
//
//   S [64 rows, 64 tokens] = queries keys^T, of every other tile of tokens by either of them
//   O [64 rows, R]        += P latents, half of the latents by either, of all tiles
//
// Tiles come in pairs. One warpgroup makes the weights of the first while the other has the products of the second, and
// so on: what one of them does without the tensor core the other hides. Weights stay in registers, and are left for the
// other where their tile's keys have what is behind the latents, which by then nobody needs. As weights of all tiles are
// relative to one maximum of a row, it is left beside them; it is raised as in attend.cuh.
#pragma once

#include "mla_absorb/merge.cuh"

namespace hylo::mla_absorb {

template <class T, int kR, int kE, bool kScaled>
class AttentionByRows {
 public:
  static constexpr int kN = kTile;
  static constexpr Dims kDims{kR, kE, kN, kScaled};
  static constexpr int kStages = room(kDims).stages;
  static constexpr int kKeyWidth = kR + kE;
  static constexpr int kHalf = kR / 2;      // latents of a warpgroup
  static constexpr int kSteps = kTokens / 16;  // of a product over a tile's tokens
  using Weights = Word[kSteps][4];             // a thread's, as an operand

  __device__ __forceinline__ AttentionByRows(const Params& p, int group, unsigned char* stages,
                                             const unsigned char* queries, Shared<kN, true>& shared)
      : p_(p),
        group_(group),
        thread_(threadIdx.x % 128),
        warp_(uniform(threadIdx.x / 32 % 4)),
        stages_(stages),
        queries_(queries),
        shared_(shared) {}

  // All of a piece; `tiles` is how many the block has had before.
  __device__ __forceinline__ void run(const Piece& piece, const Turns& turns, unsigned tiles) {
    start();
    const int count = uniform(turns.count);
    if (group_ == 0) {
#pragma unroll 1
      for (int i = 0; i < count; i += 2) lead(piece, turns, tiles + i, i, i + 1 < count);
    } else {
#pragma unroll 1
      for (int i = 0; i < count; i += 2) follow(piece, turns, tiles + i, i, i + 1 < count);
    }
  }

  // Sums of weights, and what they are relative to, for `merge`.
  __device__ __forceinline__ void leave_totals() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = total_[r];
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      if (lane() % 4 != 0) continue;
      shared_.totals[group_][row_of(r)] = sum;
      if (group_ == 0) shared_.total[row_of(r)].top = top_[r];
    }
  }

  // The query row of the tile, of a thread's two: one of each half.
  __device__ __forceinline__ int row_of(int r) const { return kRowsMerged * r + 8 * warp_ + lane() / 4; }
  // A register of o: of 8 latents, and of a thread's two side by side.
  static __device__ __forceinline__ constexpr int at(int j, int r, int e) { return 4 * j + 2 * r + e; }

  float o[kHalf / 2];  // accumulators: 64 query rows by kHalf latents

 private:
  struct Tile {
    int token, stage;
    unsigned turn;  // of the stage
  };
  // The i-th of the piece.
  __device__ __forceinline__ Tile tile_at(const Piece& piece, const Turns& turns, unsigned tile, int i) const {
    return {uniform(token_of(p_, piece, turns, i)), uniform(static_cast<int>(tile % kStages)), tile / kStages};
  }

  // The first of a pair is this warpgroup's own.
  __device__ __forceinline__ void lead(const Piece& piece, const Turns& turns, unsigned tile, int i, bool pair) {
    const Tile mine = tile_at(piece, turns, tile, i);
    float s[kN / 2];
    Weights weights;
    score(s, piece, mine);
    await_products();
    wgmma::pin(s);
    weigh(weights, s, piece, mine);
    rescale();
    add(weights, mine);
    await_sums(mine);
    if (pair) add_others(tile_at(piece, turns, tile + 1, i + 1));
  }

  // The second is, if there is one. Its weights are made while the first one's are multiplied.
  __device__ __forceinline__ void follow(const Piece& piece, const Turns& turns, unsigned tile, int i, bool pair) {
    const Tile first = tile_at(piece, turns, tile, i);
    if (!pair) {
      add_others(first);
      return;
    }
    const Tile mine = tile_at(piece, turns, tile + 1, i + 1);
    float s[kN / 2];
    Weights others, weights;
    score(s, piece, mine);
    take(others, first);
    await_products();
    wgmma::pin(s);
    rescale();
    multiply_others(others, first);
    weigh(weights, s, piece, mine);
    await_sums(first);
    rescale();
    add(weights, mine);
    await_sums(mine);
  }

  __device__ __forceinline__ void add_others(const Tile& tile) {
    Weights others;
    take(others, tile);
    rescale();
    multiply_others(others, tile);
    await_sums(tile);
  }

  // The place of others' weights goes back when the product has them. As soon as they are asked for would be too soon: with
  // products for scores under way a load is seen to come later than what fills the place anew.
  __device__ __forceinline__ void multiply_others(const Weights& others, const Tile& tile) {
    add(others, tile);
    if (tiles_of_part(kDims, 0) > 0) part(tile, 0).empty.arrive();
  }

  __device__ __forceinline__ void start() {
#pragma unroll
    for (int r = 0; r < 2; ++r) top_[r] = kNoTop, total_[r] = 0.0f, kept_[r] = 1.0f;
#pragma unroll
    for (int i = 0; i < kHalf / 2; ++i) o[i] = 0.0f;
  }

  __device__ __forceinline__ void sync() const { meet(1 + group_, 128); }
  __device__ __forceinline__ unsigned char* keys_of(const Tile& tile) const {
    return stages_ + tile.stage * stage_size(kDims);
  }
  // A thread's weights of a tile, 16 bytes of each step. The other warpgroup's thread of that number wants the same.
  __device__ __forceinline__ uint4* left_weights(const Tile& tile) const {
    return reinterpret_cast<uint4*>(keys_of(tile) + tiles_of(kR) * kTileSize) + thread_;
  }

  static __device__ __forceinline__ void await_products() { wgmma::wait<0>(); }

  // A stage comes, and goes back, in parts: what is behind the latents, then either warpgroup's half of these.
  __device__ __forceinline__ Handover& part(const Tile& tile, int i) const {
    return shared_.stages[tile.stage * kMostParts + i];
  }
  __device__ __forceinline__ void await_part(const Tile& tile, int i) const {
    if (tiles_of_part(kDims, i) > 0) part(tile, i).full.wait(tile.turn & 1);
  }

  // Sends the product for scores on its way.
  __device__ __forceinline__ void score(float (&s)[kN / 2], const Piece& piece, const Tile& tile) const {
    if (uniform(is_end(piece, tile))) {
#pragma unroll
      for (int i = 0; i < kMostParts; ++i) await_part(tile, i);
      clear_others(piece, tile);
    }
    multiply_part<0>(s, tile);
    multiply_part<1>(s, tile);
    multiply_part<2>(s, tile);
  }

  template <int kPart>
  __device__ __forceinline__ void multiply_part(float (&s)[kN / 2], const Tile& tile) const {
    constexpr int kOfTile = kTile / 16, kFirst = first_of_part(kDims, kPart) * kOfTile;
    constexpr int kLast = kPart == 0 ? kKeyWidth / 16 : kFirst + kHalf / 16;
    constexpr int kFirstOfAll = kE > 0 ? kR / 16 : 0;
    const DoubleWord left = wgmma::descriptor_k_major(shared_address(queries_));
    const DoubleWord right = wgmma::descriptor_k_major(shared_address(keys_of(tile)));
    await_part(tile, kPart);
    wgmma::fence();
#pragma unroll
    for (int k = kFirst; k < kLast; ++k) {
      const DoubleWord step = k / kOfTile * (kTileSize >> 4) + k % kOfTile * wgmma::kNextKMajor;
      wgmma::product_shared<T, wgmma::kAlongK, wgmma::kAlongK>(s, left + step, right + step, k != kFirstOfAll);
    }
    wgmma::commit();
  }

  // Whether it has tokens that do not count.
  static __device__ __forceinline__ bool is_end(const Piece& piece, const Tile& tile) {
    return tile.token < piece.start || tile.token + kTokens > piece.end;
  }

  // Zeros instead of rows that do not count: a weight of 0 times a NaN is NaN.
  __device__ __forceinline__ void clear_others(const Piece& piece, const Tile& tile) const {
    clear_rows(piece, tile.token, keys_of(tile), key_tiles(kDims), thread_);
    fence_async();
    sync();
  }

  // Weights from scores, as an operand and for the other warpgroup. What they are relative to is raised first where a score
  // exceeds it by far.
  __device__ __forceinline__ void weigh(Weights& weights, float (&s)[kN / 2], const Piece& piece, const Tile& tile) {
    scale(s, tile);
    if (may_mask(piece, tile)) mask(s, piece, tile);
    const float most[2] = {largest(s, 0), largest(s, 1)};
    const bool exceeds = most[0] > top_[0] + kTolerance || most[1] > top_[1] + kTolerance;
    if (__ballot_sync(kAllLanes, exceeds) != 0) raise(most);
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) {
      s[i] = exp2_fast(s[i] - top_[i / 2 % 2]);
      total_[i / 2 % 2] += s[i];
    }
    leave(weights, s, tile);
  }

  __device__ __forceinline__ void leave(Weights& weights, const float (&s)[kN / 2], const Tile& tile) {
    sync();  // all have read the keys that weights take the place of
    uint4* const to = left_weights(tile);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      wgmma::pack_operand<T>(weights[step], s, step);
      to[step * 128] = make_uint4(weights[step][0], weights[step][1], weights[step][2], weights[step][3]);
    }
    shared_.tops[tile.stage][thread_] = make_float2(top_[0], top_[1]);
    shared_.weighed[tile.stage].arrive();
  }

  __device__ __forceinline__ void scale(float (&s)[kN / 2], const Tile& tile) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const unsigned char* factors = nullptr;
      int column = 0;
      if constexpr (kScaled) {
        const int n = static_cast<int>(blockIdx.y) * kN + row_of(r);
        column = kKeyWidth + (n - n / p_.by_heads * p_.heads) / p_.by_group;
        factors = keys_of(tile) + column / kTile * kTileSize;
      }
#pragma unroll
      for (int j = 0; j < kN / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float factor = p_.scale;
          if constexpr (kScaled) {
            const int token = 8 * j + 2 * (lane() % 4) + e;
            factor *= to_float(*reinterpret_cast<const T*>(factors + wgmma::swizzled(token, column % kTile / 8) +
                                                           column % 8 * 2));
          }
          s[at(j, r, e)] *= factor;
        }
      }
    }
  }

  __device__ __forceinline__ bool may_mask(const Piece& piece, const Tile& tile) const {
    return uniform(is_end(piece, tile) || (p_.causal && tile.token + kTokens > piece.end - p_.tokens + 1)) != 0;
  }

  __device__ __forceinline__ void mask(float (&s)[kN / 2], const Piece& piece, const Tile& tile) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = static_cast<int>(blockIdx.y) * kN + row_of(r);
      const int causal_end = piece.end - p_.tokens + 1 + row / p_.by_heads;
      const int end = p_.causal && causal_end < piece.end ? causal_end : piece.end;
#pragma unroll
      for (int i = 0; i < kN / 4; ++i) {
        const int token = tile.token + i / 2 * 8 + 2 * (lane() % 4) + i % 2;
        if (token < piece.start || token >= end) s[at(i / 2, r, i % 2)] = -__int_as_float(0x7f800000);
      }
    }
  }

  // Of a thread's scores of a row. Four at a time, which need not wait for each other.
  static __device__ __forceinline__ float largest(const float (&s)[kN / 2], int r) {
    float most[4];
#pragma unroll
    for (int i = 0; i < kN / 4; ++i) {
      const float score = s[at(i / 2, r, i % 2)];
      most[i % 4] = i < 4 ? score : fmaxf(most[i % 4], score);
    }
    return fmaxf(fmaxf(most[0], most[1]), fmaxf(most[2], most[3]));
  }

  // Makes `top` the maximum so far.
  __device__ __forceinline__ void raise(const float (&most)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = fmaxf(most[r], top_[r]);
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
      change_top(r, top);
    }
  }

  // Sums of weights follow at once, accumulators once no product is under way (`rescale`).
  __device__ __forceinline__ void change_top(int r, float top) {
    const float kept = exp2_fast(top_[r] - top);
    top_[r] = top;
    total_[r] *= kept;
    kept_[r] *= kept;
  }

  __device__ __forceinline__ void rescale() {
    if (__ballot_sync(kAllLanes, kept_[0] != 1.0f || kept_[1] != 1.0f) == 0) return;
#pragma unroll
    for (int i = 0; i < kHalf / 2; ++i) o[i] *= kept_[i / 2 % 2];
    kept_[0] = kept_[1] = 1.0f;
  }

  // The other warpgroup's weights.
  __device__ __forceinline__ void take(Weights& weights, const Tile& tile) {
    shared_.weighed[tile.stage].wait(tile.turn & 1);
    const uint4* const from = left_weights(tile);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint4 four = from[step * 128];
      weights[step][0] = four.x, weights[step][1] = four.y, weights[step][2] = four.z, weights[step][3] = four.w;
    }
    const float2 tops = shared_.tops[tile.stage][thread_];
    change_top(0, tops.x);
    change_top(1, tops.y);
  }

  // Sends the product for this warpgroup's half of the latents on its way.
  __device__ __forceinline__ void add(const Weights& weights, const Tile& tile) {
    const unsigned char* const latents = keys_of(tile) + group_ * (kHalf / kTile) * kTileSize;
    const DoubleWord right = wgmma::descriptor_n_major(shared_address(latents), kTileSize);
    wgmma::fence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      wgmma::product<T, wgmma::kAlongMN>(o, weights[step], right + step * wgmma::kNextNMajor, true);
    }
    wgmma::commit();
  }

  // The tile's part of the sums is there, and nobody needs this warpgroup's half of its latents any more.
  __device__ __forceinline__ void await_sums(const Tile& tile) {
    await_products();
    wgmma::pin(o);
    part(tile, 1 + group_).empty.arrive();
  }

  const Params& p_;
  const int group_, thread_, warp_;
  unsigned char* const stages_;
  const unsigned char* const queries_;
  Shared<kN, true>& shared_;
  float top_[2], total_[2];
  float kept_[2];  // what is left of accumulators that were made before `top` was raised
};

template <class T, int kR, int kE, bool kScaled>
class MergerByRows : Merger<T, kR, kE, kTile, kScaled> {
 public:
  using Base = Merger<T, kR, kE, kTile, kScaled>;
  using Attending = AttentionByRows<T, kR, kE, kScaled>;
  using Base::blocks_, Base::kDims, Base::kRounds, Base::p_, Base::thread_;
  static_assert(kRounds == 2, "a thread has a row of each round");
  static constexpr int kStages = room(kDims).stages * stage_size(kDims) / 16;  // fours

  // received: what queries lay in, behind the stages.
  __device__ __forceinline__ MergerByRows(const Params& p, int group, unsigned char* received,
                                          Shared<kTile, true>& shared)
      : Base(p, received, reinterpret_cast<Total(*)[kTile]>(received + received_size(kDims, kRowsMerged)), shared.total,
             shared),
        group_(group),
        shared_(shared) {}

  __device__ __forceinline__ void run(Attending& attending, const Piece& piece) {
    if (blocks_ > 1) cluster_arrive();  // queries have been read: what others send takes their place
    attending.leave_totals();
    sync_attending();
    if (thread_ < kTile) shared_.total[thread_].sum = shared_.totals[0][thread_] + shared_.totals[1][thread_];
    sync_attending();
    this->merge_together(piece.ends ? -kStages : 0);  // nobody needs stages any more: both rounds at once
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      if (blocks_ > 1 && (round == 0 || !piece.ends)) this->open(round, false);
      pass_on(attending, piece, round);
      if (blocks_ == 1 || (round == 0 && piece.ends)) continue;
      this->merge_blocks(piece, round);
      if (round + 1 < kRounds) cluster_arrive();  // what was received has been read
    }
    this->finish(piece);
  }

 private:
  __device__ __forceinline__ void pass_on(const Attending& attending, const Piece& piece, int round) const {
    const int n = attending.row_of(round);
    const bool exists = n - round * kRowsMerged < this->rows_of(round);
    if (blocks_ > 1) {
      const auto row = this->row_there(round, n);
      each_four(attending, round, [&](int latent, const float4& four) {
        if (exists) row.send(latent * 4, four);
      });
      return;
    }
    const Total total = shared_.total[n];
    const bool first = exists && group_ == 0 && lane() % 4 == 0;
    if (piece.pieces == 1) {
      const long long at = this->row_of_o(piece, n);
      T* const row = static_cast<T*>(p_.o) + at * kR;
      const float factor = this->share_of_one(total.sum);
      each_four(attending, round, [&](int latent, const float4& four) {
        if (exists) this->send_four(row + latent, four, factor);
      });
      if (first) this->send_lse(at, total);
    } else {
      float* const row = this->left_row(piece, n);
      each_four(attending, round, [&](int latent, const float4& four) {
        if (exists) *reinterpret_cast<float4*>(row + latent) = four;
      });
      if (first) this->leave_total(piece, n, total);
    }
  }

  // Calls f(latent, four from there on) for all that a thread passes on of its row. Four lanes have 8 latents of it, two
  // each; of 16, a lane and its neighbour make two fours.
  template <class F>
  __device__ __forceinline__ void each_four(const Attending& attending, int round, const F& f) const {
    const bool odd = lane() % 2 != 0;
    const int first = Attending::kHalf * group_ + (odd ? 8 : 0) + lane() % 4 / 2 * 4;
#pragma unroll
    for (int j = 0; j < Attending::kHalf / 8; j += 2) {
      float2 pairs[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        pairs[i] = {attending.o[Attending::at(j + i, round, 0)], attending.o[Attending::at(j + i, round, 1)]};
      }
      const float2 kept = odd ? pairs[1] : pairs[0], passed = odd ? pairs[0] : pairs[1];
      const float2 others{__shfl_xor_sync(kAllLanes, passed.x, 1), __shfl_xor_sync(kAllLanes, passed.y, 1)};
      f(first + 8 * j, odd ? make_float4(others.x, others.y, kept.x, kept.y)
                           : make_float4(kept.x, kept.y, others.x, others.y));
    }
  }

  const int group_;
  Shared<kTile, true>& shared_;
};

}  // namespace hylo::mla_absorb
