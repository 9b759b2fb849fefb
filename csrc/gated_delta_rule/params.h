// What the host hands to the chunked kernels. Plain data, the same layout on both sides.
#pragma once

#include "common/tensor_map.h"

namespace hylo::gated_delta_rule {

// Which heads of which sequences a launch takes, by whether _cuts found that they can be cut.
enum Takes { kAll, kCuttable, kUncuttable };

struct Params {
  TensorMap q, k;           // [B, T, G, K], boxes of 64 tokens x 64 columns of one head
  TensorMap v;              // [B, T, H, V], the same; the gradient of o where the pass goes back
  TensorMap out;            // [B, T, H, V], the same: o, what each token wrote, or the gradient of what it solved for
  TensorMap states;         // [chunks, H, K, V], boxes of a head's K x 64 columns: before each chunk, or the gradients
  const float* g;           // [B, T, H], contiguous
  const float* beta;        // [B, T, H], contiguous
  unsigned char* records;   // [chunks, H] records (traits.cuh), or null where a pass makes its own and leaves none
  int* ready;               // [chunks, H], or null: not 0 where a record is there, of sequences that this launch does
                            // not cut; those of all others were there before it
  int* cuts;                // [N, H, segments, 2] written by _cuts: how far from where a segment begins a pass starts,
                            // in chunks, going on and going back; -1 where not even the most is enough
  const void* keys_at;      // k once more, for those who read it row by row,
  long long key_strides[3];  // and what its dims B, T, G are apart, in elements
  const float* first_state;  // [N, H, K, V] or null: where a pass begins, the initial state or the final one's gradient
  float* last_state;        // [N, H, K, V] or null: where it ends
  void* o;                  // of `out`, contiguous
  const int* cu_seqlens;    // [N + 1] or null
  int sequences;            // N
  int tokens;               // T
  int heads;                // H
  int group;                // H / G
  int keys;                 // K
  int values;               // V
  int chunks;               // of all sequences; with cu_seqlens an upper bound
  int segments;             // a sequence may be cut into, at most kMaxSegments
  int pieces;               // and is cut into by this launch: as many, or one
  int makers;               // blocks of each head that make the records, before all others in the grid
  Takes takes;
  float scale;
  float negligible;         // log of the decay beyond which what came before no longer counts
};

}  // namespace hylo::gated_delta_rule
