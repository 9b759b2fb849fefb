// Tiles, roles and shared memory of the chunked kernels: constexpr functions of the dims, for host and kernels alike.
#pragma once

#include "common/portable.h"

namespace hylo::gated_delta_rule {

constexpr int kChunk = 64;       // tokens
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
enum Factor { kBeta, kFromStart, kToEnd, kDecayHigh, kDecayLow };  // the last two: log2 of the second, as a sum
constexpr int kFactors = 5;
constexpr int kFactorsRow = kChunk * 4;
constexpr int kFactorsSize = kFactors * kFactorsRow;
constexpr int kRecordSize = kRecordFactors + kFactorsSize;

// Who make a record out of a matrix of fp32.
constexpr int kSolverThreads = 128;
constexpr int kLowerStride = kChunk + 4;  // fp32; a multiple of 4, so that a row's numbers come four at a time

constexpr int kSlotSize = (kRecordSize + 1023) / 1024 * 1024;
constexpr int kLowerSize = (kChunk * kLowerStride * 4 + 1023) / 1024 * 1024;

// --- gated_delta_rule_fwd_kernel_inverse: keys, queries, and in the record's place the matrix it is made of ---

HYLO_HOST_DEVICE constexpr int inverse_inputs(int width) { return 2 * width / kTile * kTileSize; }
HYLO_HOST_DEVICE constexpr int inverse_shared(int width) { return inverse_inputs(width) + kSlotSize + 1024; }

// On a multiprocessor at once.
HYLO_HOST_DEVICE constexpr int inverse_blocks(int width) { return kSharedLimit / (inverse_shared(width) + 3072); }

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

// As many as fit, at most three; where nothing is solved, narrow heads leave room for a second block on the multiprocessor.
HYLO_HOST_DEVICE constexpr int stages(Pass pass, int width, int chains) {
  if (width == 64 && !solves(pass)) return 2;
  const int others = chains * handed_size(width) + solvers_size(pass);
  const int fit = (kSharedLimit - 3072 - others) / stage_size(pass, width, chains);
  return fit < 3 ? fit : 3;
}

HYLO_HOST_DEVICE constexpr int pass_shared(Pass pass, int width, int chains) {
  return stages(pass, width, chains) * stage_size(pass, width, chains) + chains * handed_size(width) +
         solvers_size(pass) + 1024;
}

// Roles, by warpgroups from the first on: a chain each, then in _o one that makes outputs for each of them, then solvers;
// then a warp that loads and, in the other passes, one that stores for each chain.
HYLO_HOST_DEVICE constexpr int chain_warpgroups(Pass pass, int chains) {
  return makes_outputs(pass) ? 2 * chains : chains;
}
HYLO_HOST_DEVICE constexpr int pass_warpgroups(Pass pass, int chains) {
  return chain_warpgroups(pass, chains) + (solves(pass) ? kSolvers : 0);
}

// Where registers change hands, which they do by warpgroups, the last warps are a whole one.
HYLO_HOST_DEVICE constexpr bool shares_registers(Pass pass, int chains) { return pass_warpgroups(pass, chains) > 1; }

HYLO_HOST_DEVICE constexpr int pass_threads(Pass pass, int chains) {
  return 128 * pass_warpgroups(pass, chains) + (shares_registers(pass, chains) ? 128 : 64);
}

// On a multiprocessor at once.
HYLO_HOST_DEVICE constexpr int pass_blocks(Pass pass, int width, int chains) {
  return width == 64 && chains == 1 && !solves(pass) ? 2 : 1;
}

// Of a thread of each role. Together they are at most what the block starts with: 504 (240 where two blocks share) for
// three warpgroups, 512 for four, 480 for five.
HYLO_HOST_DEVICE constexpr int chain_registers(Pass pass, int width, int chains) {
  if (solves(pass)) return makes_outputs(pass) ? 168 : 232;
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
