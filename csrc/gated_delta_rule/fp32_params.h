// What the host hands to the chunked kernels for fp32. Plain data, the same layout on both sides; null is what a kernel
// does not use.
#pragma once

#include "gated_delta_rule/params.h"

namespace hylo::gated_delta_rule::fp32_chunk {

// Rows of a dim that is contiguous, and what the dims B, T and heads are apart, in elements.
struct Rows {
  const float* at;
  long long strides[3];
};

struct Params {
  gated_delta_rule::Params common;  // of it g, beta, first_state, last_state, cu_seqlens, the sizes and the scale
  Rows q, k;                        // [B, T, G, K]
  Rows v;                           // [B, T, H, V]
  const float* d_o;                 // [B, T, H, V], contiguous as all that follow
  float* o;                         // [B, T, H, V]
  float* records;                   // [chunks, H] of kRecordLength
  float* states;                    // [chunks, H, K, V]: before each chunk
  float* dstates;                   // [chunks, H, K, V]: the gradient of the state after each chunk
  float* written;                   // [B, T, H, V]: what each token wrote
  float* dx;                        // [B, T, H, V]: the gradient of what a token's write was solved from
  float* d_scores;                  // [chunks, H, 64, 64]: the gradient of q k^T
  float* d_solve;                   // [chunks, H, 64, 64]: that of k k^T, and its transpose added
  float* dq;                        // [B, T, G, K]
  float* dk;                        // [B, T, G, K]
  float* dv;                        // [B, T, H, V]
  float* dg;                        // [1 + slices of K, B, T, H]: their sums are the gradients
  float* dbeta;                     // [1 + slices of K, B, T, H]
  long long gates;                  // B T H
};

}  // namespace hylo::gated_delta_rule::fp32_chunk
