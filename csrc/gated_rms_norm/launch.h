// The launcher that the bindings expose.
#pragma once

#include <array>
#include <cstdint>

#include "common/driver.h"

namespace hylo::gated_rms_norm {

// kernel: gated_rms_norm_fwd_kernel_y, compiled for width shape[3] and `vector` elements an access.
// shape: B, T, H, V. Strides in elements, of the same dims; the last must be 1 and is not looked at.
// Throws std::invalid_argument where the sizes are beyond one launch.
void forward(const Kernel& kernel, std::uintptr_t x, std::uintptr_t gate, std::uintptr_t weight, std::uintptr_t y,
             const std::array<std::int64_t, 4>& shape, const std::array<std::int64_t, 4>& x_strides,
             const std::array<std::int64_t, 4>& gate_strides, std::int64_t weight_stride_h, int vector, float eps,
             bool norm_before_gate, std::uintptr_t stream);

}  // namespace hylo::gated_rms_norm
