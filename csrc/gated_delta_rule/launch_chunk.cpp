#include "gated_delta_rule/launch_chunk.h"

#include <algorithm>
#include <stdexcept>

#include "gated_delta_rule/gradients_params.h"
#include "gated_delta_rule/gradients_traits.cuh"

namespace hylo::gated_delta_rule {
namespace {

std::uint64_t size(std::int64_t n) { return static_cast<std::uint64_t>(n); }
unsigned count(std::int64_t n) { return static_cast<unsigned>(n); }

Pass pass_named(const std::string& kernel) {
  if (kernel == "o") return kOutputs;
  if (kernel == "solving_o") return kSolvingOutputs;
  if (kernel == "states") return kStates;
  if (kernel == "solving_states") return kSolvingStates;
  if (kernel == "dstates") return kGradients;
  throw std::invalid_argument("there is no chunked kernel '" + kernel + "'");
}

Takes takes_named(const std::string& takes) {
  if (takes == "all") return kAll;
  if (takes == "cuttable") return kCuttable;
  if (takes == "uncuttable") return kUncuttable;
  throw std::invalid_argument("a share takes 'all', 'cuttable' or 'uncuttable' heads, got '" + takes + "'");
}

}  // namespace

int chunk_shared_bytes(const std::string& kernel, int width, int chains) {
  if (kernel == "cuts") return 0;
  if (kernel == "inverse") return inverse_shared(width);
  if (kernel == "gradients") return gradients_shared(width);
  return pass_shared(pass_named(kernel), width, chains);
}

int chunk_gradients_parts(int width) { return gradients_parts(width); }

Share::Share(bool solving, const std::string& takes, int pieces, int makers)
    : solving(solving), takes(takes_named(takes)), pieces(pieces), makers(makers) {}

ChunkCall::ChunkCall(std::uintptr_t q, std::uintptr_t k, std::uintptr_t g, std::uintptr_t beta,
                     std::uintptr_t cu_seqlens, std::uintptr_t records, std::uintptr_t ready, std::uintptr_t cuts,
                     const std::array<std::int64_t, 7>& shape, const Strides& q_strides, const Strides& k_strides,
                     int width, int chunks, int segments, float scale, float negligible, std::uintptr_t stream)
    : batch_(shape[0]),
      tokens_(shape[1]),
      key_heads_(shape[2]),
      heads_(shape[3]),
      keys_(shape[4]),
      values_(shape[5]),
      sequences_(shape[6]),
      width_(width),
      chunks_(chunks),
      ready_(reinterpret_cast<int*>(ready)),
      stream_(reinterpret_cast<void*>(stream)) {
  if (chunks > 0) {
    params_.q = tokens_map(q, key_heads_, keys_, q_strides);
    params_.k = tokens_map(k, key_heads_, keys_, k_strides);
  }
  params_.keys_at = reinterpret_cast<const void*>(k);
  for (int i = 0; i < 3; ++i) params_.key_strides[i] = k_strides[i];
  params_.g = reinterpret_cast<const float*>(g);
  params_.beta = reinterpret_cast<const float*>(beta);
  params_.records = reinterpret_cast<unsigned char*>(records);
  params_.cuts = reinterpret_cast<int*>(cuts);
  params_.cu_seqlens = reinterpret_cast<const int*>(cu_seqlens);
  params_.sequences = static_cast<int>(sequences_);
  params_.tokens = static_cast<int>(tokens_);
  params_.heads = static_cast<int>(heads_);
  params_.group = static_cast<int>(heads_ / key_heads_);
  params_.keys = static_cast<int>(keys_);
  params_.values = static_cast<int>(values_);
  params_.chunks = chunks;
  params_.segments = segments;
  params_.pieces = segments;
  params_.takes = kAll;
  params_.scale = scale;
  params_.negligible = negligible;
}

void ChunkCall::cuts(const Kernel& kernel) const {
  if (chunks_ == 0 || params_.segments == 1) return;
  Params params = params_;
  params.ready = ready_;
  const Grid grid{count(params.segments - 1), count(heads_), count(2 * sequences_)};
  kernel.launch(grid, kCutsThreads, &params, stream_);
}

void ChunkCall::inverse(const Kernel& kernel, int multiprocessors, const Share& share) const {
  if (chunks_ == 0) return;
  Params params = params_;
  params.takes = share.makers == 0 ? share.takes : kCuttable;  // what is not cut has makers
  const std::int64_t slots = multiprocessors * inverse_blocks(width_);
  const Grid grid{count(std::min<std::int64_t>(chunks_, (slots + heads_ - 1) / heads_)), count(heads_)};
  kernel.launch(grid, kSolverThreads, &params, stream_);
}

void ChunkCall::outputs(const Kernel& kernel, const Share& share, std::uintptr_t v, const Strides& v_strides,
                        std::uintptr_t initial_state, std::uintptr_t o, std::uintptr_t final_state) const {
  Params params = params_;
  if (share.solving) params.records = nullptr;
  if (chunks_ > 0) {
    params.v = tokens_map(v, heads_, values_, v_strides);
    params.out = values_map(o);
  }
  params.o = reinterpret_cast<void*>(o);
  params.first_state = reinterpret_cast<const float*>(initial_state);
  params.last_state = reinterpret_cast<float*>(final_state);
  launch(kernel, share.solving ? kSolvingOutputs : kOutputs, 1, share, params);
}

void ChunkCall::states(const Kernel& kernel, const Share& share, std::uintptr_t v, const Strides& v_strides,
                       std::uintptr_t initial_state, std::uintptr_t states, std::uintptr_t written) const {
  if (chunks_ == 0) return;
  Params params = params_;
  params.v = tokens_map(v, heads_, values_, v_strides);
  params.out = values_map(written);
  params.states = states_map(states, width_);
  params.o = reinterpret_cast<void*>(written);
  params.first_state = reinterpret_cast<const float*>(initial_state);
  launch(kernel, share.solving ? kSolvingStates : kStates, 1, share, params);
}

void ChunkCall::dstates(const Kernel& kernel, int chains, std::uintptr_t d_o, std::uintptr_t d_final_state,
                        std::uintptr_t dstates, std::uintptr_t dx, std::uintptr_t d_initial_state) const {
  Params params = params_;
  if (chunks_ > 0) {
    params.v = values_map(d_o);
    params.out = values_map(dx);
    params.states = states_map(dstates, width_);
  }
  params.o = reinterpret_cast<void*>(dx);
  params.first_state = reinterpret_cast<const float*>(d_final_state);
  params.last_state = reinterpret_cast<float*>(d_initial_state);
  launch(kernel, kGradients, chains, Share(false, "all", params.segments, 0), params);
}

void ChunkCall::gradients(const Kernel& kernel, int multiprocessors, std::uintptr_t v, const Strides& v_strides,
                          std::uintptr_t d_o, std::uintptr_t states, std::uintptr_t dstates, std::uintptr_t written,
                          std::uintptr_t dx, std::uintptr_t dq, std::uintptr_t dk, std::uintptr_t dv,
                          std::uintptr_t dg, std::uintptr_t dbeta) const {
  if (chunks_ == 0) return;
  GradientsParams params{};
  params.common = params_;
  params.common.v = tokens_map(v, heads_, values_, v_strides);
  params.d_o = values_map(d_o);
  params.v_new = values_map(written);
  params.dx = values_map(dx);
  params.h = states_map(states, gradients_columns(width_));
  params.dh = states_map(dstates, gradients_columns(width_));
  params.dq = reinterpret_cast<void*>(dq);
  params.dk = reinterpret_cast<void*>(dk);
  params.dv = reinterpret_cast<void*>(dv);
  params.dg = reinterpret_cast<float*>(dg);
  params.dbeta = reinterpret_cast<float*>(dbeta);
  params.gates = batch_ * tokens_ * heads_;

  const std::int64_t work = chunks_ * key_heads_ * gradients_parts(width_);
  const std::int64_t blocks = std::min<std::int64_t>(work, multiprocessors * gradients_blocks(width_));
  kernel.launch({count(blocks)}, count(gradients_threads(width_)), &params, stream_);
}

void ChunkCall::launch(const Kernel& kernel, Pass pass, int chains, const Share& share, Params& params) const {
  params.takes = share.takes;
  params.pieces = share.pieces;
  params.makers = share.makers;
  params.ready = share.makers > 0 ? ready_ : nullptr;
  const std::int64_t width = kTile * chains, columns = (values_ + width - 1) / width;
  const int makers = maker_layers(share.makers, static_cast<int>(columns));
  const Grid grid{count(columns), count(heads_), count(makers + sequences_ * share.pieces)};
  kernel.launch(grid, count(pass_threads(pass, chains)), &params, stream_);
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

// Boxes of so many rows of a head x 64 columns of a contiguous [chunks, H, K, V].
TensorMap ChunkCall::states_map(std::uintptr_t tensor, int rows) const {
  const std::int64_t head = keys_ * values_;
  return box_map(tensor, {size(values_), size(keys_), size(heads_), size(chunks_)}, {1, values_, head, heads_ * head},
                 kTile, count(rows), 1);
}

}  // namespace hylo::gated_delta_rule
