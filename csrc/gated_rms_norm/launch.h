// The launchers that the bindings expose.
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

// The blocks of a backward pass, and how many rows each takes at once. Together they take whole tokens.
struct BackwardGrid {
  int blocks, rows;
};

// shape: B, T, H, V, with a row at least. The kernel is chosen by V, `vector` and the sizes of an element of x and of
// the weight.
// Throws std::invalid_argument where the sizes are beyond one launch.
BackwardGrid backward_grid(const std::array<std::int64_t, 4>& shape, int vector, int element_bytes, int weight_bytes,
                           int multiprocessors);

// kernel: gated_rms_norm_bwd_kernel_norm_first or _gate_first, compiled as for forward; dweight_kernel:
// gated_rms_norm_bwd_kernel_dweight of the same cubin. dx, dgate and dweight are contiguous. partials: a line of V
// floats for each block of the grid where the heads share one weight, else for each of its rows.
void backward(const Kernel& kernel, const Kernel& dweight_kernel, const BackwardGrid& grid,
              const std::array<std::uintptr_t, 4>& dy_x_gate_weight,
              const std::array<std::uintptr_t, 3>& dx_dgate_dweight,
              std::uintptr_t partials, const std::array<std::int64_t, 4>& shape,
              const std::array<std::array<std::int64_t, 4>, 3>& dy_x_gate_strides, std::int64_t weight_stride_h,
              bool shared_weight, int vector, int element_bytes, float eps, std::uintptr_t stream);

}  // namespace hylo::gated_rms_norm
