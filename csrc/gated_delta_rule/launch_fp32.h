// The launchers of the chunked kernels for fp32, that the bindings expose.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "common/driver.h"
#include "gated_delta_rule/fp32_params.h"

namespace hylo::gated_delta_rule {

// Dynamic shared memory, in bytes, of a kernel ("inverse", "o", "states", "dstates", "dscores", "dqk") at a key width.
int fp32_shared_bytes(const std::string& kernel, int width);

// One call of the op in fp32, launch by launch: what all of its kernels share is said once. Pointers are of the tensors
// in fp32_params.h, 0 stands for an absent one; all launches are asynchronous, on the caller's stream.
class Fp32Call {
 public:
  // shape: B, T, G, H, K, V, N. chunks: records there is room for. Strides of q, k and v in elements, of the dims B, T,
  // heads, width; the last is 1, the others are multiples of 4 (where a dim has more than one entry).
  Fp32Call(const std::array<std::uintptr_t, 3>& qkv, std::uintptr_t g, std::uintptr_t beta, std::uintptr_t cu_seqlens,
           std::uintptr_t records, const std::array<std::int64_t, 7>& shape,
           const std::array<std::array<std::int64_t, 4>, 3>& strides, int chunks, float scale, std::uintptr_t stream);

  // The records of all chunks and heads.
  void inverse(const Kernel& kernel) const;

  // o and the final state.
  void outputs(const Kernel& kernel, std::uintptr_t initial_state, std::uintptr_t o, std::uintptr_t final_state) const;

  // What the launches of the backward share: the gradient of o, and what the passes leave to those behind them.
  void share(std::uintptr_t d_o, std::uintptr_t states, std::uintptr_t dstates, std::uintptr_t written,
             std::uintptr_t dx, std::uintptr_t d_scores, std::uintptr_t d_solve);

  void states(const Kernel& kernel, std::uintptr_t initial_state) const;
  void dstates(const Kernel& kernel, std::uintptr_t d_final_state, std::uintptr_t d_initial_state) const;

  // dv and the first part of dg and dbeta; the gradients of the products within chunks. Then dq, dk and the other
  // parts, one for each 64 columns of K. All are written but for tokens of no sequence.
  void dscores(const Kernel& kernel, std::uintptr_t dv, std::uintptr_t dg, std::uintptr_t dbeta) const;
  void dqk(const Kernel& kernel, std::uintptr_t dq, std::uintptr_t dk, std::uintptr_t dg, std::uintptr_t dbeta) const;

 private:
  using Params = fp32_chunk::Params;
  void pass(const Kernel& kernel, Params& params, std::uintptr_t first_state, std::uintptr_t last_state) const;

  Params params_{};
  std::int64_t key_heads_;
  void* stream_;
};

}  // namespace hylo::gated_delta_rule
