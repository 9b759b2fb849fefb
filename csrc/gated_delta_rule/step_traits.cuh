// How a decode step is spread over threads, for the host and the kernel alike.
#pragma once

#include "common/portable.h"

namespace hylo::gated_delta_rule {

constexpr int kStepThreads = 128;
constexpr int kStepAcross = 8;  // threads side by side along V, 16 bytes of the state each: whole sectors of 32 bytes
constexpr int kStepRows = kStepThreads / kStepAcross;  // rows of the state that the block reads at once

HYLO_HOST_DEVICE constexpr int step_columns(int state_bytes) { return kStepAcross * 16 / state_bytes; }

}  // namespace hylo::gated_delta_rule
