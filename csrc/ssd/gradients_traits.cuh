// Tiles, roles and shared memory of ssd_bwd_kernel_gradients.
#pragma once

#include "ssd/traits.cuh"

namespace hylo::ssd {

// A block takes a chunk and a set of heads, one after the other. One of its warpgroups makes dX and what the gates'
// gradients need of pairs of tokens, the other dB and dC: no weights are made twice. Beside them are a warp that loads,
// two that make the gates' factors, and one that sums the gates' gradients up.
constexpr int kGradientWarpgroups = 2;
constexpr int kGradientThreads = 128 * (kGradientWarpgroups + 1);
constexpr int kGradientGates = 2;
constexpr int kMostGradientTiles = 2;  // of V and of K: wider ones leave no registers for sums over heads

// Of a thread; 504 for a thread of each warpgroup.
constexpr int kGradientRegisters = 232, kGradientLoaderRegisters = 40;

constexpr int kMostDepth = 3;
constexpr int kFactorRing = 4;

// Numbers of a head's tokens that the warpgroups leave for the last warp.
enum Sum {
  kBelow,        // what the token reads of the chunk up to itself, by the warp that found it: four rows
  kAbove = 4,    // what the chunk reads of it from itself on, but for its step
  kSkipped,      // x . dO
  kAtEnd,        // x . dS b, decayed to the chunk's end, by tile of V
  kOfState = kAtEnd + kMostGradientTiles,  // what it reads of the state before the chunk, by tile of K
  kSums = kOfState + kMostGradientTiles
};
constexpr int kSumsSize = (kSums * kChunk + 16) * 4;  // behind them parts of the product of the states, by warp

}  // namespace hylo::ssd
