// What the host hands to the decode kernel. Plain data, the same layout on both sides.
#pragma once

namespace hylo::gated_delta_rule {

// Element types that are known at run time only.
enum ScalarType : int { kScalarBf16, kScalarFp16, kScalarFp32, kScalarFp64 };

// One number for each sequence and value head. Strides in elements: of the batch, of the heads.
struct StepScalar {
  const void* data;
  long long stride_b, stride_h;
  int type;  // ScalarType
};

struct StepParams {
  const void* q;        // [B, 1, G, K]
  const void* k;        // [B, 1, G, K]
  const void* v;        // [B, 1, H, V]
  void* state;          // [B or P, H, K, V], updated in place
  const void* indices;  // [B] or null
  void* o;              // [B, 1, H, V], contiguous
  StepScalar gate;      // g, or a of raw gates
  StepScalar strength;  // beta, or b of raw gates
  StepScalar a_log;     // of raw gates only, as the next one
  StepScalar dt_bias;
  // Strides in elements: of the batch, of the heads. Widths are contiguous, as are the states of a head.
  long long q_b, q_h, k_b, k_h, v_b, v_h, state_b, state_h;
  long long indices_stride;
  int group;         // H / G
  int values;        // V
  int wide_indices;  // int64, not int32
  int normalise;     // q and k, to length 1
  float scale;
  float most_strength;  // sigmoid(b) times this, of raw gates
};

}  // namespace hylo::gated_delta_rule
