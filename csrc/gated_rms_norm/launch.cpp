#include "gated_rms_norm/launch.h"

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
  if (rows > kMaxGrid || tiles * batches > kMaxGrid) {
    throw std::invalid_argument("gated_rms_norm takes fewer than 2^31 rows, got B " + std::to_string(shape[0]) + ", T " +
                                std::to_string(shape[1]) + ", H " + std::to_string(shape[2]));
  }
  Params params{reinterpret_cast<const void*>(x),
                reinterpret_cast<const void*>(gate),
                reinterpret_cast<const void*>(weight),
                reinterpret_cast<void*>(y),
                {x_strides[0], x_strides[1], x_strides[2]},
                {gate_strides[0], gate_strides[1], gate_strides[2]},
                weight_stride_h,
                static_cast<unsigned>(rows),
                static_cast<unsigned>(shape[2]),
                static_cast<unsigned>(tiles),
                eps,
                norm_before_gate ? 1 : 0};
  kernel.launch({static_cast<unsigned>(tiles * batches)}, block_threads(width, vector), &params,
                reinterpret_cast<void*>(stream));
}

}  // namespace hylo::gated_rms_norm
