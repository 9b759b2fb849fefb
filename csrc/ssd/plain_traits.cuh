// Tiles and shared memory of the plain kernels, those on the CUDA cores: for host and kernels alike.
#pragma once

#include "common/portable.h"

namespace hylo::ssd::plain {

constexpr int kThreads = kProductThreads;  // of every block
constexpr int kSlice = 64;                 // columns of V and K that a block has at a time
constexpr int kTileLength = kChunk * kSlice;

// What the gates of a chunk and head come to, in memory: rows of 64 floats, numbers of tokens.
enum Factor {
  kStep,       // dt after softplus and limits
  kSlope,      // its derivative by dt
  kFromStart,  // decay from the chunk's start through the token
  kToEnd,      // decay from after the token through the chunk's end
  kDecayHigh,  // log2 of kFromStart, as a sum
  kDecayLow,
  kFactors
};
constexpr int kFactorsLength = kFactors * kChunk;

// What the gates' gradients are made of: rows of 64 floats, of every chunk and head for each slice of V, behind them
// one row for each slice of K.
enum Sum {
  kPairs,    // what passes a token within the chunk, and from the state before the chunk to the one behind it
  kAtEnd,    // what the state behind the chunk has of the token
  kDirect,   // what is written of it for its step
  kSkipped,  // x . dO
  kSums
};

// What is made of a chunk's tokens, each the product of weights between tokens, and of tokens with a state.
enum Role { kO, kDX, kDB, kDC, kRoles };

HYLO_HOST_DEVICE constexpr int slices(int columns) { return (columns + kSlice - 1) / kSlice; }

// Rows of sums of a chunk and head.
HYLO_HOST_DEVICE constexpr int sum_rows(int values, int width) { return kSums * slices(values) + slices(width); }

HYLO_HOST_DEVICE constexpr int ends_shared() { return 2 * kTileLength * 4; }
HYLO_HOST_DEVICE constexpr int collect_shared(Role role) {
  return ((role == kO ? 4 : 5) * kTileLength + kFactorsLength + kThreads / 32) * 4;
}

constexpr int kGateWarps = kThreads / 32;  // chunks and heads of a block that makes factors or sums up

}  // namespace hylo::ssd::plain
