// Tiles and shared memory of the chunked kernels for fp32: constexpr functions of the dims, for host and kernels alike.
#pragma once

#include "common/portable.h"
#include "gated_delta_rule/traits.cuh"

namespace hylo::gated_delta_rule::fp32_chunk {

constexpr int kThreads = kProductThreads;  // of every block
constexpr int kPair = 2 * kChunk;  // rows of two matrices, one below the other
constexpr int kSlice = 64;     // columns of q and k that are there at a time, and that a block of _fp32_dqk is for
constexpr int kColumns = 32;   // of V: a block's in a pass, and those that _fp32_dqk sums over at a time

// Of a chunk and head, all that needs no state. In floats.
constexpr int kRecordInverse = 0;                     // A = (I + L)^-1
constexpr int kRecordScores = kChunk * kChunk;        // P A, P = lower(D * q k^T)
constexpr int kRecordFactors = 2 * kChunk * kChunk;   // rows of 64
enum Factor { kBeta, kFromStart, kToEnd, kDecayHigh, kDecayLow };  // the last two: log2 of the second, as a sum
constexpr int kFactors = 5;
constexpr int kFactorsLength = kFactors * kChunk;
constexpr int kRecordLength = kRecordFactors + kFactorsLength;

enum Pass {
  kOutputs,    // gated_delta_rule_fwd_kernel_fp32_o
  kStates,     // gated_delta_rule_bwd_kernel_fp32_states
  kGradients,  // gated_delta_rule_bwd_kernel_fp32_dstates
};

// Keys, below them queries; A, below it P A. The states need neither queries nor P.
HYLO_HOST_DEVICE constexpr int token_rows(Pass pass) { return pass == kStates ? kChunk : kPair; }

// What is multiplied with them: X; going back the gradient of o is below it.
HYLO_HOST_DEVICE constexpr int value_rows(Pass pass) { return pass == kGradients ? kPair : kChunk; }

HYLO_HOST_DEVICE constexpr int bytes(int floats) { return floats * 4; }

// A chunk's tokens, values and factors: a stage. The block's state and A, below it P A, are there once.
HYLO_HOST_DEVICE constexpr int stage_length(Pass pass, int width) {
  return token_rows(pass) * width + value_rows(pass) * kColumns + kFactorsLength;
}
HYLO_HOST_DEVICE constexpr int pass_bytes(Pass pass, int width, int stages) {
  return bytes(stages * stage_length(pass, width) + token_rows(pass) * kChunk + width * kColumns);
}
HYLO_HOST_DEVICE constexpr int blocks_of(int shared) { return (kSharedLimit + 1024) / (shared + 1024); }

// The next chunk is loaded while the present one is worked on: into a second stage, unless that takes the place of a
// second block on the multiprocessor, which serves as well.
HYLO_HOST_DEVICE constexpr int pass_stages(Pass pass, int width) {
  const int alone = blocks_of(pass_bytes(pass, width, 1)), buffered = blocks_of(pass_bytes(pass, width, 2));
  return buffered == (alone < 2 ? alone : 2) ? 2 : 1;
}
HYLO_HOST_DEVICE constexpr int pass_shared(Pass pass, int width) {
  return pass_bytes(pass, width, pass_stages(pass, width));
}

// On a multiprocessor at once.
HYLO_HOST_DEVICE constexpr int pass_blocks(Pass pass, int width) {
  return blocks_of(pass_shared(pass, width)) < 2 ? 1 : 2;
}

constexpr int kJoin = 32;  // rows of the blocks on the diagonal that forward substitution inverts

HYLO_HOST_DEVICE constexpr int inverse_shared() {
  return bytes(kPair * kSlice + 2 * kChunk * kChunk + kJoin * kJoin + kFactorsLength);
}

HYLO_HOST_DEVICE constexpr int dscores_shared() { return bytes(kPair * kSlice + 2 * kChunk * kSlice + kFactorsLength); }

constexpr int kDqkTile = (kPair + kChunk + 2 * kSlice) * kColumns;  // dO and dX, Vn, h and dh
static_assert(kDqkTile >= kPair * kChunk, "the gradients of the [64, 64] products take its place");

HYLO_HOST_DEVICE constexpr int dqk_shared() {
  return bytes(kDqkTile + 2 * kPair * kSlice + kFactorsLength + 2 * kChunk + kThreads / 32);
}

}  // namespace hylo::gated_delta_rule::fp32_chunk
