// Tiles, roles and shared memory of the chunked forward: constexpr functions of the dims, for host and kernels alike.
#pragma once

#include "common/portable.h"

namespace hylo::gated_delta_rule {

constexpr int kChunk = 64;       // tokens
constexpr int kTile = 64;        // columns of a tile
constexpr int kTileSize = kChunk * kTile * 2;  // bytes; 16-bit types only
constexpr int kMaxSegments = 32;
constexpr int kMaxWarmUp = 8;    // chunks
constexpr int kSharedLimit = 227 * 1024;

// What _inverse leaves for a chunk and head: two tiles as shared memory holds them, then four rows of 64 fp32.
constexpr int kRecordInverse = 0;             // A = (I + L)^-1
constexpr int kRecordScores = kTileSize;      // P = lower(G * q k^T)
constexpr int kRecordFactors = 2 * kTileSize;
constexpr int kFactors = 4;                   // beta; decay from the start; decay to the end; [0]: log bound on the decay
constexpr int kRecordSize = kRecordFactors + kFactors * kChunk * 4;

// --- gated_delta_rule_fwd_kernel_inverse: one chunk and head a block ---

constexpr int kInverseThreads = 128;
constexpr int kLowerStride = kChunk + 4;  // fp32; a multiple of 4, so that a row's numbers come four at a time

// The keys and queries, and later in their place L.
HYLO_HOST_DEVICE constexpr int inverse_inputs(int width) {
  const int tiles = 2 * width / kTile * kTileSize;
  return tiles < kChunk * kLowerStride * 4 ? kChunk * kLowerStride * 4 : tiles;
}

HYLO_HOST_DEVICE constexpr int inverse_shared(int width) { return inverse_inputs(width) + kRecordSize + 1024; }

// --- gated_delta_rule_fwd_kernel_o: a block owns 64 columns of the state for each of its warpgroups ---

HYLO_HOST_DEVICE constexpr int stage_size(int width, int warpgroups) {
  return (2 * width / kTile + warpgroups) * kTileSize + kRecordSize;
}

// As many as fit, at most three; narrow heads leave room for a second block on the multiprocessor.
HYLO_HOST_DEVICE constexpr int stages(int width, int warpgroups) {
  if (width == 64) return 2;
  const int fit = (kSharedLimit - 2048 - warpgroups * kTileSize) / stage_size(width, warpgroups);
  return fit < 3 ? fit : 3;
}

HYLO_HOST_DEVICE constexpr int output_shared(int width, int warpgroups) {
  return stages(width, warpgroups) * stage_size(width, warpgroups) + warpgroups * kTileSize + 2048;
}

// One warp loads, one for each warpgroup stores. Beside two warpgroups they are a whole one, because registers change
// hands by warpgroups.
HYLO_HOST_DEVICE constexpr int output_threads(int warpgroups) { return warpgroups == 1 ? 192 : 128 * (warpgroups + 1); }

constexpr int kColumnsRegisters = 232;
constexpr int kLoaderRegisters = 40;

}  // namespace hylo::gated_delta_rule
