// The chunks of a call of this op, and gates that leave nothing of a state.
#pragma once

#include "common/chunks.cuh"
#include "gated_delta_rule/params.h"
#include "gated_delta_rule/traits.cuh"

namespace hylo::gated_delta_rule {

constexpr float kEmptiesState = -150.0f;  // stands for a gate of -inf and near it: exp of it is 0 in fp32

}  // namespace hylo::gated_delta_rule
