// Tiles, roles and shared memory of the products of few rows: constexpr functions, for host and kernel alike.
#pragma once

#include "common/portable.h"

namespace hylo::skinny_linear {

constexpr int kTile = 64;                // rows and columns of a tile of weights, and columns of one of x
constexpr int kTileSize = kTile * 128;   // bytes
constexpr int kGroups = 2;               // warpgroups, each with its tile of weights
constexpr int kOutputs = kGroups * kTile;  // rows of weights that a block has
constexpr int kMultiplying = 128 * kGroups;
constexpr int kThreads = kMultiplying + 32;  // one more warp loads

constexpr int kMostRows = 64;  // of x
constexpr int kMaxCluster = 8;
constexpr int kLeastTiles = 2;  // of K, of a block

// So that blocks of the next launch are resident beside this one's: they bring their weights while these still run.
constexpr int kSharedLimit = 113 * 1024;
constexpr int kMostStages = 6;
constexpr int kAlignment = 1024, kSmall = 512;  // bytes: lost to alignment; barriers

HYLO_HOST_DEVICE constexpr int stage_size(int B) { return kGroups * kTileSize + B * 128; }

// Sums of a row of x that one block made, as they come to the block that finishes them. Four more numbers lie between rows,
// so that a warp's sums of four rows fall into different banks.
constexpr int kRowStride = kOutputs + 4;

// Where such sums lie: behind the stages, or in their place where no other block sends any.
HYLO_HOST_DEVICE constexpr int sums_size(int cluster, int share) {
  return cluster == 1 ? 0 : cluster * share * kRowStride * static_cast<int>(sizeof(float));
}

HYLO_HOST_DEVICE constexpr int stages_of(int B, int cluster, int share) {
  const int stages = (kSharedLimit - kAlignment - kSmall - sums_size(cluster, share)) / stage_size(B);
  return stages < kMostStages ? stages : kMostStages;
}
static_assert(stages_of(kMostRows, kMaxCluster, kMostRows / kMaxCluster) >= 3, "too few to keep memory busy");
static_assert(kMostRows * kRowStride * static_cast<int>(sizeof(float)) <= 3 * stage_size(kMostRows));

}  // namespace hylo::skinny_linear
