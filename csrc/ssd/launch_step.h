// The launchers of the decode steps, that the bindings expose.
#pragma once

#include <string>

#include "common/driver.h"
#include "common/tensor.h"
#include "ssd/step_traits.cuh"

namespace hylo::ssd {

// What makes steps of dt. The last two tensors need not be there.
struct StepGateInputs {
  Tensor dt;  // [B, 1, H]
  Tensor a;   // [H]
  Tensor d, dt_bias;
  bool has_d = false, has_bias = false;
};

struct StepOptions {
  bool softplus;
  float least, greatest;
};

struct StepInputs {
  Tensor x;      // [B, 1, HX, V]
  Tensor b, c;   // [B, 1, GB, K], [B, 1, G, K]
  Tensor state;  // [B, H, V, K], or [P, H, V, K] with indices
  Tensor indices;  // [B]
  StepGateInputs gates;
  bool pool = false;  // whether the indices are there
};

// What a kernel is compiled for.
struct StepKind {
  int device;
  ElementType type, state;
  int K;
  int threads, rows;  // of a block; of a thread

  bool operator==(const StepKind& other) const {
    return device == other.device && type == other.type && state == other.state && K == other.K &&
           threads == other.threads && rows == other.rows;
  }
};

// The reason why no kernel takes these inputs on devices of a type, or an empty string. Looks at all that the op asks
// of shapes and types.
std::string step_why_not(const StepInputs& inputs, int device_type);

// Of inputs that step_why_not lets pass.
StepKind step_kind(const StepInputs& inputs);

// The decode step of such inputs; o [B, 1, H, V] is contiguous, of the type of x.
void step(const Kernel& kernel, const StepInputs& inputs, const StepOptions& options, void* o, void* stream);

// --- of a whole Mamba2 block ---

struct Mamba2Inputs {
  Tensor z;            // [B, 1, H, V]
  Tensor xbc;          // [B, 1, D]
  Tensor conv_weight;  // [D, W]
  Tensor conv_bias;    // [D]
  Tensor norm_weight;  // [NG, H V / NG]
  Tensor conv_state;   // [B or P, D, W]
  Tensor state;        // [B or P, H, V, K]
  Tensor indices;      // [B]
  StepGateInputs gates;
  bool has_conv_bias = false, pool = false;
  std::int64_t K, x_heads, b_heads;
};

struct Mamba2Options {
  StepOptions step;
  float eps;
  bool norm_before_gate;
  bool settled_state;  // no kernel that may still run writes the state or the indices
};

// What decides how such a step is spread over the GPU.
struct Mamba2Shape {
  int heads, values, K, W, x_heads, b_heads, c_heads, norms;
  int state_bytes, conv_bytes;  // of a number
  int set;                      // heads of a cluster: those that share channels or a norm
  bool few;                     // sets

  bool operator==(const Mamba2Shape& other) const {
    return heads == other.heads && values == other.values && K == other.K && W == other.W &&
           x_heads == other.x_heads && b_heads == other.b_heads && c_heads == other.c_heads && norms == other.norms &&
           state_bytes == other.state_bytes && conv_bytes == other.conv_bytes && few == other.few;
  }
};

struct Mamba2Plan {
  Mamba2Shape shape;
  int cluster, rows;  // blocks of a cluster; rows of each
  int sums;           // of squares that each block is sent
  Mamba2Passes passes;
  Mamba2Shared shared;
  bool fits;  // else there are more heads in a set, or wider ones, than a cluster has room for
};

// It takes some hundred divisions: worth keeping.
Mamba2Plan mamba2_plan(const Mamba2Shape& shape);

struct Mamba2Kind {
  int device;
  ElementType type, conv_state, weights, state;
  int K, W;
  int threads, rows;

  bool operator==(const Mamba2Kind& other) const {
    return device == other.device && type == other.type && conv_state == other.conv_state &&
           weights == other.weights && state == other.state && K == other.K && W == other.W &&
           threads == other.threads && rows == other.rows;
  }
};

// As above, but for the plan: what does not fit is found there.
std::string mamba2_step_why_not(const Mamba2Inputs& inputs, int device_type);
Mamba2Shape mamba2_shape(const Mamba2Inputs& inputs);
Mamba2Kind mamba2_step_kind(const Mamba2Inputs& inputs, const Mamba2Plan& plan);
void mamba2_step(const Kernel& kernel, const Mamba2Inputs& inputs, const Mamba2Plan& plan,
                 const Mamba2Options& options, void* y, void* stream);

}  // namespace hylo::ssd
