// What the host hands to the kernel. Plain data, the same layout on both sides.
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

}  // namespace hylo::gated_rms_norm
