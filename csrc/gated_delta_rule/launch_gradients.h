// The launcher of gated_delta_rule_bwd_kernel_gradients, that the bindings expose.
#pragma once

#include <array>
#include <cstdint>

#include "common/driver.h"
#include "gated_delta_rule/gradients_traits.cuh"

namespace hylo::gated_delta_rule {

// Everything of the backward that needs no walk from chunk to chunk. Pointers are of the tensors in
// gradients_params.h; cu_seqlens 0 stands for none. q, k and v may be views, the other tensors are contiguous.
// shape: B, T, G, H, K, V, N. Strides in elements, of the dims B, T, heads, width; the last is 1, the others are
// multiples of 8 (where a dim has more than one entry), as K and V are. width: HYLO_K of the kernel, at least K.
// chunks: records there is room for. dg and dbeta have gradients_parts(width) parts, all written but for tokens of no
// sequence.
void gradients(const Kernel& kernel, std::uintptr_t q, std::uintptr_t k, std::uintptr_t v, std::uintptr_t d_o,
               std::uintptr_t h, std::uintptr_t dh, std::uintptr_t v_new, std::uintptr_t dx, std::uintptr_t records,
               std::uintptr_t cu_seqlens, std::uintptr_t dq, std::uintptr_t dk, std::uintptr_t dv, std::uintptr_t dg,
               std::uintptr_t dbeta, const std::array<std::int64_t, 7>& shape,
               const std::array<std::int64_t, 4>& q_strides, const std::array<std::int64_t, 4>& k_strides,
               const std::array<std::int64_t, 4>& v_strides, int width, int chunks, int multiprocessors, float scale,
               std::uintptr_t stream);

}  // namespace hylo::gated_delta_rule
