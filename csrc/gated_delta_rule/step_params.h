// What the host hands to the decode kernel. Plain data, the same layout on both sides.
#pragma once

#include "common/scalar.h"

namespace hylo::gated_delta_rule {

struct StepParams {
  const void* q;        // [B, 1, G, K]
  const void* k;        // [B, 1, G, K]
  const void* v;        // [B, 1, H, V]
  void* state;          // [B or P, H, K, V], updated in place
  const void* indices;  // [B] or null
  void* o;              // [B, 1, H, V], contiguous
  Scalar gate;          // g, or a of raw gates
  Scalar strength;      // beta, or b of raw gates
  Scalar a_log;         // of raw gates only, as the next one
  Scalar dt_bias;
  // Strides in elements: of the batch, of the heads. Widths are contiguous, as are the states of a head.
  long long q_b, q_h, k_b, k_h, v_b, v_h, state_b, state_h;
  long long indices_stride;
  int group;          // H / G
  int values;         // V
  int wide_indices;   // int64, not int32
  int normalise;      // q and k, to length 1
  int settled_state;  // no kernel that may still run writes the state or the indices
  float scale;
  float most_strength;  // sigmoid(b) times this, of raw gates
};

}  // namespace hylo::gated_delta_rule
