// How the work is cut, into units: tiles of cached tokens, or numbers of them. All sequences' units stand in a row, and
// every cluster takes an equal run; where a run holds a part of a sequence, that part is a piece. Blocks of a cluster take
// turns at its tiles.
#pragma once

#include "mla_absorb/traits.cuh"

namespace hylo::mla_absorb {

HYLO_HOST_DEVICE constexpr int least_of(long long a, long long b) { return static_cast<int>(a < b ? a : b); }

// What a unit is: a tile; a number of them that depends on the sequence's length alone; all of a sequence.
enum Cut : int { kTiles, kByLength, kWhole };

struct Sequence {
  int first;       // token that tiles are counted from
  int start, end;  // tokens that count
  int tiles;
  int unit, units;  // tiles of a unit. One of no tokens has a unit too, which writes its zeros.
};

HYLO_HOST_DEVICE inline Sequence sequence_of(long long length, long long start, int capacity, Cut cut) {
  Sequence s{};
  s.end = length < 0 ? 0 : least_of(length, capacity);
  s.start = start < 0 ? 0 : least_of(start, s.end);
  s.first = s.start / kTokens * kTokens;
  s.tiles = s.start < s.end ? ceil_div(s.end - s.first, kTokens) : 0;
  s.unit = 1;
  s.units = s.tiles == 0 ? 1 : s.tiles;
  if (cut == kWhole) {
    s.unit = s.units;
    s.units = 1;
  }
  if (cut == kByLength) {
    // Long ones have kFixedUnits: rounding a unit of more than kFixedTiles up takes none of them away.
    static_assert(kFixedTiles >= kFixedUnits, "a unit and one tile more are kFixedUnits to the sequence, too");
    const int by_length = ceil_div(s.tiles, kFixedUnits);
    const bool is_long = by_length > kFixedTiles;
    s.unit = is_long ? by_length : kFixedTiles;
    s.units = s.tiles == 0 ? 1 : is_long ? kFixedUnits : ceil_div(s.tiles, kFixedTiles);
  }
  return s;
}

// Units of all sequences, and the most that one has.
struct Count {
  int total, most;
};

// Units of a cluster's run. Of tiles, `least` at least; and where all sequences are equal, runs end with them, or all
// after the same part of one, if they are not much longer for it.
HYLO_HOST_DEVICE inline int share_of(const Count& units, int batch, int clusters, int least, Cut cut) {
  const int equal = ceil_div(units.total, clusters), share = cut != kTiles || equal > least ? equal : least;
  if (cut != kTiles || static_cast<long long>(units.most) * batch != units.total) return share;
  const int even = share < units.most ? ceil_div(units.most, units.most / share)
                                      : ceil_div(share, units.most) * units.most;
  return even - share <= share / kUneven ? even : share;
}

// A cluster's run, and how far it has come.
struct Run {
  int unit, last;            // the next one, and the end
  int b, first_unit;         // the sequence that has it, and that one's first
  int index, begin, share;   // which run it is, where it began, and units of a run
};

// The run of a cluster, but for the sequence that it begins with.
HYLO_HOST_DEVICE inline Run run_of(int cluster, int share, int total) {
  Run run{};
  const long long begin = static_cast<long long>(cluster) * share;
  run.index = cluster;
  run.begin = run.unit = least_of(begin, total);
  run.last = least_of(begin + share, total);
  run.share = share;
  return run;
}

struct Piece {
  int b;
  int first, start, end;  // of the sequence
  int tile, tiles;        // the first one and how many
  int turn;               // the block of a cluster that takes the first one
  bool ends;              // the run
  int index, pieces;      // of the sequence
  int shares;             // that the first so many of its pieces' blocks merge; 1: the last to arrive merges all
  int first_slot, slots_apart, slot_ahead;

  // Of a piece's partial result, among all: a cluster has two, for a sequence that began before its run, and for one
  // that goes on after it.
  HYLO_HOST_DEVICE int slot(int of) const { return first_slot + (of == 0 ? slot_ahead : of * slots_apart); }
  // One of the sequence's for each share. The first piece's own has its ticket, but of the second one's run, which lies
  // within the sequence, both are the sequence's.
  HYLO_HOST_DEVICE int slot_of_share(int of) const { return of == 0 ? slot(1) + 1 : slot(of); }
};

// Of a sequence of many pieces. All but the last end their runs, so that their blocks may wait for each other. The last
// one's does so where the sequence ends with its run.
HYLO_HOST_DEVICE inline int shares_of(int pieces, bool last_ends) {
  if (pieces <= kFewPieces || pieces > kMostTogether) return 1;
  return last_ends ? pieces : pieces - 1;
}

// The run's next piece, given the sequence that it has come to, of so many. Divides where a sequence is cut only: that is
// slow.
HYLO_HOST_DEVICE inline Piece take(Run& run, const Sequence& s, int batch, int cluster_shift, Cut cut) {
  const int end = run.first_unit + s.units;
  const int next = cut != kTiles ? run.unit + 1 : end < run.last ? end : run.last;
  const int stop = least_of(static_cast<long long>(next - run.first_unit) * s.unit, s.tiles);
  Piece piece{};
  piece.b = run.b;
  piece.first = s.first;
  piece.start = s.start;
  piece.end = s.end;
  piece.tile = (run.unit - run.first_unit) * s.unit;
  piece.tiles = stop > piece.tile ? stop - piece.tile : 0;
  if (cut != kTiles) {
    piece.index = run.unit - run.first_unit;
    piece.pieces = s.units;
    piece.shares = 1;
    piece.first_slot = run.first_unit;
    piece.slots_apart = 1;
  } else {
    int first_run = run.index, last_run = run.index;
    if (run.first_unit < run.begin) first_run = run.first_unit / run.share;
    if (end > run.last) last_run = (end - 1) / run.share;
    piece.turn = (run.unit - run.begin) & ((1 << cluster_shift) - 1);
    piece.index = run.index - first_run;
    piece.pieces = last_run - first_run + 1;
    piece.shares = shares_of(piece.pieces, run.b == batch - 1 || end == (last_run + 1) * run.share);
    piece.first_slot = 2 * first_run;
    piece.slots_apart = 2;
    piece.slot_ahead = 1;
  }
  piece.ends = next == run.last;
  if (next == end) ++run.b, run.first_unit = next;
  run.unit = next;
  return piece;
}

// Tiles of a piece that one block of a cluster takes: `first`, and those a cluster's size further each.
struct Turns {
  int first, count;
};
HYLO_HOST_DEVICE inline Turns turns_of(const Piece& piece, int rank, int cluster_shift) {
  const int size = 1 << cluster_shift, first = (rank - piece.turn) & (size - 1);
  return {piece.tile + first, first < piece.tiles ? (piece.tiles - first + size - 1) >> cluster_shift : 0};
}

// Partial results that a launch may have, for each tile of query rows.
HYLO_HOST_DEVICE inline long long slots_of(int batch, int capacity, int clusters, Cut cut) {
  if (cut == kWhole) return 0;
  if (cut == kTiles) return 2LL * clusters;
  const int most = ceil_div(ceil_div(capacity, kTokens), kFixedTiles);
  return static_cast<long long>(batch) * (most < 1 ? 1 : most < kFixedUnits ? most : kFixedUnits);
}

}  // namespace hylo::mla_absorb
