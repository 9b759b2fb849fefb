// What the host hands to the kernels. Plain data, the same layout on both sides.
#pragma once

namespace hylo::gated_rms_norm {

// Strides in elements, of the dims B, T, H; the last dim is contiguous.
struct Strides {
  long long b, t, h;
};

struct Params {
  const void* x;       // [B, T, H, V]
  const void* gate;    // [B, T, H, V]
  const void* weight;  // [V] or [H, V]
  void* y;             // [B, T, H, V], contiguous
  Strides x_strides;
  Strides gate_strides;
  long long weight_stride_h;  // elements; 0 where the heads share one weight
  unsigned rows;              // T * H: heads of one batch entry, below 2^31
  unsigned heads;             // H
  unsigned tiles;             // blocks of one batch entry
  float eps;
  int norm_before_gate;
};

struct BackwardParams {
  const void* dy;      // [B, T, H, V]
  const void* x;       // [B, T, H, V]
  const void* gate;    // [B, T, H, V]
  const void* weight;  // [V] or [H, V]
  void* dx;            // [B, T, H, V], contiguous
  void* dgate;         // [B, T, H, V], contiguous
  float* partials;     // [blocks, V] where the heads share one weight, else [blocks, rows a block, V]
  Strides dy_strides;
  Strides x_strides;
  Strides gate_strides;
  long long weight_stride_h;  // elements
  unsigned rows;              // B * T * H, below 2^31
  unsigned tokens;            // T
  unsigned heads;             // H
  unsigned tiles;             // of as many rows as a block takes at once
  unsigned batches;           // B
  long long dy_step;          // elements from a row to the next one of its thread, within a batch entry
  long long x_step;
  long long gate_step;
  int shared_weight;          // by the heads
  float eps;
};

struct DweightParams {
  const float* partials;  // [terms, columns]
  void* dweight;          // [columns]
  unsigned terms;
  unsigned columns;  // V or H * V
};

}  // namespace hylo::gated_rms_norm
