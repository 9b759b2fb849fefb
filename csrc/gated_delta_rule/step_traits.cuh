// How a decode step is spread over threads, for the host and the kernel alike.
#pragma once

#include "common/portable.h"

namespace hylo::gated_delta_rule {

constexpr int kStepAccess = 16;  // bytes of a row of the state that a thread moves at once

// A block is a team: threads that share columns of the state, and all of their K rows. So many of them lie side by side
// along V, in whole sectors of 32 bytes; the others below, each with the rows of its group.
HYLO_HOST_DEVICE constexpr int step_across(int team) { return team == 64 ? 4 : 8; }
HYLO_HOST_DEVICE constexpr int step_groups(int team) { return team / step_across(team); }
HYLO_HOST_DEVICE constexpr int step_columns(int team, int state_bytes) {
  return step_across(team) * kStepAccess / state_bytes;
}

// Few states are spread over many small teams, many go through wide ones, of as many rows a thread as keep its loads in
// flight (docs/gated_delta_rule.md has the measurement).
constexpr long long kStepFew = 8 << 20;  // bytes of all states
HYLO_HOST_DEVICE constexpr int step_team(int width, int state_bytes, long long all_bytes) {
  if (all_bytes <= kStepFew) return 64;
  return state_bytes == 4 && width % step_groups(256) == 0 ? 256 : 128;
}

}  // namespace hylo::gated_delta_rule
