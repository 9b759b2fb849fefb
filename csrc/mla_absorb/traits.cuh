// Tiles, roles and shared memory of the decode kernel: constexpr functions of the dims, for host and kernel alike.
#pragma once

#include "common/portable.h"

namespace hylo::mla_absorb {

constexpr int kTokens = 64;               // cached tokens of a tile
constexpr int kTile = 64;                 // columns that lie side by side
constexpr int kTileSize = kTokens * 128;  // bytes of 64 tokens x 64 columns; 16-bit types only
constexpr int kGroups = 2;                // warpgroups that attend, each to tiles of its own
constexpr int kAttending = 128 * kGroups;
constexpr int kQueryWarps = 3;                // that load queries; one more loads the cache
constexpr int kConverting = 128;              // that convert rows in fp8, where there are any
HYLO_HOST_DEVICE constexpr int threads_of(bool fp8) { return kAttending + 128 + (fp8 ? kConverting : 0); }

// Registers of a thread: at most 504 for one of each of three warpgroups, 512 for one of each of four.
constexpr int kConvertingRegisters = 56;
HYLO_HOST_DEVICE constexpr int loading_registers(bool fp8) { return fp8 ? 40 : 56; }
HYLO_HOST_DEVICE constexpr int attending_registers(bool fp8) { return fp8 ? 208 : 224; }
static_assert(kGroups * attending_registers(true) + loading_registers(true) + kConvertingRegisters <= 512);

constexpr int kMaxBatch = 8192;
constexpr int kMaxScales = 16;  // of a token
constexpr int kMaxStages = 16;
constexpr int kMostRowStages = 4;  // by rows
constexpr int kMaxCluster = 16;

// Of rows in fp8: latents that share a scale, and the unit that each part of a row fills.
constexpr int kScaleGroup = 128, kFp8Unit = 16;

constexpr int kSharedLimit = 227 * 1024;
constexpr int kWantedStages = 4;
// Of rows in fp8 that wait to be converted: bytes that keep memory busy, and the most copies under way.
constexpr int kWantedRaw = 40 * 1024, kMostRaw = 8;

// Of what comes before the kernel ahead has ended: the most sequences, and tiles of a block.
constexpr int kForeseen = 128, kTilesAhead = 4;

// Fixed split: a sequence is cut into so many pieces at most, and none is shorter but the last.
constexpr int kFixedTiles = 32, kFixedUnits = 32;

// Runs may be longer by one part of so many, that they end with their sequences.
constexpr int kUneven = 16;

// A sequence of no more pieces is merged by the last block to arrive alone, one of more (not more than a count has room
// for) by many blocks together, that wait so many cycles for each other at the most.
constexpr int kFewPieces = 3, kMostTogether = 1023;
constexpr unsigned kPatience = 1 << 17;

struct Dims {
  int R, E;
  int N;        // query rows of a tile, a multiple of 8
  bool scaled;  // whether key scales follow in the rows of the cache
  bool fp8 = false;  // whether these rows are in fp8; queries never are
};

HYLO_HOST_DEVICE constexpr int tiles_of(int columns) { return (columns + kTile - 1) / kTile; }
HYLO_HOST_DEVICE constexpr int query_tiles(Dims d) { return tiles_of(d.R + d.E); }
HYLO_HOST_DEVICE constexpr int key_tiles(Dims d) { return tiles_of(d.R + d.E + (d.scaled ? kMaxScales : 0)); }

// Which of the two the 64 are that a tensor core takes at once: cached tokens, so that few query rows cost little, or
// query rows, where accumulators of so many would take too many registers the other way round.
HYLO_HOST_DEVICE constexpr bool by_rows(Dims d) { return !d.fp8 && d.N == kTile && (d.R == 256 || d.R == 512); }

// What a stage is filled and emptied by: all its tiles; by rows what is behind the latents, and either half of these.
constexpr int kMostParts = 3;
HYLO_HOST_DEVICE constexpr int parts_of(Dims d) { return by_rows(d) ? kMostParts : 1; }
HYLO_HOST_DEVICE constexpr int first_of_part(Dims d, int part) {
  return !by_rows(d) || part == 1 ? 0 : part == 2 ? d.R / kTile / 2 : d.R / kTile;
}
HYLO_HOST_DEVICE constexpr int tiles_of_part(Dims d, int part) {
  return !by_rows(d) ? key_tiles(d) : part == 0 ? key_tiles(d) - d.R / kTile : d.R / kTile / 2;
}

// By rows, weights take the place of what keys have behind their latents, and a tile more where that is nothing.
HYLO_HOST_DEVICE constexpr int stage_tiles(Dims d) {
  return by_rows(d) && key_tiles(d) == tiles_of(d.R) ? key_tiles(d) + 1 : key_tiles(d);
}
HYLO_HOST_DEVICE constexpr int stage_size(Dims d) { return stage_tiles(d) * kTileSize; }

// A row in fp8: latents | an fp32 scale for each kScaleGroup of them | what follows, in 16 bits; each begins at whole units.
HYLO_HOST_DEVICE constexpr int in_units(int bytes) { return ceil_div(bytes, kFp8Unit) * kFp8Unit; }
HYLO_HOST_DEVICE constexpr int fp8_scales_at(int R) { return in_units(R); }
HYLO_HOST_DEVICE constexpr int fp8_rest_at(int R) { return in_units(R) + in_units(4 * ceil_div(R, kScaleGroup)); }
HYLO_HOST_DEVICE constexpr int fp8_row_size(int R, int others) { return fp8_rest_at(R) + in_units(2 * others); }
HYLO_HOST_DEVICE constexpr int raw_row_size(Dims d) { return fp8_row_size(d.R, d.E + (d.scaled ? kMaxScales : 0)); }
HYLO_HOST_DEVICE constexpr int queries_size(Dims d) { return query_tiles(d) * d.N * 128; }
HYLO_HOST_DEVICE constexpr int weights_size(Dims d) { return d.N * 128; }

// Of shared memory, what is no tile and no result.
HYLO_HOST_DEVICE constexpr int small_size(Dims d) { return by_rows(d) ? 10240 : (d.fp8 ? 3072 : 3456) + 208 * d.N; }

// Of what a cluster's blocks send to one: parts of query rows, all of which come to so many rows.
HYLO_HOST_DEVICE constexpr int received_size(Dims d, int rows) { return rows * d.R * 4; }

// Of a block's own results, so many query rows of them. They take the place of weights, and more.
HYLO_HOST_DEVICE constexpr int results_size(Dims d, int rows) {
  const int weights = kGroups * weights_size(d), results = rows * tiles_of(d.R) * kTile * 4;
  return results > weights ? results : weights;
}

// How shared memory is dealt out.
struct Room {
  int stages;   // tiles of the cache, an even number: each warpgroup has its own
  int queries;  // sequences whose query rows are there
  int merged;   // query rows that are merged at once
  // Of rows in fp8: places for what comes of the cache before it is converted, and rows of each, a part of a tile.
  int raw = 0, raw_rows = 0;
};

HYLO_HOST_DEVICE constexpr int others_size(Dims d, Room r) {
  return r.queries * queries_size(d) + results_size(d, r.merged) + received_size(d, r.merged);
}

HYLO_HOST_DEVICE constexpr Room room_with(Dims d, int queries, int merged) {
  const int left = kSharedLimit - small_size(d) - 1024 - others_size(d, {0, queries, merged});
  const int fit = left < 0 ? 0 : left / stage_size(d) / kGroups * kGroups;
  return {fit < kMaxStages ? fit : kMaxStages, queries, merged};
}

// The same with so many stages of rows in fp8, and as many rows on their way to be converted as there is room for.
HYLO_HOST_DEVICE constexpr Room raw_room_with(Dims d, Room as, int stages, int raw_rows) {
  const int left = kSharedLimit - small_size(d) - 1024 - others_size(d, as) - stages * stage_size(d);
  const int fit = left < 0 ? 0 : left / (raw_rows * raw_row_size(d));
  return {stages, as.queries, as.merged, fit < kMostRaw ? fit : kMostRaw, raw_rows};
}

// By rows a cluster's blocks send half of their rows at a time, and what they send takes the place of queries.
constexpr int kRowsMerged = kTile / 2;
HYLO_HOST_DEVICE constexpr int neighbours_size(Dims d) { return kMaxCluster * d.N * 8; }
HYLO_HOST_DEVICE constexpr int queries_room(Dims d) {
  const int received = received_size(d, kRowsMerged) + neighbours_size(d), queries = queries_size(d);
  return queries > received ? queries : received;
}
HYLO_HOST_DEVICE constexpr Room room_by_rows(Dims d) {
  const int fit = (kSharedLimit - small_size(d) - 1024 - queries_room(d)) / stage_size(d) / 2 * 2;
  return {fit < kMostRowStages ? fit : kMostRowStages, 1, kRowsMerged};
}

// Rows in fp8 want memory busy first, then more stages than each warpgroup's one. Where neither can be had, parts of tiles of
// which most is on its way while one of them is converted.
template <int kRooms>
HYLO_HOST_DEVICE constexpr Room room_of_fp8(Dims d, const Room (&all)[kRooms]) {
  for (int stages = kWantedStages; stages >= kGroups; stages -= kGroups) {
    for (const Room& as : all) {
      const Room r = raw_room_with(d, as, stages, kTokens / 2);
      if (r.raw == kMostRaw || r.raw * r.raw_rows * raw_row_size(d) >= kWantedRaw) return r;
    }
  }
  Room best{0, 1, 8, 0, 8};
  for (int raw_rows = kTokens / 2; raw_rows >= 8; raw_rows /= 2) {
    for (const Room& as : all) {
      const Room r = raw_room_with(d, as, kGroups, raw_rows);
      if (r.raw >= 2 && (r.raw - 1) * r.raw_rows > (best.raw - 1) * best.raw_rows) best = r;
    }
  }
  return best;
}

// As much as leaves enough stages, else as leaves any.
HYLO_HOST_DEVICE constexpr Room room(Dims d) {
  if (by_rows(d)) return room_by_rows(d);
  const int half = d.N % 16 == 0 ? d.N / 2 : 8;
  const Room all[] = {room_with(d, 2, d.N), room_with(d, 2, half), room_with(d, 1, d.N), room_with(d, 1, half),
                      room_with(d, 1, 8)};
  if (d.fp8) return room_of_fp8(d, all);
  for (int i = 0; i < 5; ++i) {
    if (all[i].stages >= kWantedStages) return all[i];
  }
  for (int i = 0; i < 5; ++i) {
    if (all[i].stages > 0) return all[i];
  }
  return all[4];
}

// What copies fill, each with one wait: stages, or parts of a tile of rows in fp8. The latter have barriers behind those of
// the former.
HYLO_HOST_DEVICE constexpr int raw_size(Dims d) { return room(d).raw_rows * raw_row_size(d); }
HYLO_HOST_DEVICE constexpr int raw_tiles_size(Dims d) { return d.fp8 ? room(d).raw * raw_size(d) : 0; }
HYLO_HOST_DEVICE constexpr int raw_barrier(Dims d, int i) { return room(d).stages + i; }
static_assert(kWantedStages + kMostRaw <= kMaxStages, "a barrier for each");

HYLO_HOST_DEVICE constexpr int tiles_size(Dims d) {
  const Room r = room(d);
  if (by_rows(d)) return r.stages * stage_size(d) + queries_room(d);
  return r.stages * stage_size(d) + others_size(d, r) + raw_tiles_size(d);
}
HYLO_HOST_DEVICE constexpr int shared_size(Dims d) { return tiles_size(d) + small_size(d) + 1024; }

// How often a block merges for each piece of work.
HYLO_HOST_DEVICE constexpr int merging_rounds(Dims d) { return d.N / room(d).merged; }

// Numbers of a partial result: its rows, and the maximum and the sum of each, once more for every block of a cluster,
// since each of them merges a part of its own.
HYLO_HOST_DEVICE constexpr int partial_size(Dims d, int cluster) { return d.N * d.R + cluster * 2 * d.N; }

// The most query rows of a tile by tokens: accumulators take R / 64 N / 2 registers of a thread.
HYLO_HOST_DEVICE constexpr int most_rows(int R) { return R <= 128 ? 64 : R <= 256 ? 48 : R <= 512 ? 32 : 24; }

}  // namespace hylo::mla_absorb
