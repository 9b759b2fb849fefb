// What the host hands to the kernels of the chunked forward. Plain data, the same layout on both sides.
#pragma once

#include "common/tensor_map.h"

namespace hylo::gated_delta_rule {

struct Params {
  TensorMap q, k;           // [B, T, G, K], boxes of 64 tokens x 64 columns of one head
  TensorMap v;              // [B, T, H, V], the same
  const float* g;           // [B, T, H], contiguous
  const float* beta;        // [B, T, H], contiguous
  unsigned char* records;   // [chunks, H] records (traits.cuh), written by _inverse and read by _o
  const float* initial_state;  // [N, H, K, V] or null
  float* final_state;       // [N, H, K, V]
  void* o;                  // [B, T, H, V], contiguous
  const int* cu_seqlens;    // [N + 1] or null
  int sequences;            // N
  int tokens;               // T
  int heads;                // H
  int group;                // H / G
  int values;               // V
  int chunks;               // of all sequences; with cu_seqlens an upper bound
  int segments;             // a sequence may be cut into, at most kMaxSegments
  float scale;
  float negligible;         // log of the decay beyond which what came before no longer counts
};

}  // namespace hylo::gated_delta_rule
