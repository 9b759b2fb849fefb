// The query rows that one head of the up-projections serves, in tiles of eight: sequences, and in each the heads that
// share it.
#pragma once

#include "common/divider.cuh"
#include "mla_step/params.h"
#include "mla_step/traits.cuh"

namespace hylo::mla_step {

struct Row {
  bool exists;
  int b, head;  // sequence; head of the queries
};

// What a warp of a launch has.
class Task {
 public:
  __device__ __forceinline__ Task(const Share& share, int warp)
      : share_(share),
        unit_(warp / share.by_runs),
        head_(unit_ / share.by_parts),
        first_((warp - unit_ * share.runs) * share.tiles) {}

  __device__ __forceinline__ int head() const { return head_; }  // of the weights
  __device__ __forceinline__ int part() const { return unit_ - head_ * share_.parts; }
  __device__ __forceinline__ int first() const { return first_; }  // of its tiles
  __device__ __forceinline__ int last() const { return min(first_ + share_.tiles, ceil_div(share_.rows, kTileRows)); }

  __device__ __forceinline__ Row row(int tile, int i) const {
    const int at = tile * kTileRows + i;
    const bool exists = at < share_.rows;
    const int b = (exists ? at : 0) / share_.by_group;
    return {exists, b, head_ * share_.group + (exists ? at : 0) - b * share_.group};
  }

 private:
  const Share& share_;
  const int unit_, head_, first_;
};

}  // namespace hylo::mla_step
