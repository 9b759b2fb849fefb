// What the host hands to the plain kernels. Plain data, the same layout on both sides; null is what a kernel does not
// use.
#pragma once

#include "ssd/params.h"

namespace hylo::ssd::plain {

// Rows of a dim that is contiguous, of the type that the kernels are compiled for, and what the dims B, T and heads are
// apart, in elements.
struct Rows {
  const void* data;
  long long strides[3];
};

struct Params {
  Rows x;                   // [B, T, HX, V]
  Rows b;                   // [B, T, GB, K]
  Rows c;                   // [B, T, G, K]
  Rows d_o;                 // [B, T, H, V]
  TokenScalar dt;
  Scalar a, d, dt_bias;     // of the heads alone; without memory: none
  float* factors;           // [chunks, H, kFactors, 64]
  float* states[2];         // by Direction, [chunks, H, V, K]: what each chunk adds; then the state before it and the
                            // gradient of the one behind it
  const float* given[2];    // [N, H, V, K] or null: the initial state and the gradient of the final one
  float* left[2];           // [N, H, V, K] or null: the final state and the gradient of the initial one
  void* results[4];         // by Role: [B, T, H, V] and what x, b and c are, contiguous
  float* sums;              // [chunks, H, rows, 64]
  void* ddt;                // [B, T, H], contiguous, of dt's type
  float* parts;             // [kHeadParts, chunks, H]
  const int* cu_seqlens;    // [N + 1] or null
  int sequences;            // N
  int tokens;               // T
  int heads;                // H
  int x_group, b_group, c_group;  // heads that share one of x, b, c
  int values;               // V
  int width;                // K
  int chunks;               // of all sequences; with cu_seqlens an upper bound
  int softplus;
  float least, greatest;    // step
};

}  // namespace hylo::ssd::plain
