#include "gated_delta_rule/launch_gradients.h"

#include <algorithm>

#include "gated_delta_rule/gradients_params.h"

namespace hylo::gated_delta_rule {
namespace {

using Sizes = std::array<std::int64_t, 4>;

// sizes and strides: from the outermost dim to the innermost.
TensorMap map_of(std::uintptr_t tensor, const Sizes& sizes, const Sizes& strides, int rows, int row_dim) {
  const auto size = [&](int i) { return static_cast<std::uint64_t>(sizes[i]); };
  return box_map(tensor, {size(3), size(2), size(1), size(0)}, {strides[3], strides[2], strides[1], strides[0]}, kTile,
                 static_cast<unsigned>(rows), row_dim);
}

Sizes contiguous(const Sizes& sizes) {
  return {sizes[1] * sizes[2] * sizes[3], sizes[2] * sizes[3], sizes[3], 1};
}

// Boxes of 64 tokens x 64 columns of one head of a [B, T, heads, width].
TensorMap tokens_map(std::uintptr_t tensor, const Sizes& sizes, const Sizes& strides) {
  return map_of(tensor, sizes, strides, kChunk, 2);
}

}  // namespace

void gradients(const Kernel& kernel, std::uintptr_t q, std::uintptr_t k, std::uintptr_t v, std::uintptr_t d_o,
               std::uintptr_t h, std::uintptr_t dh, std::uintptr_t v_new, std::uintptr_t dx, std::uintptr_t records,
               std::uintptr_t cu_seqlens, std::uintptr_t dq, std::uintptr_t dk, std::uintptr_t dv, std::uintptr_t dg,
               std::uintptr_t dbeta, const std::array<std::int64_t, 7>& shape,
               const std::array<std::int64_t, 4>& q_strides, const std::array<std::int64_t, 4>& k_strides,
               const std::array<std::int64_t, 4>& v_strides, int width, int chunks, int multiprocessors, float scale,
               std::uintptr_t stream) {
  const auto [B, T, G, H, K, V, N] = shape;
  if (chunks == 0 || B * T * H == 0) return;
  const Sizes keys{B, T, G, K}, values{B, T, H, V}, states{chunks, H, K, V};
  GradientsParams params{};
  params.common.q = tokens_map(q, keys, q_strides);
  params.common.k = tokens_map(k, keys, k_strides);
  params.common.v = tokens_map(v, values, v_strides);
  params.d_o = tokens_map(d_o, values, contiguous(values));
  params.v_new = tokens_map(v_new, values, contiguous(values));
  params.dx = tokens_map(dx, values, contiguous(values));
  params.h = map_of(h, states, contiguous(states), gradients_columns(width), 1);
  params.dh = map_of(dh, states, contiguous(states), gradients_columns(width), 1);
  params.common.records = reinterpret_cast<unsigned char*>(records);
  params.common.cu_seqlens = reinterpret_cast<const int*>(cu_seqlens);
  params.common.sequences = static_cast<int>(N);
  params.common.tokens = static_cast<int>(T);
  params.common.heads = static_cast<int>(H);
  params.common.group = static_cast<int>(H / G);
  params.common.keys = static_cast<int>(K);
  params.common.values = static_cast<int>(V);
  params.common.scale = scale;
  params.dq = reinterpret_cast<void*>(dq);
  params.dk = reinterpret_cast<void*>(dk);
  params.dv = reinterpret_cast<void*>(dv);
  params.dg = reinterpret_cast<float*>(dg);
  params.dbeta = reinterpret_cast<float*>(dbeta);
  params.gates = B * T * H;
  params.chunks = chunks;

  const std::int64_t work = chunks * G * gradients_parts(width);
  const std::int64_t blocks = std::min<std::int64_t>(work, multiprocessors * gradients_blocks(width));
  kernel.launch({static_cast<unsigned>(blocks)}, static_cast<unsigned>(gradients_threads(width)), &params,
                reinterpret_cast<void*>(stream));
}

}  // namespace hylo::gated_delta_rule
