// The launchers that the bindings expose.
#pragma once

#include <array>
#include <cstdint>
#include <utility>

#include "common/driver.h"
#include "gated_delta_rule/traits.cuh"

namespace hylo::gated_delta_rule {

// Dynamic shared memory, in bytes, of _inverse and of _o at a key width and with so many warpgroups a block.
std::pair<int, int> shared_bytes(int width, int warpgroups);

using Strides = std::array<std::int64_t, 4>;

// The chunked forward in two launches. Pointers are of the tensors in params.h; 0 stands for an absent one.
// shape: B, T, G, H, K, V, N. chunks: records there is room for. Strides in elements, of the dims B, T, heads, width; the
// last is 1, the others are multiples of 8 (where a dim has more than one entry).
void forward(const Kernel& inverse, const Kernel& output, std::uintptr_t q, std::uintptr_t k, std::uintptr_t v,
             std::uintptr_t g, std::uintptr_t beta, std::uintptr_t initial_state, std::uintptr_t cu_seqlens,
             std::uintptr_t records, std::uintptr_t o, std::uintptr_t final_state,
             const std::array<std::int64_t, 7>& shape, const Strides& q_strides, const Strides& k_strides,
             const Strides& v_strides, int warpgroups, int chunks, int segments, float scale, float negligible,
             std::uintptr_t stream);

// The decode step. Pointers are of the tensors in step_params.h; indices 0 stands for none.
// shape: B, G, H, V. strides: in elements, of batch and heads of q, k, v, g, beta and state.
void step(const Kernel& kernel, std::uintptr_t q, std::uintptr_t k, std::uintptr_t v, std::uintptr_t g,
          std::uintptr_t beta, std::uintptr_t state, std::uintptr_t indices, std::uintptr_t o,
          const std::array<std::int64_t, 4>& shape, const std::array<std::int64_t, 12>& strides, int state_bytes,
          bool wide_indices, float scale, std::uintptr_t stream);

}  // namespace hylo::gated_delta_rule
