// What the host hands to gated_delta_rule_bwd_kernel_gradients. Plain data, the same layout on both sides.
#pragma once

#include "gated_delta_rule/params.h"

namespace hylo::gated_delta_rule {

struct GradientsParams {
  Params common;      // of it q, k, v, records, cu_seqlens, the sizes and the scale
  TensorMap h, dh;    // [chunks, H, K, V], boxes of a block's rows x 64 columns: the state before each chunk, and the
                      // gradient of that after it
  TensorMap v_new;    // [B, T, H, V], boxes of 64 tokens x 64 columns: what each token wrote
  TensorMap dx, d_o;  // the same: the gradient of what a token's write was solved from, and of o
  void* dq;           // [B, T, G, K], contiguous as all that follow
  void* dk;           // [B, T, G, K]
  void* dv;           // [B, T, H, V]
  float* dg;          // [parts, B, T, H]: their sums are the gradients
  float* dbeta;       // [parts, B, T, H]
  long long gates;    // B T H
};

}  // namespace hylo::gated_delta_rule
