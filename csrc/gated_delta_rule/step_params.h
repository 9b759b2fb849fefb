// What the host hands to the decode kernel. Plain data, the same layout on both sides.
#pragma once

namespace hylo::gated_delta_rule {

struct StepParams {
  const void* q;     // [B, 1, G, K]
  const void* k;     // [B, 1, G, K]
  const void* v;     // [B, 1, H, V]
  const void* g;     // [B, 1, H]
  const void* beta;  // [B, 1, H]
  void* state;       // [B or P, H, K, V], updated in place
  const void* indices;  // [B] or null
  void* o;           // [B, 1, H, V], contiguous
  // Strides in elements: of the batch, of the heads. Widths are contiguous, as are the states of a head.
  long long q_b, q_h, k_b, k_h, v_b, v_h, g_b, g_h, beta_b, beta_h, state_b, state_h;
  int group;         // H / G
  int values;        // V
  int wide_indices;  // int64, not int32
  float scale;
};

}  // namespace hylo::gated_delta_rule
