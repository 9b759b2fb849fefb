// Tiles, roles and shared memory of the products of few rows: constexpr functions, for host and kernel alike.
#pragma once

#include "common/portable.h"

namespace hylo::skinny_linear {

constexpr int kTile = 64;                // rows and columns of a tile of weights, and columns of one of x
constexpr int kBytes = 2;                // of a number
constexpr int kTileSize = kTile * kTile * kBytes;
constexpr int kNormSize = kTile * kBytes;
constexpr int kGroups = 2;               // warpgroups, each with its tile of weights
constexpr int kOutputs = kGroups * kTile;  // rows of weights that a block has
constexpr int kMultiplying = 128 * kGroups;
constexpr int kThreads = kMultiplying + 32;  // one more warp loads

constexpr int kMostRows = 64;  // of x
constexpr int kMaxCluster = 8;
constexpr int kLeastTiles = 2;  // of K, of a block

// Two blocks share a multiprocessor: where a launch has fewer, those of the next bring their weights meanwhile. Of the 228 KB,
// of which a block takes one more than it asks for, 4 are left, so that small blocks of other kernels begin early too.
constexpr int kSharedLimit = 111 * 1024;
constexpr int kMostStages = 6;
constexpr int kAlignment = 1024, kSmall = 1408;  // bytes: lost to alignment; what lies beside stages and sums

HYLO_HOST_DEVICE constexpr int stage_size(int B) { return kGroups * kTileSize + B * 128; }

// Rows of x that the blocks of a cluster finish together, shared out in pairs that not all may have.
constexpr int kMostShared = kMostRows + 2 * kMaxCluster;

constexpr int kTaps = 4;  // tokens that outputs' convolution sees

// Sums that one block made come four at a time to the block that finishes them: of two neighbouring rows of x and of outputs
// that are 8 apart, as a thread of the tensor core has them. A pair of rows has so many of these.
constexpr int kQuad = 4, kSlots = kOutputs / 2;
HYLO_HOST_DEVICE constexpr int pairs_of(int rows) { return (rows + 1) / 2; }

// Where such sums lie: behind the stages, or in their place where no other block sends any.
HYLO_HOST_DEVICE constexpr int sums_size(int cluster, int pairs) {
  return cluster * pairs * kSlots * kQuad * static_cast<int>(sizeof(float));
}

HYLO_HOST_DEVICE constexpr int stages_of(int B, int cluster, int share) {
  const int sums = cluster == 1 ? 0 : sums_size(cluster, share);
  const int stages = (kSharedLimit - kAlignment - kSmall - sums) / stage_size(B);
  return stages < kMostStages ? stages : kMostStages;
}
static_assert(stages_of(kMostRows, kMaxCluster, pairs_of(kMostRows) / kMaxCluster) >= 3, "too few to keep memory busy");
static_assert(sums_size(1, pairs_of(kMostRows)) <= 3 * stage_size(kMostRows));

}  // namespace hylo::skinny_linear
