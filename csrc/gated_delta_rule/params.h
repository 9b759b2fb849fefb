// What the host hands to the chunked kernels. Plain data, the same layout on both sides.
#pragma once

#include "common/tensor_map.h"

namespace hylo::gated_delta_rule {

struct Params {
  TensorMap q, k;           // [B, T, G, K], boxes of 64 tokens x 64 columns of one head
  TensorMap v;              // [B, T, H, V], the same; the gradient of o where the pass goes back
  TensorMap out;            // [B, T, H, V], the same: o, or what each token wrote, or the gradient of what solved for it
  TensorMap states;         // [chunks, H, K, V], boxes of a head's K x 64 columns: before each chunk, or their gradients
  const float* g;           // [B, T, H], contiguous
  const float* beta;        // [B, T, H], contiguous
  unsigned char* records;   // [chunks, H] records (traits.cuh), written by _inverse and read by the passes
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
  int segments;             // a sequence may be cut into, at most kMaxSegments
  float scale;
  float negligible;         // log of the decay beyond which what came before no longer counts
};

}  // namespace hylo::gated_delta_rule
