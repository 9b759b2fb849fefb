// Tiles, roles and shared memory of the chunked kernels: constexpr functions of the dims, for host and kernels alike.
#pragma once

#include "common/portable.h"

namespace hylo::gated_delta_rule {

constexpr int kChunk = 64;       // tokens
constexpr int kTile = 64;        // columns of a tile
constexpr int kTileSize = kChunk * kTile * 2;  // bytes; 16-bit types only
constexpr int kMaxSegments = 32;
constexpr int kMaxWarmUp = 8;    // chunks
constexpr int kSharedLimit = 227 * 1024;

// What _inverse leaves for a chunk and head: two tiles as shared memory holds them, rows of 64 fp32, and a bound.
constexpr int kRecordInverse = 0;             // A = (I + L)^-1
constexpr int kRecordScores = kTileSize;      // P = lower(G * q k^T)
constexpr int kRecordFactors = 2 * kTileSize;
enum Factor { kBeta, kFromStart, kToEnd, kDecayHigh, kDecayLow };  // the last two: log2 of the second, as a sum
constexpr int kFactors = 5;
constexpr int kFactorsSize = kFactors * kChunk * 4;
constexpr int kRecordBound = kRecordFactors + kFactorsSize;  // log of the most that the chunk leaves of a state; fp32
constexpr int kRecordSize = kRecordBound + 16;

// --- gated_delta_rule_fwd_kernel_inverse: one chunk and head a block ---

constexpr int kInverseThreads = 128;
constexpr int kLowerStride = kChunk + 4;  // fp32; a multiple of 4, so that a row's numbers come four at a time

// The keys and queries, and later in their place L.
HYLO_HOST_DEVICE constexpr int inverse_inputs(int width) {
  const int tiles = 2 * width / kTile * kTileSize;
  return tiles < kChunk * kLowerStride * 4 ? kChunk * kLowerStride * 4 : tiles;
}

HYLO_HOST_DEVICE constexpr int inverse_shared(int width) { return inverse_inputs(width) + kRecordSize + 1024; }

// --- the passes over the chunks: a block owns 64 columns of the state for each of its chains ---

enum Pass {
  kOutputs,    // gated_delta_rule_fwd_kernel_o
  kStates,     // gated_delta_rule_bwd_kernel_states: the forward's states and what each token wrote, once more
  kGradients,  // gated_delta_rule_bwd_kernel_dstates: from the last chunk back
};

// A stage has keys, queries, a tile of values a chain, A and P, factors; _states needs no queries and no P.
HYLO_HOST_DEVICE constexpr int stage_bytes(Pass pass, int width, int chains) {
  const int operands = pass == kStates ? 1 : 2;
  return (operands * (width / kTile + 1) + chains) * kTileSize + kFactorsSize;
}

// Tiles are swizzled by address bits, so they start at multiples of 1024.
HYLO_HOST_DEVICE constexpr int stage_size(Pass pass, int width, int chains) {
  return (stage_bytes(pass, width, chains) + 1023) / 1024 * 1024;
}

// What a chain hands on: its state in 16 bits, and a tile of results.
HYLO_HOST_DEVICE constexpr int handed_size(int width) { return (width / kTile + 1) * kTileSize; }

// As many as fit, at most three; narrow heads leave room for a second block on the multiprocessor.
HYLO_HOST_DEVICE constexpr int stages(Pass pass, int width, int chains) {
  if (width == 64) return 2;
  const int fit = (kSharedLimit - 2048 - chains * handed_size(width)) / stage_size(pass, width, chains);
  return fit < 3 ? fit : 3;
}

HYLO_HOST_DEVICE constexpr int pass_shared(Pass pass, int width, int chains) {
  return stages(pass, width, chains) * stage_size(pass, width, chains) + chains * handed_size(width) + 1024;
}

// Roles, by warpgroups from the first on: a chain each, then in _o one that makes outputs for each of them; then a warp
// that loads and, in the other passes, one that stores for each chain.
HYLO_HOST_DEVICE constexpr int pass_warpgroups(Pass pass, int chains) { return pass == kOutputs ? 2 * chains : chains; }

// Where registers change hands, which they do by warpgroups, the last warps are a whole one.
HYLO_HOST_DEVICE constexpr bool shares_registers(Pass pass, int chains) { return chains > 1 || pass == kOutputs; }

HYLO_HOST_DEVICE constexpr int pass_threads(Pass pass, int chains) {
  return 128 * pass_warpgroups(pass, chains) + (shares_registers(pass, chains) ? 128 : 64);
}

// On a multiprocessor at once.
HYLO_HOST_DEVICE constexpr int pass_blocks(int width, int chains) { return width == 64 && chains == 1 ? 2 : 1; }

// Of a thread of each role. Together they are at most what the block starts with: 504 (240 where two blocks share) for
// three warpgroups, 480 for five.
HYLO_HOST_DEVICE constexpr int chain_registers(Pass pass, int width, int chains) {
  if (chains == 2) return pass == kOutputs ? 160 : 216;
  return width == 64 ? 136 : 240;
}
HYLO_HOST_DEVICE constexpr int output_registers(int width, int chains) {
  return chains == 2 || width == 64 ? 64 : 112;
}
HYLO_HOST_DEVICE constexpr int loader_registers(int width, int chains) {
  return chains == 2 ? 32 : width == 64 ? 40 : 56;
}

}  // namespace hylo::gated_delta_rule
