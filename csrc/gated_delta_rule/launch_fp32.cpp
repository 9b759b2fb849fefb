#include "gated_delta_rule/launch_fp32.h"

#include <stdexcept>

#include "gated_delta_rule/fp32_traits.cuh"

namespace hylo::gated_delta_rule {
namespace {

using namespace fp32_chunk;

unsigned count(std::int64_t n) { return static_cast<unsigned>(n); }
float* floats(std::uintptr_t tensor) { return reinterpret_cast<float*>(tensor); }
int blocks(std::int64_t size, int each) { return static_cast<int>((size + each - 1) / each); }

Rows rows(std::uintptr_t tensor, const std::array<std::int64_t, 4>& strides) {
  return {floats(tensor), {strides[0], strides[1], strides[2]}};
}

}  // namespace

int fp32_shared_bytes(const std::string& kernel, int width) {
  if (kernel == "inverse") return inverse_shared();
  if (kernel == "o") return pass_shared(fp32_chunk::kOutputs, width);
  if (kernel == "states") return pass_shared(fp32_chunk::kStates, width);
  if (kernel == "dstates") return pass_shared(fp32_chunk::kGradients, width);
  if (kernel == "dscores") return dscores_shared();
  if (kernel == "dqk") return dqk_shared();
  throw std::invalid_argument("there is no chunked kernel '" + kernel + "' for fp32");
}

Fp32Call::Fp32Call(const std::array<std::uintptr_t, 3>& qkv, std::uintptr_t g, std::uintptr_t beta,
                   std::uintptr_t cu_seqlens, std::uintptr_t records, const std::array<std::int64_t, 7>& shape,
                   const std::array<std::array<std::int64_t, 4>, 3>& strides, int chunks, float scale,
                   std::uintptr_t stream)
    : key_heads_(shape[2]), stream_(reinterpret_cast<void*>(stream)) {
  params_.q = rows(qkv[0], strides[0]);
  params_.k = rows(qkv[1], strides[1]);
  params_.v = rows(qkv[2], strides[2]);
  params_.records = floats(records);
  params_.gates = shape[0] * shape[1] * shape[3];
  auto& common = params_.common;
  common.g = floats(g);
  common.beta = floats(beta);
  common.cu_seqlens = reinterpret_cast<const int*>(cu_seqlens);
  common.sequences = static_cast<int>(shape[6]);
  common.tokens = static_cast<int>(shape[1]);
  common.heads = static_cast<int>(shape[3]);
  common.group = static_cast<int>(shape[3] / key_heads_);
  common.keys = static_cast<int>(shape[4]);
  common.values = static_cast<int>(shape[5]);
  common.chunks = chunks;
  common.scale = scale;
}

void Fp32Call::inverse(const Kernel& kernel) const {
  if (params_.common.chunks == 0) return;
  Params params = params_;
  kernel.launch({count(params.common.chunks), count(params.common.heads)}, kThreads, &params, stream_);
}

void Fp32Call::outputs(const Kernel& kernel, std::uintptr_t initial_state, std::uintptr_t o,
                       std::uintptr_t final_state) const {
  Params params = params_;
  params.o = floats(o);
  pass(kernel, params, initial_state, final_state);
}

void Fp32Call::share(std::uintptr_t d_o, std::uintptr_t states, std::uintptr_t dstates, std::uintptr_t written,
                     std::uintptr_t dx, std::uintptr_t d_scores, std::uintptr_t d_solve) {
  params_.d_o = floats(d_o);
  params_.states = floats(states);
  params_.dstates = floats(dstates);
  params_.written = floats(written);
  params_.dx = floats(dx);
  params_.d_scores = floats(d_scores);
  params_.d_solve = floats(d_solve);
}

void Fp32Call::states(const Kernel& kernel, std::uintptr_t initial_state) const {
  if (params_.common.chunks == 0) return;
  Params params = params_;
  pass(kernel, params, initial_state, 0);
}

void Fp32Call::dstates(const Kernel& kernel, std::uintptr_t d_final_state, std::uintptr_t d_initial_state) const {
  Params params = params_;
  pass(kernel, params, d_final_state, d_initial_state);
}

void Fp32Call::dscores(const Kernel& kernel, std::uintptr_t dv, std::uintptr_t dg, std::uintptr_t dbeta) const {
  if (params_.common.chunks == 0) return;
  Params params = params_;
  params.dv = floats(dv);
  params.dg = floats(dg);
  params.dbeta = floats(dbeta);
  kernel.launch({count(params.common.chunks), count(params.common.heads)}, kThreads, &params, stream_);
}

void Fp32Call::dqk(const Kernel& kernel, std::uintptr_t dq, std::uintptr_t dk, std::uintptr_t dg,
                   std::uintptr_t dbeta) const {
  if (params_.common.chunks == 0) return;
  Params params = params_;
  params.dq = floats(dq);
  params.dk = floats(dk);
  params.dg = floats(dg);
  params.dbeta = floats(dbeta);
  const int slices = blocks(params.common.keys, kSlice);
  kernel.launch({count(params.common.chunks * slices), count(key_heads_)}, kThreads, &params, stream_);
}

void Fp32Call::pass(const Kernel& kernel, Params& params, std::uintptr_t first_state, std::uintptr_t last_state) const {
  params.common.first_state = floats(first_state);
  params.common.last_state = floats(last_state);
  const int columns = blocks(params.common.values, kColumns);
  kernel.launch({count(columns), count(params.common.heads), count(params.common.sequences)}, kThreads, &params,
                stream_);
}

}  // namespace hylo::gated_delta_rule
