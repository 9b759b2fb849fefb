// Tiles, roles and shared memory of ssd_bwd_kernel_gradients.
#pragma once

#include "ssd/traits.cuh"

namespace hylo::ssd {

// A block takes a set of heads of a chunk, one after the other, then those of another chunk. A warpgroup each makes dX, dB
// and dC; that of dB makes R for both. The fourth's warps load, make the gates' factors (two of them) and sum the gates'
// gradients up.
enum GradientRole { kMakesDX, kMakesDB, kMakesDC, kGradientWarpgroups };
constexpr int kGradientThreads = 128 * (kGradientWarpgroups + 1);
constexpr int kGradientGates = 2;
constexpr int kMostGradientTiles = 2;  // of V and of K: wider ones leave no registers for sums over heads

// Of a thread; 512 for a thread of each warpgroup.
constexpr int kDXRegisters = 152, kDKeyRegisters = 160, kGradientLoaderRegisters = 40;

constexpr int kHeadRing = 4;   // heads that warps are apart, at most
constexpr int kMostDepth = 3;  // of tiles, below that

// Numbers of a head's tokens that the warpgroups leave for the last warp.
enum Sum {
  kBelow,        // what the token reads of the chunk up to itself, by the warp that found it: four rows
  kAbove = 4,    // what the chunk reads of it from itself on, but for its step
  kSkipped,      // x . dO
  kAtEnd,        // x . dS b, decayed to the chunk's end, by tile of K
  kOfState = kAtEnd + kMostGradientTiles,  // what it reads of the state before the chunk, by tile of K
  kSums = kOfState + kMostGradientTiles
};
constexpr int kStateParts = 4;  // behind them: of the product of S and dS, by warp
constexpr int kSumsSize = (kSums * kChunk + kStateParts) * 4;

constexpr int kVectorWarps = 32;  // of ssd_bwd_kernel_vectors

}  // namespace hylo::ssd
