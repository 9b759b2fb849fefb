// The launcher of the decode step, that the bindings expose.
#pragma once

#include <string>

#include "common/driver.h"
#include "common/tensor.h"

namespace hylo::gated_delta_rule {

struct StepInputs {
  Tensor q, k;             // [B, 1, G, K]
  Tensor v;                // [B, 1, H, V]
  Tensor gate, strength;   // [B, 1, H]: g and beta, or a and b of raw gates
  Tensor state;            // [B, H, K, V], or [P, H, K, V] with indices
  Tensor a_log, dt_bias;   // [H], of raw gates
  Tensor indices;          // [B]
  bool raw = false, pool = false;  // whether the last ones are there
};

struct StepOptions {
  float scale;
  bool normalise;       // q and k
  float most_strength;  // of raw gates: beta = most_strength sigmoid(b)
  bool settled_state;   // no kernel that may still run writes the state or the indices
};

// What a kernel is compiled for.
struct StepKind {
  int device;
  ElementType type, state;
  int K;
  bool raw;
  int team;  // threads of a block

  bool operator==(const StepKind& other) const {
    return device == other.device && type == other.type && state == other.state && K == other.K && raw == other.raw &&
           team == other.team;
  }
};

// The reason why no kernel takes these inputs on devices of a type, or an empty string. Looks at all that the op asks
// of shapes and types.
std::string step_why_not(const StepInputs& inputs, int device_type);

// Of inputs that step_why_not lets pass.
StepKind step_kind(const StepInputs& inputs);

// The decode step of such inputs; o [B, 1, H, V] is contiguous, of the type of v.
void step(const Kernel& kernel, const StepInputs& inputs, const StepOptions& options, void* o, void* stream);

}  // namespace hylo::gated_delta_rule
