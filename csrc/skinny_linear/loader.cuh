// The warp that brings weights and x into shared memory.
#pragma once

#include "common/chunks.cuh"
#include "common/cluster.cuh"
#include "common/copy_engine.cuh"
#include "common/dependent.cuh"
#include "skinny_linear/params.h"
#include "skinny_linear/traits.cuh"

namespace hylo::skinny_linear {

struct Shared {
  Handover stages[kMostStages];
  Inbox sums;  // of the cluster's blocks
  alignas(16) unsigned char norms[kMostStages][kNormSize];  // the norm's weights of a stage's columns
  float squares[kMostShared];                               // of rows of x, from the cluster's blocks
};
static_assert(sizeof(Shared) <= kSmall, "more than is kept free");

// What a block has: a block of the cluster along x, outputs along y.
struct Part {
  int rank, tile, first, count;  // the latter two: tiles of K

  __device__ __forceinline__ explicit Part(const Params& p)
      : rank(static_cast<int>(blockIdx.x)),
        tile(static_cast<int>(blockIdx.y)),
        first(rank * p.tiles + (rank < p.more ? rank : p.more)),
        count(p.tiles + (rank < p.more ? 1 : 0)) {}

  // Pairs of rows of y that it finishes.
  __device__ __forceinline__ int pairs(const Params& p) const {
    const int left = pairs_of(p.batch) - rank * p.share;
    return left < 0 ? 0 : left < p.share ? left : p.share;
  }
};

// A stage, and the phase that it is in when it is filled or emptied next.
struct Turn {
  int at = 0, phase = 0;

  __device__ __forceinline__ void next(int stages) {
    if (++at < stages) return;
    at = 0;
    phase ^= 1;
  }
};

// Of one lane.
template <int kB>
class Loader {
 public:
  __device__ __forceinline__ Loader(const Params& p, const Part& part, unsigned char* stages, Shared& shared)
      : p_(p), part_(part), stages_(stages), shared_(shared) {}

  // While the kernel ahead still runs.
  __device__ __forceinline__ void prime() const {
    prefetch_map(p_.x);
    const int most = p_.stages + p_.ahead;
#pragma unroll 1
    for (int i = 0; i < part_.count && i < most; ++i) p_.constant && i < p_.stages ? begin(i, i) : prefetch(i);
  }

  // Once it has ended.
  __device__ __forceinline__ void run() const {
    Turn turn;
#pragma unroll 1
    for (int i = 0; i < part_.count; ++i, turn.next(p_.stages)) {
      if (i >= p_.stages) shared_.stages[turn.at].empty.wait(turn.phase ^ 1);
      if (i >= p_.stages || !p_.constant) begin(i, turn.at);
      copy_box(stages_ + turn.at * stage_size(kB) + kGroups * kTileSize, p_.x, shared_.stages[turn.at].full,
               column(i), 0, 0, 0);
    }
  }

 private:
  __device__ __forceinline__ int column(int i) const { return (part_.first + i) * kTile; }

  // Calls f(group, row, half) for the tiles of weights.
  template <class F>
  __device__ __forceinline__ void each_tile(const F& f) const {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      p_.swiglu ? f(group, part_.tile * kTile, group) : f(group, (part_.tile * kGroups + group) * kTile, 0);
    }
  }

  __device__ __forceinline__ void prefetch(int i) const {
    each_tile([&](int, int row, int half) { prefetch_box(p_.weights, column(i), row, half, 0); });
  }

  // Announces all that comes into a stage, x included, and asks for the weights. The next kernel may begin once nearly
  // all of these are asked for: from then on it keeps memory busy.
  __device__ __forceinline__ void begin(int i, int at) const {
    Barrier& full = shared_.stages[at].full;
    full.arrive_expecting(stage_size(kB) + (p_.norm == nullptr ? 0 : kNormSize));
    if (p_.norm != nullptr) {
      const auto* weights = static_cast<const unsigned char*>(p_.norm) + static_cast<long long>(column(i)) * kBytes;
      copy_in(shared_.norms[at], weights, kNormSize, full);
    }
    each_tile([&](int group, int row, int half) {
      copy_box(stages_ + at * stage_size(kB) + group * kTileSize, p_.weights, full, column(i), row, half, 0);
    });
    if (part_.count - 1 - i <= p_.rest) start_next_kernel();
  }

  const Params& p_;
  const Part part_;
  unsigned char* const stages_;
  Shared& shared_;
};

}  // namespace hylo::skinny_linear
