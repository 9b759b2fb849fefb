// The chunked kernels' launchers, that the bindings expose.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "common/driver.h"
#include "gated_delta_rule/params.h"
#include "gated_delta_rule/traits.cuh"

namespace hylo::gated_delta_rule {

using Strides = std::array<std::int64_t, 4>;

// Dynamic shared memory, in bytes, of a kernel ("cuts", "inverse", "o", "solving_o", "states", "solving_states",
// "dstates", "gradients") at a key width, with so many chains a block.
int chunk_shared_bytes(const std::string& kernel, int width, int chains);

// Parts of the gates' gradients, whose sums are meant.
int chunk_gradients_parts(int width);

// Which part of a pass one launch does.
struct Share {
  // takes: "all", "cuttable" or "uncuttable". pieces: that a sequence is cut into. makers: blocks of each head that
  // make the records of what is not cut; where there are none, and nothing is solved, the records are made before.
  // Throws std::invalid_argument.
  Share(bool solving, const std::string& takes, int pieces, int makers);

  bool solving;
  Takes takes;
  int pieces, makers;
};

// One call of the op, launch by launch: what all of its kernels share is said once. Pointers are of the tensors in
// params.h and gradients_params.h, 0 stands for an absent one; all launches are asynchronous, on the caller's stream.
class ChunkCall {
 public:
  // shape: B, T, G, H, K, V, N. chunks: records there is room for. ready: for shares with makers, zeros unless _cuts
  // clears it. segments: that a sequence may be cut into, with cuts for more than one. Strides in elements, of the dims
  // B, T, heads, width; the last is 1, the others are multiples of 8 (where a dim has more than one entry). width:
  // HYLO_K of the kernels, at least K.
  ChunkCall(std::uintptr_t q, std::uintptr_t k, std::uintptr_t g, std::uintptr_t beta, std::uintptr_t cu_seqlens,
            std::uintptr_t records, std::uintptr_t ready, std::uintptr_t cuts, const std::array<std::int64_t, 7>& shape,
            const Strides& q_strides, const Strides& k_strides, int width, int chunks, int segments, float scale,
            float negligible, std::uintptr_t stream);

  // Where each segment's pass has to start, and `ready` cleared; nothing is launched where there is one segment.
  void cuts(const Kernel& kernel) const;

  // The records that a share reads and does not make.
  void inverse(const Kernel& kernel, int multiprocessors, const Share& share) const;

  // o and the final state out of v and the initial state.
  void outputs(const Kernel& kernel, const Share& share, std::uintptr_t v, const Strides& v_strides,
               std::uintptr_t initial_state, std::uintptr_t o, std::uintptr_t final_state) const;

  // The states before every chunk, [chunks, H, K, V], what each token writes, [B, T, H, V], and the records where the
  // share makes them.
  void states(const Kernel& kernel, const Share& share, std::uintptr_t v, const Strides& v_strides,
              std::uintptr_t initial_state, std::uintptr_t states, std::uintptr_t written) const;

  // The gradients of the states after every chunk, of what each token's write was solved from, and of the initial
  // state. d_o is contiguous.
  void dstates(const Kernel& kernel, int chains, std::uintptr_t d_o, std::uintptr_t d_final_state,
               std::uintptr_t dstates, std::uintptr_t dx, std::uintptr_t d_initial_state) const;

  // Everything of the backward that needs no walk from chunk to chunk. dg and dbeta have chunk_gradients_parts(width)
  // parts, all written but for tokens of no sequence.
  void gradients(const Kernel& kernel, int multiprocessors, std::uintptr_t v, const Strides& v_strides,
                 std::uintptr_t d_o, std::uintptr_t states, std::uintptr_t dstates, std::uintptr_t written,
                 std::uintptr_t dx, std::uintptr_t dq, std::uintptr_t dk, std::uintptr_t dv, std::uintptr_t dg,
                 std::uintptr_t dbeta) const;

 private:
  void launch(const Kernel& kernel, Pass pass, int chains, const Share& share, Params& params) const;
  TensorMap tokens_map(std::uintptr_t tensor, std::int64_t heads, std::int64_t width, const Strides& strides) const;
  TensorMap values_map(std::uintptr_t tensor) const;
  TensorMap states_map(std::uintptr_t tensor, int rows) const;

  Params params_{};
  std::int64_t batch_, tokens_, key_heads_, heads_, keys_, values_, sequences_;
  int width_, chunks_;
  int* ready_;
  void* stream_;
};

}  // namespace hylo::gated_delta_rule
