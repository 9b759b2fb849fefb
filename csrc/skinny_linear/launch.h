// The launcher of products of few rows, that the bindings expose.
#pragma once

#include <string>

#include "common/driver.h"
#include "common/tensor.h"

namespace hylo::skinny_linear {

struct Inputs {
  Tensor x;         // [B, K]
  Tensor weight;    // [N, K]; with `swiglu` [2 N, K], gate rows first
  Tensor residual;  // [B, N]
  Tensor norm;      // [K]. Weights of an RMS norm that x goes through first; `eps` is added to its mean square
  // What the first D outputs go through: one token of a causal convolution, whose last inputs are updated in place.
  Tensor conv_weight;  // [D, 4]
  Tensor conv_state;   // [B, D, 4]
  bool has_residual = false, has_norm = false, has_conv = false;
  bool swiglu = false, silu = false;  // the latter is of the convolution
  float eps = 0.0f;
};

// What a kernel is compiled for.
struct Kind {
  int device;
  ElementType type;
  int B;
  bool convolves;

  bool operator==(const Kind& other) const {
    return device == other.device && type == other.type && B == other.B && convolves == other.convolves;
  }
};

// How a launch is spread over the GPU and over time.
struct Spread {
  int cluster;  // blocks that share K: what they add up to depends on it
  // Tiles of 64 of K, of a block: more than it has room for, that come as far as the second cache while the kernel ahead
  // still runs; and weights that it has yet to ask for when the next kernel may begin.
  int ahead, rest;
};

// Columns of y.
std::int64_t outputs_of(const Inputs& inputs);

// The reason why no kernel takes these inputs on devices of a type, or an empty string. Looks at all that the op asks
// of shapes and types.
std::string why_not(const Inputs& inputs, int device_type);

// The following are of inputs that why_not lets pass.
Kind kind_of(const Inputs& inputs);

// One that suits them. Its cluster does not depend on B.
Spread spread_of(const Inputs& inputs);
bool can_be(const Spread& spread, const Inputs& inputs);

// y [B, N] is contiguous: the residual, which is added to, or not. constant: no kernel that may still run writes weights.
void launch(const Kernel& kernel, const Inputs& inputs, const Spread& spread, bool constant, void* y,
            void* stream);

}  // namespace hylo::skinny_linear
