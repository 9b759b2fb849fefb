#include "gated_delta_rule/launch.h"

#include "gated_delta_rule/params.h"
#include "gated_delta_rule/step_params.h"
#include "gated_delta_rule/step_traits.cuh"

namespace hylo::gated_delta_rule {
namespace {

// Boxes of 64 tokens x 64 columns of one head.
TensorMap tile_map(std::uintptr_t tensor, std::int64_t batch, std::int64_t tokens, std::int64_t heads,
                   std::int64_t width, const Strides& strides) {
  const auto size = [](std::int64_t n) { return static_cast<std::uint64_t>(n); };
  return box_map(tensor, {size(width), size(heads), size(tokens), size(batch)},
                 {strides[3], strides[2], strides[1], strides[0]}, kTile, kChunk, 2);
}

}  // namespace

std::pair<int, int> shared_bytes(int width, int warpgroups) {
  return {inverse_shared(width), output_shared(width, warpgroups)};
}

void forward(const Kernel& inverse, const Kernel& output, std::uintptr_t q, std::uintptr_t k, std::uintptr_t v,
             std::uintptr_t g, std::uintptr_t beta, std::uintptr_t initial_state, std::uintptr_t cu_seqlens,
             std::uintptr_t records, std::uintptr_t o, std::uintptr_t final_state,
             const std::array<std::int64_t, 7>& shape, const Strides& q_strides, const Strides& k_strides,
             const Strides& v_strides, int warpgroups, int chunks, int segments, float scale, float negligible,
             std::uintptr_t stream) {
  const auto [B, T, G, H, K, V, N] = shape;
  Params params{};
  if (chunks > 0) {
    params.q = tile_map(q, B, T, G, K, q_strides);
    params.k = tile_map(k, B, T, G, K, k_strides);
    params.v = tile_map(v, B, T, H, V, v_strides);
  }
  params.g = reinterpret_cast<const float*>(g);
  params.beta = reinterpret_cast<const float*>(beta);
  params.records = reinterpret_cast<unsigned char*>(records);
  params.initial_state = reinterpret_cast<const float*>(initial_state);
  params.final_state = reinterpret_cast<float*>(final_state);
  params.o = reinterpret_cast<void*>(o);
  params.cu_seqlens = reinterpret_cast<const int*>(cu_seqlens);
  params.sequences = static_cast<int>(N);
  params.tokens = static_cast<int>(T);
  params.heads = static_cast<int>(H);
  params.group = static_cast<int>(H / G);
  params.values = static_cast<int>(V);
  params.chunks = chunks;
  params.segments = segments;
  params.scale = scale;
  params.negligible = negligible;

  void* on = reinterpret_cast<void*>(stream);
  const auto heads = static_cast<unsigned>(H);
  if (chunks > 0) inverse.launch({static_cast<unsigned>(chunks), heads}, kInverseThreads, &params, on);
  const auto columns = static_cast<unsigned>(V / (kTile * warpgroups));
  output.launch({columns, heads, static_cast<unsigned>(N * segments)}, output_threads(warpgroups), &params, on);
}

void step(const Kernel& kernel, std::uintptr_t q, std::uintptr_t k, std::uintptr_t v, std::uintptr_t g,
          std::uintptr_t beta, std::uintptr_t state, std::uintptr_t indices, std::uintptr_t o,
          const std::array<std::int64_t, 4>& shape, const std::array<std::int64_t, 12>& strides, int state_bytes,
          bool wide_indices, float scale, std::uintptr_t stream) {
  const auto [B, G, H, V] = shape;
  if (B * H * V == 0) return;
  StepParams params{reinterpret_cast<const void*>(q),
                    reinterpret_cast<const void*>(k),
                    reinterpret_cast<const void*>(v),
                    reinterpret_cast<const void*>(g),
                    reinterpret_cast<const void*>(beta),
                    reinterpret_cast<void*>(state),
                    reinterpret_cast<const void*>(indices),
                    reinterpret_cast<void*>(o),
                    strides[0],
                    strides[1],
                    strides[2],
                    strides[3],
                    strides[4],
                    strides[5],
                    strides[6],
                    strides[7],
                    strides[8],
                    strides[9],
                    strides[10],
                    strides[11],
                    static_cast<int>(H / G),
                    static_cast<int>(V),
                    wide_indices ? 1 : 0,
                    scale};
  const auto blocks = static_cast<unsigned>(V / step_columns(state_bytes));
  kernel.launch({blocks, static_cast<unsigned>(H), static_cast<unsigned>(B)}, kStepThreads, &params,
                reinterpret_cast<void*>(stream));
}

}  // namespace hylo::gated_delta_rule
