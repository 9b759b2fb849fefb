// What the host hands to the kernel. Plain data, the same layout on both sides.
#pragma once

#include "common/divider.h"
#include "common/tensor_map.h"

namespace hylo::skinny_linear {

struct Params {
  TensorMap weights;  // K, rows of a half, halves: gate and up, or all in one
  TensorMap x;        // K, B
  void* y;            // [B, N], contiguous; what it holds is added to where it is the residual
  const void* norm;  // [K], or null: of x's RMS norm, and what is added to its mean square
  float eps, per_width;
  // Of the first outputs' convolution over the last kTaps tokens: weights [channels, kTaps], and these inputs [B, channels,
  // kTaps], oldest first, conv_b numbers from sequence to sequence.
  const void* conv_weight;
  void* conv_state;
  long long conv_b;
  int channels;
  int batch, columns;  // B, N
  int cluster;         // blocks that share K
  int share;           // pairs of rows of y that each of them finishes
  int tiles, more;     // of K, that each of them takes; how many of them take one more
  int stages;
  int ahead, rest;  // as Spread has them
  bool constant;  // whether no kernel that may still run writes weights
  bool swiglu, adds, silu;
  Divider by_share;
};

}  // namespace hylo::skinny_linear
