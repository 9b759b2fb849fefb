// Tiles, roles and shared memory of ssd_bwd_kernel_gradients.
#pragma once

#include "ssd/traits.cuh"

namespace hylo::ssd {

// A block takes a chunk and a set of heads, one after the other. Each of its warpgroups has some columns of dX, and some
// of dB and dC. Beside them are a warp that loads, two that make the gates' factors, and one that sums the gates'
// gradients up.
constexpr int kGradientWarpgroups = 2;
constexpr int kGradientThreads = 128 * (kGradientWarpgroups + 1);
constexpr int kGradientGates = 2;
constexpr int kMostGradientWidth = 128;  // of V and of K: wider ones leave no registers for sums over heads

// Of a thread; 504 for a thread of each warpgroup.
constexpr int kGradientRegisters = 232, kGradientLoaderRegisters = 40;

constexpr int kMostDepth = 3;
constexpr int kFactorRing = 4;

// Numbers of a head's tokens that the warpgroups leave for the last warp.
enum Sum {
  kBelow,        // what the token reads of earlier ones of the chunk, by the warp that found it: four rows
  kAbove = 4,    // what later ones read of it, but for its step
  kOwn,          // what it reads of itself, but for its step
  kSkipped,      // x . dO
  kAtEnd,        // x . dS b, decayed to the chunk's end, by warpgroup
  kOfState = kAtEnd + kGradientWarpgroups,  // what it reads of the state before the chunk, by warpgroup
  kSums = kOfState + kGradientWarpgroups
};
constexpr int kSumsSize = (kSums * kChunk + 16) * 4;  // behind them parts of the product of the states, by warp

}  // namespace hylo::ssd
