// What the host hands to the chunked kernels. Plain data, the same layout on both sides.
#pragma once

#include "common/scalar.h"
#include "common/tensor_map.h"

namespace hylo::ssd {

// The two ways through a sequence: its states, or from the end back the gradients of them.
enum Direction { kForth, kBack };

// Tiles of a stage: those of the values and of the keys (x and b, or the gradient of o and c where a pass goes back), and
// of what reads the state where outputs are wanted or in the backward: c, or back b. Chains that read the same tile share
// it.
struct Slots {
  int values, keys, queries;  // 1: one for all chains, 2: one for each
};

// The heads that a launch takes; in the backward not all, so that their states need not all be there at once.
struct Window {
  int first, count;
};

struct Params {
  TensorMap x;              // [B, T, HX, V], boxes of 64 tokens x 64 columns of one head
  TensorMap b;              // [B, T, GB, K], the same
  TensorMap c;              // [B, T, G, K], the same
  TensorMap d_o;            // [B, T, H, V], the same: the gradient of o
  TensorMap o;              // [B, T, H, V], the same
  TensorMap states[2];      // [chunks, heads of the window, V, K], boxes of 64 rows of V x 64 columns: the state before
                            // each chunk, and the gradient of the state after it
  TokenScalar dt;
  Scalar a, d, dt_bias;     // of the heads alone; without memory: none
  void* o_at;               // of `o`, contiguous
  float* ends[2];           // of a direction [N, pieces, H, V, K]: of each piece alone, then what it begins with
  float* totals[2];         // of a direction [N, pieces, H]: a piece's whole decay
  const float* first_state;  // [N, H, V, K] or null: the initial state
  const float* last_gradient;  // [N, H, V, K] or null: the gradient of the final state
  float* last_state;        // [N, H, V, K] or null: the final state
  float* owed;              // [directions, N, segments, tiles of V, kOwedParts, H]: parts of the gradient of a
  float* first_gradient;    // [N, H, V, K] or null: the gradient of the initial state
  const int* cu_seqlens;    // [N + 1] or null
  int sequences;            // N
  int tokens;               // T
  int heads;                // H
  int x_group, b_group, c_group;  // heads that share one of x, b, c
  int values;               // V
  int width;                // K
  int chunks;               // of all sequences; with cu_seqlens an upper bound
  int pieces;               // that a sequence is cut into
  int merged;               // of them one after the other that are a block's segment
  Direction first_direction;  // of a launch's blocks
  int made;                 // whether kernels of the same call make x, b and c
  Window window;
  int softplus;
  float least, greatest;    // step
};

// The convolution ahead of the scan: of x, where a pass makes it, or of b and c.
struct Mixing {
  TensorMap raw;        // its inputs, x's [B, T, HX, V] or those of b and c as one head; boxes of 72 tokens x 64 columns of
                        // a head: 8 tokens and the chunk behind them
  Scalar weight, bias;  // [D, taps], contiguous, and [D] or without memory: of x's channels, then of b's and c's
  int taps;             // at most kTaps
};

// Of the kernel that convolves b and c.
struct MixParams {
  Mixing mixing;
  TensorMap mixed;     // [B, T, 1, D - first], boxes of 64 tokens x 64 columns
  const char* inputs;  // [B, T, D], 16 bits each, channels side by side
  long long stride_b, stride_t;  // of them, in bytes
  void* last_inputs;   // [B, D, taps]
  int tokens, channels, first;  // T, D, and x's channels
};

// Of a pass.
struct PassParams {
  Params common;
  Slots slots;
  Mixing mixing;
};

// Where tiles are in shared memory: so many slots of so many bytes. `group` heads have one tile in common, and `turns` of
// them take it one after the other.
struct TileSlots {
  int offset, depth, size, group, turns;
};
enum TileKind { kTilesX, kTilesB, kTilesC, kTilesDO, kTilesStates, kTilesDStates, kTileKinds };

// Of the kernel that makes the gradients of what tokens have, and its parts of the heads' own.
struct GradientsParams {
  Params common;
  TensorMap tiles[kTileKinds];  // of x, b, c, d_o; then `states`
  TensorMap maps[3];          // of dx, db, dc: boxes as of x, b, c
  void* gradients[3];         // the same tensors, of the shapes and the type of x, b and c
  int strides[3];             // of them, in elements, from a token to the next one; heads lie side by side
  void* ddt;                  // [B, T, H], contiguous, of dt's type
  float* parts;               // [kHeadParts, chunks, H]
  float* sums_so_far;         // [2, chunks, K / 64, 16, 128, 2]: accumulators of db and dc, where a window has only some of
                              // the heads that share b or c
  int earlier, later;         // kinds of tiles, a bit each, whose gradients other windows add to, before and after this
  int set, sets;              // heads of a block: all of the window that share one of x, b, c; and how many sets
  TileSlots slots[kTileKinds];
  int staging, pairs, factors, sums;  // where in shared memory
};

// What a head has one number of, and its gradient parts by chunk.
enum HeadPart { kPartOfD, kPartOfBias, kPartOfRate, kHeadParts };
constexpr int kOwedParts = 4;  // of the gradient of a, of each walk: by warp

// What a head's numbers are summed into: of any floating type, contiguous; null: not wanted.
struct HeadSums {
  void* data;
  int type;  // ScalarType
};

// Of the kernel that sums up the parts.
struct VectorsParams {
  const float* parts;         // [kHeadParts, chunks, H], then of a `more` rows of [H]
  HeadSums sums[kHeadParts];  // [H], of d, dt_bias and a
  int chunks, more, heads;
};

}  // namespace hylo::ssd
