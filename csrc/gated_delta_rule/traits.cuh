// Tiles, roles and shared memory of the chunked kernels: constexpr functions of the dims, for host and kernels alike.
#pragma once

#include "common/portable.h"

namespace hylo::gated_delta_rule {

constexpr int kTile = 64;        // columns of a tile
constexpr int kTileSize = kChunk * kTile * 2;  // bytes; 16-bit types only
constexpr int kMaxSegments = 32;
constexpr int kMaxWarmUp = 8;    // chunks
constexpr int kCutsThreads = 256;
constexpr int kSharedLimit = 227 * 1024;

// All of a chunk and head that needs no state: two tiles as shared memory holds them, and rows of 64 fp32.
constexpr int kRecordInverse = 0;             // A = (I + L)^-1
constexpr int kRecordScores = kTileSize;      // P = lower(G * q k^T)
constexpr int kRecordFactors = 2 * kTileSize;
// beta is the product of the next two (solver.cuh); the last two sum up to log2 of kFromStart.
enum Factor { kBeta, kHanded, kLeft, kFromStart, kToEnd, kRemoval, kDecayHigh, kDecayLow };
constexpr int kFactors = 8;
constexpr int kFactorsRow = kChunk * 4;
constexpr int kFactorsSize = kFactors * kFactorsRow;
constexpr int kRecordSize = kRecordFactors + kFactorsSize;

// Who make a record out of a matrix of fp32.
constexpr int kSolverThreads = 128;
constexpr int kLowerStride = kChunk + 4;  // fp32; a multiple of 4, so that a row's numbers come four at a time

constexpr int kSlotSize = (kRecordSize + 1023) / 1024 * 1024;
constexpr int kLowerSize = (kChunk * kLowerStride * 4 + 1023) / 1024 * 1024;

// --- who makes records for others: a warpgroup with keys, queries, a record or the matrix it is made of, and gates ---

HYLO_HOST_DEVICE constexpr int maker_inputs(int width) { return 2 * width / kTile * kTileSize; }
HYLO_HOST_DEVICE constexpr int maker_shared(int width) { return maker_inputs(width) + kSlotSize + 2048; }
constexpr int kMakerRegisters = 104;

// gated_delta_rule_fwd_kernel_inverse: one is a block, so many are on a multiprocessor at once.
HYLO_HOST_DEVICE constexpr int inverse_shared(int width) { return maker_shared(width) + 1024; }
HYLO_HOST_DEVICE constexpr int inverse_blocks(int width) { return kSharedLimit / (inverse_shared(width) + 1024); }

// --- the passes over the chunks: a block owns 64 columns of the state for each of its chains ---

enum Pass {
  kOutputs,         // gated_delta_rule_fwd_kernel_o
  kSolvingOutputs,  // the same, and makes the records itself by warps that work ahead; leaves none
  kStates,          // gated_delta_rule_bwd_kernel_states: the forward's states and what each token wrote, once more
  kSolvingStates,   // the same, and makes the records itself; leaves them
  kGradients,       // gated_delta_rule_bwd_kernel_dstates: from the last chunk back
};
HYLO_HOST_DEVICE constexpr bool makes_outputs(Pass pass) { return pass == kOutputs || pass == kSolvingOutputs; }
HYLO_HOST_DEVICE constexpr bool solves(Pass pass) { return pass == kSolvingOutputs || pass == kSolvingStates; }
constexpr int kSolvers = 2;

// Wide heads leave solvers no shared memory, and two chains a block no registers.
HYLO_HOST_DEVICE constexpr bool can_solve(int width) { return width <= 128; }

// A stage has keys, a tile of values a chain, queries, and what is read of a record where the pass does not solve.
HYLO_HOST_DEVICE constexpr bool reads_queries(Pass pass) { return pass != kStates; }

HYLO_HOST_DEVICE constexpr int stage_tiles(Pass pass, int width, int chains) {
  const int operands = reads_queries(pass) ? 2 : 1;
  return operands * (width / kTile) + chains + (solves(pass) ? 0 : operands);
}

// Tiles are swizzled by address bits, so stages start at multiples of 1024. Behind the tiles are factors, twice.
HYLO_HOST_DEVICE constexpr int stage_size(Pass pass, int width, int chains) {
  const int factors = solves(pass) ? 0 : kFactorsSize + kFactorsRow;
  return (stage_tiles(pass, width, chains) * kTileSize + factors + 1023) / 1024 * 1024;
}

// Each solver's record, and the matrix it works on.
HYLO_HOST_DEVICE constexpr int solvers_size(Pass pass) {
  return solves(pass) ? kSolvers * (kSlotSize + kLowerSize) : 0;
}

// What a chain hands on: its state in 16 bits, and a tile of results.
HYLO_HOST_DEVICE constexpr int handed_size(int width) { return (width / kTile + 1) * kTileSize; }

constexpr int kOfRing = 4608;  // bytes, at most: barriers, and gates of solvers

// As many as fit, at most three; where nothing is solved, narrow heads leave room for a second block on the
// multiprocessor.
HYLO_HOST_DEVICE constexpr int stages(Pass pass, int width, int chains) {
  if (width == 64 && !solves(pass)) return 2;
  const int others = chains * handed_size(width) + solvers_size(pass);
  const int fit = (kSharedLimit - kOfRing - others) / stage_size(pass, width, chains);
  return fit < 3 ? fit : 3;
}

// Where a pass reads records, some of its launch's blocks may make them, by so many warpgroups.
constexpr int kMakers = 2;
HYLO_HOST_DEVICE constexpr bool has_makers(Pass pass) { return pass == kOutputs || pass == kStates; }

HYLO_HOST_DEVICE constexpr int pass_shared(Pass pass, int width, int chains) {
  const int walking =
      stages(pass, width, chains) * stage_size(pass, width, chains) + chains * handed_size(width) + solvers_size(pass);
  const int making = has_makers(pass) ? kMakers * maker_shared(width) : 0;
  return (walking > making ? walking : making) + 1024;
}

// Roles, by warpgroups from the first on: a chain each, then in _o one that makes outputs for each of them, then
// solvers; then a warp that loads and, in the other passes, one that stores for each chain.
HYLO_HOST_DEVICE constexpr int chain_warpgroups(Pass pass, int chains) {
  return makes_outputs(pass) ? 2 * chains : chains;
}
HYLO_HOST_DEVICE constexpr int pass_warpgroups(Pass pass, int chains) {
  return chain_warpgroups(pass, chains) + (solves(pass) ? kSolvers : 0);
}

// Where registers change hands, which they do by warpgroups, the last warps are a whole one, and where they make
// records.
HYLO_HOST_DEVICE constexpr bool last_is_whole(Pass pass, int chains) {
  return pass_warpgroups(pass, chains) > 1 || has_makers(pass);
}

HYLO_HOST_DEVICE constexpr int pass_threads(Pass pass, int chains) {
  return 128 * pass_warpgroups(pass, chains) + (last_is_whole(pass, chains) ? 128 : 64);
}

// On a multiprocessor at once.
HYLO_HOST_DEVICE constexpr int pass_blocks(Pass pass, int width, int chains) {
  return width == 64 && chains == 1 && !solves(pass) ? 2 : 1;
}

// They come first in the grid, in so many of its layers, in which each head has a block for 64 columns of V.
HYLO_HOST_DEVICE constexpr int maker_layers(int makers, int columns) { return (makers + columns - 1) / columns; }

// Of a thread, before they change hands.
HYLO_HOST_DEVICE constexpr int launch_registers(Pass pass, int width, int chains) {
  return 65536 / (pass_threads(pass, chains) * pass_blocks(pass, width, chains)) / 8 * 8;
}

// Where there are fewer than a chain needs.
HYLO_HOST_DEVICE constexpr bool shares_registers(Pass pass, int width, int chains) {
  return pass_warpgroups(pass, chains) > 1 || (pass == kStates && width == 64);
}

// Of a thread of each role. Together they are at most what the block starts with: 504 (240 where two blocks share) for
// three warpgroups, 512 for four, 480 for five; 256 for two where two blocks share.
HYLO_HOST_DEVICE constexpr int chain_registers(Pass pass, int width, int chains) {
  if (solves(pass)) return makes_outputs(pass) ? 168 : 232;
  if (pass == kStates) return 184;
  if (chains == 2) return 216;
  return width == 64 ? 136 : 240;
}
HYLO_HOST_DEVICE constexpr int output_registers(Pass pass, int width) {
  return solves(pass) ? 88 : width == 64 ? 64 : 112;
}
HYLO_HOST_DEVICE constexpr int solver_registers(Pass pass) { return makes_outputs(pass) ? 96 : 120; }
HYLO_HOST_DEVICE constexpr int loader_registers(Pass pass, int width, int chains) {
  if (solves(pass)) return makes_outputs(pass) ? 32 : 40;
  return width == 64 && chains == 1 ? 40 : 56;
}

}  // namespace hylo::gated_delta_rule
