#include "gated_delta_rule/launch_chunk.h"

#include <stdexcept>

namespace hylo::gated_delta_rule {
namespace {

std::uint64_t size(std::int64_t n) { return static_cast<std::uint64_t>(n); }

}  // namespace

int chunk_shared_bytes(const std::string& kernel, int width, int chains) {
  if (kernel == "inverse") return inverse_shared(width);
  if (kernel == "o") return pass_shared(kOutputs, width, chains);
  if (kernel == "states") return pass_shared(kStates, width, chains);
  if (kernel == "dstates") return pass_shared(kGradients, width, chains);
  throw std::invalid_argument("there is no chunked kernel '" + kernel + "'");
}

ChunkCall::ChunkCall(std::uintptr_t q, std::uintptr_t k, std::uintptr_t g, std::uintptr_t beta,
                     std::uintptr_t cu_seqlens, std::uintptr_t records, const std::array<std::int64_t, 7>& shape,
                     const Strides& q_strides, const Strides& k_strides, int width, int chains, int chunks,
                     float scale, float negligible, std::uintptr_t stream)
    : batch_(shape[0]),
      tokens_(shape[1]),
      key_heads_(shape[2]),
      heads_(shape[3]),
      keys_(shape[4]),
      values_(shape[5]),
      sequences_(shape[6]),
      width_(width),
      chains_(chains),
      chunks_(chunks),
      stream_(reinterpret_cast<void*>(stream)) {
  if (chunks > 0) {
    params_.q = tokens_map(q, key_heads_, keys_, q_strides);
    params_.k = tokens_map(k, key_heads_, keys_, k_strides);
  }
  params_.g = reinterpret_cast<const float*>(g);
  params_.beta = reinterpret_cast<const float*>(beta);
  params_.records = reinterpret_cast<unsigned char*>(records);
  params_.cu_seqlens = reinterpret_cast<const int*>(cu_seqlens);
  params_.sequences = static_cast<int>(sequences_);
  params_.tokens = static_cast<int>(tokens_);
  params_.heads = static_cast<int>(heads_);
  params_.group = static_cast<int>(heads_ / key_heads_);
  params_.keys = static_cast<int>(keys_);
  params_.values = static_cast<int>(values_);
  params_.scale = scale;
  params_.negligible = negligible;
}

void ChunkCall::inverse(const Kernel& kernel) const {
  if (chunks_ == 0) return;
  Params params = params_;
  kernel.launch({static_cast<unsigned>(chunks_), static_cast<unsigned>(heads_)}, kInverseThreads, &params, stream_);
}

void ChunkCall::outputs(const Kernel& kernel, int segments, std::uintptr_t v, const Strides& v_strides,
                        std::uintptr_t initial_state, std::uintptr_t o, std::uintptr_t final_state) const {
  Params params = params_;
  if (chunks_ > 0) {
    params.v = tokens_map(v, heads_, values_, v_strides);
    params.out = values_map(o);
  }
  params.o = reinterpret_cast<void*>(o);
  params.first_state = reinterpret_cast<const float*>(initial_state);
  params.last_state = reinterpret_cast<float*>(final_state);
  launch(kernel, kOutputs, segments, params);
}

void ChunkCall::states(const Kernel& kernel, int segments, std::uintptr_t v, const Strides& v_strides,
                       std::uintptr_t initial_state, std::uintptr_t states, std::uintptr_t written) const {
  if (chunks_ == 0) return;
  Params params = params_;
  params.v = tokens_map(v, heads_, values_, v_strides);
  params.out = values_map(written);
  params.states = states_map(states);
  params.o = reinterpret_cast<void*>(written);
  params.first_state = reinterpret_cast<const float*>(initial_state);
  launch(kernel, kStates, segments, params);
}

void ChunkCall::dstates(const Kernel& kernel, int segments, std::uintptr_t d_o, std::uintptr_t d_final_state,
                        std::uintptr_t dstates, std::uintptr_t dx, std::uintptr_t d_initial_state) const {
  Params params = params_;
  if (chunks_ > 0) {
    params.v = values_map(d_o);
    params.out = values_map(dx);
    params.states = states_map(dstates);
  }
  params.o = reinterpret_cast<void*>(dx);
  params.first_state = reinterpret_cast<const float*>(d_final_state);
  params.last_state = reinterpret_cast<float*>(d_initial_state);
  launch(kernel, kGradients, segments, params);
}

void ChunkCall::launch(const Kernel& kernel, Pass pass, int segments, Params& params) const {
  params.segments = segments;
  const std::int64_t columns = kTile * chains_;
  const Grid grid{static_cast<unsigned>((values_ + columns - 1) / columns), static_cast<unsigned>(heads_),
                  static_cast<unsigned>(sequences_ * segments)};
  kernel.launch(grid, static_cast<unsigned>(pass_threads(pass, chains_)), &params, stream_);
}

// Boxes of 64 tokens x 64 columns of one head.
TensorMap ChunkCall::tokens_map(std::uintptr_t tensor, std::int64_t heads, std::int64_t width,
                                const Strides& strides) const {
  return box_map(tensor, {size(width), size(heads), size(tokens_), size(batch_)},
                 {strides[3], strides[2], strides[1], strides[0]}, kTile, kChunk, 2);
}

// The same of a contiguous [B, T, H, V].
TensorMap ChunkCall::values_map(std::uintptr_t tensor) const {
  return tokens_map(tensor, heads_, values_, {tokens_ * heads_ * values_, heads_ * values_, values_, 1});
}

// Boxes of a head's whole key width x 64 columns of a contiguous [chunks, H, K, V].
TensorMap ChunkCall::states_map(std::uintptr_t tensor) const {
  const std::int64_t head = keys_ * values_;
  return box_map(tensor, {size(values_), size(keys_), size(heads_), size(chunks_)}, {1, values_, head, heads_ * head},
                 kTile, static_cast<unsigned>(width_), 1);
}

}  // namespace hylo::gated_delta_rule
