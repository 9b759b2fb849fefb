// Roles and shared memory of gated_delta_rule_bwd_kernel_gradients: constexpr functions of the key width, for host and
// kernel alike.
#pragma once

#include "gated_delta_rule/traits.cuh"

namespace hylo::gated_delta_rule {

// A warpgroup has 64 columns of K, a block those of one or two. The blocks of a chunk and head are its parts.
HYLO_HOST_DEVICE constexpr int gradients_warpgroups(int width) { return width == kTile ? 1 : 2; }
HYLO_HOST_DEVICE constexpr int gradients_columns(int width) { return gradients_warpgroups(width) * kTile; }
HYLO_HOST_DEVICE constexpr int gradients_parts(int width) { return width / gradients_columns(width); }

// A warp loads, in a warpgroup of its own: registers change hands by warpgroups, and none are gained without the other
// warps, as each quarter of the multiprocessor has as many for three warps as for two and one.
HYLO_HOST_DEVICE constexpr int gradients_threads(int width) { return 128 * (gradients_warpgroups(width) + 1); }
HYLO_HOST_DEVICE constexpr int gradients_blocks(int width) { return width == kTile ? 2 : 1; }  // a multiprocessor
constexpr int kGradientsLoaderRegisters = 32;
HYLO_HOST_DEVICE constexpr int gradients_registers(int width) { return width == kTile ? 224 : 232; }

// 64 columns of V: the rows of both states, and of the tokens do, dx, what they wrote, and v.
HYLO_HOST_DEVICE constexpr int gradients_stage_size(int width) {
  return (2 * gradients_warpgroups(width) + 4) * kTileSize;
}
HYLO_HOST_DEVICE constexpr int gradients_stages(int width) { return width == kTile ? 1 : 2; }

// Queries and keys of a chunk.
HYLO_HOST_DEVICE constexpr int gradients_inputs_size(int width) { return 2 * gradients_warpgroups(width) * kTileSize; }

// Gradients of the two [C, C] products, and dk of the value heads so far in fp32.
HYLO_HOST_DEVICE constexpr int gradients_results_size(int width) {
  return (2 + 2 * gradients_warpgroups(width)) * kTileSize;
}

HYLO_HOST_DEVICE constexpr int gradients_shared(int width) {
  return gradients_stages(width) * gradients_stage_size(width) + gradients_inputs_size(width) +
         gradients_results_size(width) + 1024;
}

}  // namespace hylo::gated_delta_rule
