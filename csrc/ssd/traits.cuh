// Tiles, roles and shared memory of the chunked kernels: constexpr functions of the dims, for host and kernels alike.
#pragma once

#include "common/portable.h"
#include "ssd/params.h"

namespace hylo::ssd {

constexpr float kLog2E = 1.4426950408889634f;
constexpr int kTile = 64;                      // columns of a tile
constexpr int kTileSize = kChunk * kTile * 2;  // bytes; 16-bit types only
constexpr int kSharedLimit = 227 * 1024;
constexpr int kCarryThreads = 128, kCarryEach = 4;  // numbers of a state, a thread

// What the gates of a chunk and head come to: rows of 64 fp32, numbers of tokens.
enum Factor {
  kFromStart,  // decay from the chunk's start through the token
  kWritten,    // the step times the decay from after the token through the chunk's end
  kStep,       // dt after softplus and limits
  kSum,        // log2 of the decay from the chunk's start through the token
  kInBlock,    // decay from after the first token of its 16 through the token
  kToBlock1,   // the step times the decay from after the token through the first token of block 1 of 16; 0 for tokens
  kToBlock2,   // of that block and behind it
  kToBlock3,
  kSlope,      // the step's derivative by dt
  kFactors,
  kPassFactors = kSlope,  // the passes need none
  kTime = kStep  // the sum of steps from the chunk's start through the token, where a pass needs no kStep
};
constexpr int kFactorsSize = kFactors * kChunk * 4;
constexpr int kPassFactorsSize = kPassFactors * kChunk * 4;
static_assert(kPassFactorsSize % 1024 == 0, "tiles behind it are swizzled by address bits");
constexpr int kBlock = 16;

// --- the passes over the chunks of a sequence: a block has one or two chains, each with 64 columns of V of a head ---

enum Pass {
  kEnds,     // ssd_fwd_kernel_ends: what each piece of a sequence adds to the state
  kMixedEnds,  // ssd_fwd_kernel_mixed_ends: the same forth, and the convolution that makes x
  kOutputs,  // ssd_fwd_kernel_o
  kStates,   // ssd_bwd_kernel_states: the state before every chunk, and the gradient of the state after it
};

// Wide states leave a second one neither registers nor shared memory.
HYLO_HOST_DEVICE constexpr int chains(int width) { return width > 128 ? 1 : 2; }
HYLO_HOST_DEVICE constexpr bool makes_ends(Pass pass) { return pass == kEnds || pass == kMixedEnds; }
// Warpgroups that make weights, or convolve, a tile each.
HYLO_HOST_DEVICE constexpr int helpers(Pass pass) { return pass == kOutputs ? 1 : pass == kMixedEnds ? 2 : 0; }
HYLO_HOST_DEVICE constexpr int pass_threads(Pass pass, int width) { return 128 * (chains(width) + helpers(pass) + 1); }
constexpr int kGateWarps = 3;
constexpr int kPassRing = 8;         // stages, at most

constexpr int kTaps = 4;
constexpr int kMixWeights = kTile * (kTaps + 1);  // of a tile that is convolved: those of each column, then their biases
constexpr int kHalo = 8;  // tokens before a chunk that come with it to be convolved: a tile's rows repeat after eight
constexpr int kHaloSize = kHalo * kTile * 2;
HYLO_HOST_DEVICE constexpr int halo_size(Pass pass) { return pass == kMixedEnds ? kHaloSize : 0; }

HYLO_HOST_DEVICE constexpr int stage_tiles(Pass pass, int width, const Slots& slots) {
  const int queries = makes_ends(pass) ? 0 : slots.queries, others = pass == kStates ? chains(width) : 0;
  return slots.values + width / kTile * (slots.keys + queries) + others;
}
HYLO_HOST_DEVICE constexpr int stage_tiles_size(Pass pass, int width, const Slots& slots) {
  return stage_tiles(pass, width, slots) * kTileSize + slots.values * halo_size(pass);
}
HYLO_HOST_DEVICE constexpr int stage_size(Pass pass, int width, const Slots& slots) {
  return stage_tiles_size(pass, width, slots) + chains(width) * kPassFactorsSize;
}

// Of a chain: what it leaves for the copy engine or for its own next chunk, the state in 16 bits and outputs; and weights.
HYLO_HOST_DEVICE constexpr int chain_size(Pass pass, int width) {
  if (makes_ends(pass)) return 0;
  return width / kTile * kTileSize + (pass == kOutputs ? 2 * kTileSize : 0);
}

// Of barriers and the like, in bytes, at most.
HYLO_HOST_DEVICE constexpr int pass_static(Pass pass) { return 1024 + (pass == kMixedEnds ? 2 * kMixWeights * 4 : 0); }

HYLO_HOST_DEVICE constexpr int stages(Pass pass, int width, const Slots& slots) {
  const int left = kSharedLimit - 1024 - pass_static(pass) - chains(width) * chain_size(pass, width);
  const int fit = left / stage_size(pass, width, slots);
  return fit < kPassRing ? fit : kPassRing;
}

HYLO_HOST_DEVICE constexpr int pass_shared(Pass pass, int width, const Slots& slots) {
  return stages(pass, width, slots) * stage_size(pass, width, slots) + chains(width) * chain_size(pass, width) + 1024;
}

// Of a thread; and what there is for a thread of each warpgroup together, in eights each.
HYLO_HOST_DEVICE constexpr int chain_registers(Pass pass, int width) {
  if (pass == kMixedEnds) return 136;
  return pass != kOutputs ? 216 : chains(width) == 1 ? 248 : 168;
}
HYLO_HOST_DEVICE constexpr int helper_registers(Pass pass) { return pass == kMixedEnds ? 80 : 112; }
HYLO_HOST_DEVICE constexpr int loader_registers(Pass pass) { return pass == kMixedEnds ? 48 : pass == kOutputs ? 56 : 72; }
HYLO_HOST_DEVICE constexpr int all_registers(Pass pass) { return pass == kMixedEnds ? 480 : 504; }

}  // namespace hylo::ssd
