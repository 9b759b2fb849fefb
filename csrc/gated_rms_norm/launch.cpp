#include "gated_rms_norm/launch.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

#include "gated_rms_norm/params.h"
#include "gated_rms_norm/traits.cuh"

namespace hylo::gated_rms_norm {
namespace {

constexpr std::int64_t kMaxGrid = 0x7fffffff;  // blocks of one launch; the kernel counts rows in 32 bits too

using Sizes = std::array<std::int64_t, 4>;

// Batch entries that follow each other like tokens are tokens: no block then ends at a batch entry's end.
bool batch_is_more_tokens(const Sizes& shape, const Sizes& strides) {
  return shape[0] == 1 || strides[0] == shape[1] * strides[1];
}

[[noreturn]] void refuse(const Sizes& shape) {
  throw std::invalid_argument("gated_rms_norm takes fewer than 2^31 rows, got B " + std::to_string(shape[0]) + ", T " +
                              std::to_string(shape[1]) + ", H " + std::to_string(shape[2]));
}

Strides outer(const Sizes& strides) { return {strides[0], strides[1], strides[2]}; }

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

void forward(const Kernel& kernel, std::uintptr_t x, std::uintptr_t gate, std::uintptr_t weight, std::uintptr_t y,
             const Sizes& shape, const Sizes& x_strides, const Sizes& gate_strides, std::int64_t weight_stride_h,
             int vector, float eps, bool norm_before_gate, std::uintptr_t stream) {
  std::int64_t batches = shape[0];
  std::int64_t rows = shape[1] * shape[2];
  if (batches * rows == 0) return;
  if (batches * rows <= kMaxGrid && batch_is_more_tokens(shape, x_strides) &&
      batch_is_more_tokens(shape, gate_strides)) {
    rows *= batches;
    batches = 1;
  }
  const int width = static_cast<int>(shape[3]);
  const int tile = rows_per_block(width, vector);
  const std::int64_t tiles = (rows + tile - 1) / tile;
  if (rows > kMaxGrid || tiles * batches > kMaxGrid) refuse(shape);
  Params params{pointer<const void>(x),
                pointer<const void>(gate),
                pointer<const void>(weight),
                pointer<void>(y),
                outer(x_strides),
                outer(gate_strides),
                weight_stride_h,
                static_cast<unsigned>(rows),
                static_cast<unsigned>(shape[2]),
                static_cast<unsigned>(tiles),
                eps,
                norm_before_gate ? 1 : 0};
  kernel.launch_early({static_cast<unsigned>(tiles * batches)}, block_threads(width, vector), &params,
                      pointer<void>(stream));
}

BackwardGrid backward_grid(const Sizes& shape, int vector, int element_bytes, int weight_bytes, int multiprocessors) {
  const std::int64_t rows = shape[0] * shape[1] * shape[2];
  const int width = static_cast<int>(shape[3]);
  const int at_once = rows_per_block(width, vector, backward_elements(width, vector, element_bytes));
  // A thread of a block that takes rows at a step of whole tokens always meets the same head.
  const std::int64_t whole = shape[2] / std::gcd<std::int64_t>(shape[2], at_once);
  const std::int64_t useful = (rows + at_once - 1) / at_once;
  const std::int64_t fit = multiprocessors * backward_blocks(width, vector, element_bytes, weight_bytes);
  const std::int64_t blocks = std::max<std::int64_t>(std::min(useful, fit) / whole, 1) * whole;
  if (rows + blocks * at_once > kMaxGrid) refuse(shape);
  return {static_cast<int>(blocks), at_once};
}

void backward(const Kernel& kernel, const Kernel& dweight_kernel, const BackwardGrid& grid,
              const std::array<std::uintptr_t, 4>& dy_x_gate_weight,
              const std::array<std::uintptr_t, 3>& dx_dgate_dweight,
              std::uintptr_t partials, const Sizes& shape, const std::array<Sizes, 3>& dy_x_gate_strides,
              std::int64_t weight_stride_h, bool shared_weight, int vector, int element_bytes, float eps,
              std::uintptr_t stream) {
  const auto& [dy, x, gate, weight] = dy_x_gate_weight;
  const auto& [dx, dgate, dweight] = dx_dgate_dweight;
  const auto& [dy_strides, x_strides, gate_strides] = dy_x_gate_strides;
  const bool one_batch = batch_is_more_tokens(shape, dy_strides) && batch_is_more_tokens(shape, x_strides) &&
                         batch_is_more_tokens(shape, gate_strides);
  const unsigned heads = static_cast<unsigned>(shape[2]);
  const unsigned rows = static_cast<unsigned>(shape[0] * shape[1]) * heads;
  const int at_once = grid.blocks * grid.rows;
  const std::int64_t step = at_once / heads;  // tokens
  BackwardParams params{pointer<const void>(dy),
                        pointer<const void>(x),
                        pointer<const void>(gate),
                        pointer<const void>(weight),
                        pointer<void>(dx),
                        pointer<void>(dgate),
                        pointer<float>(partials),
                        outer(dy_strides),
                        outer(x_strides),
                        outer(gate_strides),
                        weight_stride_h,
                        rows,
                        static_cast<unsigned>(one_batch ? shape[0] * shape[1] : shape[1]),
                        heads,
                        (rows + grid.rows - 1) / grid.rows,
                        static_cast<unsigned>(one_batch ? 1 : shape[0]),
                        step * dy_strides[1],
                        step * x_strides[1],
                        step * gate_strides[1],
                        shared_weight ? 1 : 0,
                        eps};
  const int width = static_cast<int>(shape[3]);
  kernel.launch_early({static_cast<unsigned>(grid.blocks)},
                      block_threads(width, vector, backward_elements(width, vector, element_bytes)), &params,
                      pointer<void>(stream));
  const unsigned columns = static_cast<unsigned>(width) * (shared_weight ? 1 : heads);
  DweightParams sum{pointer<const float>(partials), pointer<void>(dweight),
                    shared_weight ? grid.blocks : at_once / heads, columns};
  dweight_kernel.launch_early({(columns + kDweightColumns - 1) / kDweightColumns}, kDweightThreads, &sum,
                              pointer<void>(stream));
}

}  // namespace hylo::gated_rms_norm
