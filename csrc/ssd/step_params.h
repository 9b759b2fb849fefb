// What the host hands to the decode kernels. Plain data, the same layout on both sides.
#pragma once

#include "common/divider.h"
#include "common/scalar.h"
#include "ssd/step_traits.cuh"

namespace hylo::ssd {

// What makes the step of a head and token: softplus(dt + dt_bias) within limits, and its decay exp(step a).
struct StepGates {
  Scalar dt;       // [B, 1, H]
  Scalar a;        // [H]
  Scalar dt_bias;  // [H]; data is null where there is none, as of the next one
  Scalar d;        // [H]
  float least, greatest;
  int softplus;
};

struct StepParams {
  const void* x;  // [B, 1, HX, V]
  const void* b;  // [B, 1, GB, K]
  const void* c;  // [B, 1, G, K]
  void* state;    // [B or P, H, V, K], updated in place
  void* o;        // [B, 1, H, V], contiguous
  Integers indices;  // [B]: rows of a pool; null where each sequence has its own state
  StepGates gates;
  // Strides in elements: of the batch, of the heads. Widths are contiguous, as are the states of a head.
  long long x_b, x_h, b_b, b_h, c_b, c_h, state_b, state_h;
  Divider x_group, b_group, c_group;  // heads that share one of x, b, c
  int values;                         // V
};

struct Mamba2StepParams {
  const void* z;            // [B, 1, H, V]
  const void* xbc;          // [B, 1, D]: channels of x, b, c
  const void* conv_weight;  // [D, W]
  const void* conv_bias;    // [D] or null
  const void* norm_weight;  // [NG, H V / NG]
  void* conv_state;         // [B or P, D, W], updated in place
  void* state;              // [B or P, H, V, K], updated in place
  void* y;                  // [B, 1, H, V], contiguous
  Integers indices;  // [B]: rows of a pool; null where each sequence has its own state
  StepGates gates;
  // Strides in elements, as above.
  long long z_b, z_h, xbc_b, conv_b, state_b, state_h;
  int heads, values;              // H, V
  int x_heads, b_heads;           // HX, GB
  int x_group, b_group, c_group;  // heads that share one of x, b, c
  int norm_width;                 // H V / NG
  Divider by_x_group, by_b_group, by_c_group, by_values, by_norm_width, by_rows;
  int set;           // heads of a cluster
  int rows;          // of a block
  int passes, held;  // over the rows of a block; of them at once on the way
  int sums;          // of squares, that each block of a cluster is sent
  Mamba2Shared shared;
  float per_norm_width;  // 1 / norm_width
  float eps;
  int norm_before_gate;
  int settled_state;  // no kernel that may still run writes the state or the indices
};

}  // namespace hylo::ssd
