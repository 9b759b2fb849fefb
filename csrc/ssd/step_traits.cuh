// How decode steps are spread over threads and blocks, for the host and the kernels alike.
#pragma once

#include "common/portable.h"

namespace hylo::ssd {

constexpr int kStepAccess = 16;       // bytes of a row of the state that a thread moves at once
constexpr int kStepMostNumbers = 16;  // of a row that a thread has
constexpr int kWarpLanes = 32;
constexpr int kRowUnit = 16;  // V is a multiple of it

// Lanes that share a row of K numbers, and the accesses of each: pieces. Where they do not come out even, some lanes
// have one less.
struct StepSpread {
  int lanes, pieces;
};

HYLO_HOST_DEVICE constexpr StepSpread step_spread(int width, int state_bytes) {
  const int all = width * state_bytes / kStepAccess;
  StepSpread best = {kWarpLanes, (all + kWarpLanes - 1) / kWarpLanes};
  for (int lanes = kWarpLanes / 2; lanes > 1; lanes /= 2) {
    const int pieces = (all + lanes - 1) / lanes;
    const bool held = pieces * kStepAccess <= kStepMostNumbers * state_bytes;
    if (held && lanes * pieces < best.lanes * best.pieces) best = {lanes, pieces};
  }
  return best;
}

// Rows of a thread, so that this many pieces are in flight at most.
HYLO_HOST_DEVICE constexpr int step_most_rows(int width, int state_bytes, int pieces_in_flight) {
  int rows = 1;
  while (2 * rows * step_spread(width, state_bytes).pieces <= pieces_in_flight) rows *= 2;
  return rows;
}

// --- recurrent_ssd: a block has rows of one head ---

struct StepTeam {
  int threads, rows;  // of a block; of a thread
};

HYLO_HOST_DEVICE constexpr int step_block_rows(int width, int state_bytes, const StepTeam& team) {
  return team.threads / step_spread(width, state_bytes).lanes * team.rows;
}

// Few states are spread over many small blocks, many go through wide ones whose threads have more loads in flight.
constexpr long long kStepFew = 8 << 20;  // bytes of all states
HYLO_HOST_DEVICE constexpr StepTeam step_team(int width, int values, int state_bytes, bool few) {
  if (few) return {64, step_most_rows(width, state_bytes, 4)};
  StepTeam team = {state_bytes == 4 ? 256 : 128, step_most_rows(width, state_bytes, 8)};
  while (team.threads > 64 && step_block_rows(width, state_bytes, team) > values) team.threads /= 2;
  return team;
}

// --- the step of a whole Mamba2 block: a cluster of blocks has all rows of the heads that share channels or a norm ---

constexpr int kMamba2MaxShared = 227 * 1024;  // bytes
constexpr int kMamba2FewSets = 16;            // of all sequences: that many of the widest clusters run at once
constexpr int kMaxCluster = 16, kManyCluster = 8;  // blocks, where there are few sets and where there are many
constexpr int kMamba2LeastRows = 64;               // of a block
constexpr int kMamba2ManyRows = 256;               // of a block that would rather have whole heads
constexpr int kMamba2FewHeld = 160 * 1024, kMamba2ManyHeld = 64 * 1024;  // bytes of the state on the way to a block

// Blocks of a cluster for a set of heads. Whole heads to a block save exchanges, unless this leaves each too many rows.
HYLO_HOST_DEVICE constexpr int mamba2_cluster(int set_heads, int values, bool few) {
  const int most = few ? kMaxCluster : kManyCluster, rows = set_heads * values;
  int whole = 1, any = 1;
  for (int blocks = 2; blocks <= most; ++blocks) {
    if (rows % (kRowUnit * blocks) != 0 || rows / blocks < kMamba2LeastRows) continue;
    any = blocks;
    if (set_heads % blocks == 0) whole = blocks;
  }
  return rows / whole <= kMamba2ManyRows ? whole : any;
}

// A block's threads go over its rows in passes. All passes have their part of the state on the way at once if it is not
// too much, else two.
struct Mamba2Passes {
  StepTeam team;
  int all, held, bytes;  // `bytes` of shared memory for those held
};

HYLO_HOST_DEVICE constexpr Mamba2Passes mamba2_passes(int width, int state_bytes, int block_rows, bool few) {
  const StepSpread spread = step_spread(width, state_bytes);
  const int parts = block_rows * spread.lanes;  // a thread each, if it had one row
  const int threads = parts >= 2048 ? 512 : 256, most = few ? kMamba2FewHeld : kMamba2ManyHeld;
  StepTeam team = {threads, step_most_rows(width, state_bytes, 8)};
  while (team.rows > 1 && team.rows * threads > parts) team.rows /= 2;
  for (;; team.rows /= 2) {
    const int rows = step_block_rows(width, state_bytes, team), all = (block_rows + rows - 1) / rows;
    const int bytes = threads * team.rows * spread.pieces * kStepAccess;
    if (all * bytes <= most) return {team, all, all, all * bytes};
    if (2 * bytes <= most || team.rows == 1) return {team, all, 2, 2 * bytes};
  }
}

// Shared memory of a block, in bytes from its start; fp32 where nothing else is said.
struct Mamba2Shared {
  int state;     // [passes held][pieces][threads] of 16 bytes
  int inbox;     // Inbox, of the next ones
  int sums;      // [norm groups of the set][blocks]: of squares
  int steps;     // [heads] Step
  int channels;  // [channels]: x, b, c after the convolution
  int gate;      // [rows]: silu(z)
  int weight;    // [rows]: of the norm
  int outputs;   // [rows]
  int parts;     // [rows / 16]: sums of squares
  int windows;   // [channels][W] in the conv state's type: its next values, of the channels that this block writes
  int bytes;
};

HYLO_HOST_DEVICE constexpr int in_sixteens(int bytes) { return (bytes + 15) / 16 * 16; }

HYLO_HOST_DEVICE constexpr Mamba2Shared mamba2_shared(int state, int groups, int cluster, int heads, int channels,
                                                      int rows, int window_bytes) {
  Mamba2Shared at{};
  at.inbox = state;
  at.sums = at.inbox + 16;
  at.steps = at.sums + in_sixteens(4 * groups * cluster);
  at.channels = at.steps + in_sixteens(12 * heads);
  at.gate = at.channels + 4 * channels;
  at.weight = at.gate + 4 * rows;
  at.outputs = at.weight + 4 * rows;
  at.parts = at.outputs + 4 * rows;
  at.windows = at.parts + in_sixteens(rows / kRowUnit * 4);
  at.bytes = at.windows + channels * window_bytes;
  return at;
}

}  // namespace hylo::ssd
