// The warps that bring the cache and the queries into shared memory.
#pragma once

#include "common/async_copy.cuh"
#include "common/wgmma.cuh"
#include "mla_absorb/block.cuh"

namespace hylo::mla_absorb {

// A warp that has the copy engine bring tiles of the cache. A tile comes in boxes, one for each 64 columns and each run
// of rows that no page ends in; those without a token that counts stay away, and nobody asks for their page. Of rows in fp8
// a box has all columns, and comes to where it is converted from.
template <int kR, int kE, int kN, bool kScaled, bool kFp8>
class CacheLoader {
 public:
  static constexpr Dims kDims{kR, kE, kN, kScaled, kFp8};
  static constexpr Room kRoom = room(kDims);

  // places: what copies fill, stages or places for rows in fp8.
  __device__ __forceinline__ CacheLoader(const Params& p, unsigned char* places, SharedByAll& shared)
      : p_(p),
        places_(places),
        shared_(shared),
        parts_shift_(6 - p.box_shift),
        tables_(32 >> parts_shift_),
        policy_(cache_policy(by_rows(kDims) || gridDim.y == 1)) {}

  // What `piece` begins with, into the second cache while the kernel before still runs. It may be what that kernel is
  // writing, the table too: then other rows are fetched, or these again.
  __device__ __forceinline__ void look_ahead(const Piece& piece) const {
    const Turns turns = turns_here(p_, piece);
    const int page = look_up<kSoFar>(piece, turns, 0), tile = lane() >> parts_shift_;
    const int token = token_of(p_, piece, turns, tile) + (part() << p_.box_shift);
    if (tile >= least_of(turns.count, kTilesAhead) || !counts(piece, token)) return;
#pragma unroll 1
    for (int i = 0; i < (kFp8 ? 1 : key_tiles(kDims)); ++i) prefetch_box(p_.cache, i * kTile, row_of(token), page, 0);
  }

  // The pages that `run` begins with.
  __device__ __forceinline__ void look_up_first(const Piece& piece) {
    first_pages_ = look_up<kFinal>(piece, turns_here(p_, piece), 0);
  }

  __device__ __forceinline__ void run(const First& first) {
    each_piece_either<kFp8>(p_, first, shared_, [&](const Piece& kept, int index) {
      const Piece piece = kept;
      const Turns turns = turns_here(p_, piece);
      int pages = index == 0 ? first_pages_ : look_up<kFinal>(piece, turns, 0);
      int next_pages = look_up<kFinal>(piece, turns, tables_);
#pragma unroll 1
      for (int i = 0, at = 0; i < turns.count; ++i, ++at) {
        if (at == tables_) {
          at = 0;
          pages = next_pages;
          next_pages = look_up<kFinal>(piece, turns, i + tables_);
        }
        const int token = token_of(p_, piece, turns, i);
        if constexpr (kFp8) {
          load_raw(piece, token, pages, at << parts_shift_);
        } else {
          load(piece, token, pages, at << parts_shift_);
        }
      }
      pass_meetings<merging_rounds(kDims), by_rows(kDims)>(piece);
    });
  }

 private:
  // A page for each lane: of the parts of as many tiles as a warp has lanes for, from the i-th on.
  template <Moment kAt>
  __device__ __forceinline__ int look_up(const Piece& piece, const Turns& turns, int i) const {
    if (p_.table.data == nullptr) return piece.b;
    if (i >= turns.count) return 0;
    const int tile = i + (lane() >> parts_shift_), token = token_of(p_, piece, turns, tile) + (part() << p_.box_shift);
    if (tile >= turns.count || !counts(piece, token)) return 0;
    const Integers row{table_row(piece.b), 1, p_.table.wide};
    return static_cast<int>(integer<kAt>(row, token / p_.by_page));
  }
  // Of a tile, that is the lane's.
  __device__ __forceinline__ int part() const { return lane() & ((1 << parts_shift_) - 1); }
  __device__ __forceinline__ const void* table_row(int b) const {
    const long long at = p_.table.stride * b;
    if (p_.table.wide) return static_cast<const long long*>(p_.table.data) + at;
    return static_cast<const int*>(p_.table.data) + at;
  }

  // Of a token, in its page.
  __device__ __forceinline__ int row_of(int token) const {
    return p_.table.data == nullptr ? token : token - token / p_.by_page * p_.page;
  }

  // Whether any token of the box at `token` does.
  __device__ __forceinline__ bool counts(const Piece& piece, int token) const {
    return token < piece.end && token + (1 << p_.box_shift) > piece.start;
  }

  __device__ __forceinline__ void load(const Piece& piece, int token, int pages, int first_lane) {
    const int at = loaded_ % kRoom.stages, turn = loaded_ / kRoom.stages;
    ++loaded_;
    const int mine = token + (part() << p_.box_shift), in_tile = 1 << parts_shift_;
    const bool brings = lane() < in_tile && counts(piece, mine);
    const bool whole = token >= piece.start && token + kTokens <= piece.end;
    const int boxes = whole ? in_tile : __popc(__ballot_sync(kAllLanes, brings));
    // 32 is a multiple of the parts: a lane has one of them all the time.
    const int page = __shfl_sync(kAllLanes, pages, first_lane + part());
    unsigned char* const to = places_ + at * stage_size(kDims) + (part() * 128 << p_.box_shift);
    const int row = row_of(mine);
#pragma unroll
    for (int i = 0; i < parts_of(kDims); ++i) {
      Handover& filled = shared_.stages[at * parts_of(kDims) + i];
      if (tiles_of_part(kDims, i) == 0) continue;
      if (turn > 0) filled.empty.wait((turn - 1) & 1);
      if (lane() == 0) filled.full.arrive_expecting(boxes * tiles_of_part(kDims, i) * (128 << p_.box_shift));
      __syncwarp();
      if (!brings) continue;
#pragma unroll
      for (int j = 0; j < tiles_of_part(kDims, i); ++j) {
        const int tile = first_of_part(kDims, i) + j;
        copy_box(to + tile * kTileSize, p_.cache, filled.full, tile * kTile, row, page, 0, policy_);
      }
    }
  }

  // Rows in fp8, so many at a time as one place has.
  __device__ __forceinline__ void load_raw(const Piece& piece, int token, int pages, int first_lane) {
    const int mine = token + (part() << p_.box_shift), first_row = part() << p_.box_shift;
    const bool brings = lane() >> parts_shift_ == 0 && counts(piece, mine);
    const int page = __shfl_sync(kAllLanes, pages, first_lane + part()), row = row_of(mine);
#pragma unroll 1
    for (int first = 0; first < kTokens; first += kRoom.raw_rows, ++loaded_) {
      const int at = loaded_ % kRoom.raw, turn = loaded_ / kRoom.raw;
      Handover& filled = shared_.stages[raw_barrier(kDims, at)];
      const bool comes = brings && first_row >= first && first_row < first + kRoom.raw_rows;
      const int boxes = __popc(__ballot_sync(kAllLanes, comes));
      if (turn > 0) filled.empty.wait((turn - 1) & 1);
      __syncwarp();  // a part without rows is full as soon as that is said, and empty again before a lane behind has looked
      if (lane() == 0) filled.full.arrive_expecting(boxes * (raw_row_size(kDims) << p_.box_shift));
      __syncwarp();
      if (!comes) continue;
      unsigned char* const to = places_ + at * raw_size(kDims) + (first_row - first) * raw_row_size(kDims);
      copy_box(to, p_.cache, filled.full, 0, row, page, 0, policy_);
    }
  }

  const Params& p_;
  unsigned char* const places_;
  SharedByAll& shared_;
  const int parts_shift_;  // log2 of the parts of a tile
  const int tables_;       // tiles whose pages are looked up at once
  // Blocks of other tiles of query rows read the same; by rows that has happened by the time that it would be dropped.
  const DoubleWord policy_;
  unsigned loaded_ = 0;    // tiles, or parts of them in fp8
  int first_pages_ = 0;
};

// Brings query rows of a sequence: latent | rope, in tiles of 64 columns; zeros past the last row.
template <int kR, int kE, int kN, bool kScaled, bool kFp8>
class QueryLoader {
 public:
  static constexpr Dims kDims{kR, kE, kN, kScaled, kFp8};
  static constexpr int kPieces = (kR + kE) / 8;  // of 16 bytes, in a row

  __device__ __forceinline__ explicit QueryLoader(const Params& p) : p_(p) {}

  // By tokens, some warps together, for all pieces; `thread` is the number among them.
  __device__ __forceinline__ void run(const First& first, int thread, int buffers, unsigned char* tiles,
                                      SharedByAll& shared) const {
    each_piece_either<kFp8>(p_, first, shared, [&](const Piece& piece, int i) {
      const int at = i % buffers, turn = i / buffers;
      Handover& queries = shared.queries[at];
      if (turn > 0) queries.empty.wait((turn - 1) & 1);
      unsigned char* const to = tiles + at * queries_size(kDims);
      for (int j = thread; j < kN * kPieces; j += 32 * kQueryWarps) copy(piece.b, j / kPieces, j % kPieces, to);
      await_copies();
      fence_async();
      queries.full.arrive();
      pass_meetings<merging_rounds(kDims), false>(piece);
    });
  }

  // By rows, all attending threads together, for one piece: four a row.
  __device__ __forceinline__ void load(const Piece& piece, unsigned char* to) const {
    const int n = static_cast<int>(threadIdx.x) / 4;
#pragma unroll 6
    for (int i = threadIdx.x % 4; i < kPieces; i += 4) copy(piece.b, n, i, to);
    await_copies();
    fence_async();
  }

 private:
  // 16 bytes of a query row.
  __device__ __forceinline__ void copy(int b, int n, int piece, unsigned char* to) const {
    const int row = static_cast<int>(blockIdx.y) * kN + n;
    const bool exists = row < p_.tokens * p_.heads;
    const int token = exists ? row / p_.by_heads : 0, head = exists ? row - token * p_.heads : 0;
    const bool of_rope = piece >= kR / 8;
    const Queries& from = of_rope ? p_.rope : p_.latent;
    const long long at = from.stride_b * b + from.stride_t * token + from.stride_h * head;
    const int column = 8 * (of_rope ? piece - kR / 8 : piece);
    copy_async(to + piece / 8 * (kN * 128) + wgmma::swizzled(place_of(n), piece % 8),
               static_cast<const unsigned short*>(from.data) + at + column, exists);
  }

  // The row of the tile that a query row takes. By rows, those of either half are what a thread's two rows have.
  static __device__ __forceinline__ int place_of(int n) {
    return by_rows(kDims) ? n % 32 / 8 * 16 + n / 32 * 8 + n % 8 : n;
  }

  const Params& p_;
};

}  // namespace hylo::mla_absorb
