// The chunked kernels' launchers, that the bindings expose.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "common/driver.h"
#include "ssd/params.h"
#include "ssd/traits.cuh"
#include "ssd/views.h"

namespace hylo::ssd {

// Dynamic shared memory, in bytes, of a kernel ("ends", "mix", "mixed_ends", "carry", "o", "states", "vectors") at a
// shape, compiled for a width.
int chunk_shared_bytes(const std::string& kernel, int width, const Shape& shape);
int gradients_shared_bytes(int values, int width, const Shape& shape);

// Parts that a shape's heads come in at most, of the backward.
int most_windows(const Shape& shape);

// A convolution with silu that makes x, b and c: addresses of its inputs, [B, T, D], of what it makes, contiguous, and of its
// last inputs, [B, D, taps]; weight [D, taps], contiguous; bias [D] or none. There are as many heads of x as of dt, and no
// cu_seqlens. All this is there when the kernel ahead in the stream has ended.
struct Mixed {
  std::uintptr_t raw, mixed, last_inputs;
  std::int64_t stride_b, stride_t, channels;  // strides of the inputs, in elements
  ScalarView weight, bias;
  int taps;
};

// One call of the op, launch by launch: what all of its kernels share is said once. Pointers are of the tensors in
// params.h, 0 stands for an absent one; all launches are asynchronous, on the caller's stream.
class ChunkCall {
 public:
  // chunks: of all sequences, or a bound. pieces: that a sequence is cut into; merged, a divisor: of them one after the
  // other that a block of `states` walks. ends, totals: for each direction that is wanted, room for what pieces begin with
  // and for their decays, where there are more than one. Strides in elements, of the dims B, T, heads, width; the last is
  // 1, the others are multiples of 8 (where a dim has more than one entry). width: HYLO_K of the kernels, at least K.
  ChunkCall(const std::array<std::uintptr_t, 3>& x_b_c, const std::array<Strides, 3>& strides, const ScalarView& dt,
            const ScalarView& a, const ScalarView& d, const ScalarView& dt_bias, std::uintptr_t cu_seqlens,
            std::uintptr_t initial_state, const Shape& shape, int width, int chunks, int pieces, int merged,
            const std::array<std::uintptr_t, 2>& ends, const std::array<std::uintptr_t, 2>& totals, bool softplus,
            float least, float greatest, std::uintptr_t stream);

  // Of the backward: the gradients of o, contiguous, and of the final state.
  void set_gradients(std::uintptr_t d_o, std::uintptr_t d_final_state);

  // Each launch may begin before the kernel ahead of it in the stream has ended; those of a call follow each other.

  // What each piece begins with, forth, back or both; nothing is launched where there is one piece.
  void begin(const Kernel& ends, const Kernel& carry, bool forth, bool back) const;

  // b and c, and the last inputs of all channels.
  void mix(const Kernel& mix, const Mixed& of) const;

  // Right after it: x, and what each piece begins with forth.
  void begin_mixed(const Kernel& ends, const Kernel& carry, const Mixed& of);

  // o and the final state.
  void outputs(const Kernel& kernel, std::uintptr_t o, std::uintptr_t final_state) const;

  // The backward may go through the heads in windows, one after the other, so that not all states are there at once: at
  // most most_windows(). The heads of the largest.
  int window_heads(int windows) const;

  // Rows of [H] that `states` leaves: parts of the gradient of a.
  int owed_rows() const;

  // Of a window the states before every chunk, the gradients of those after it, [chunks, its heads, V, K]; the gradient of
  // the initial state; and owed_rows() behind the parts that `gradients` leaves.
  void states(const Kernel& kernel, int index, int windows, std::uintptr_t states, std::uintptr_t dstates,
              std::uintptr_t d_initial_state, std::uintptr_t parts) const;

  // Everything else of the window: the gradients of x, b and c (strides as of those, heads side by side) and of dt, and
  // parts of those of d, dt_bias and a, [3, chunks, H], whose sums over the chunks are meant and which are left as they
  // are where a slot has no chunk.
  // values: HYLO_V of the kernel. sums_so_far: room for 2 * chunks * 64 * width fp32, where there are more windows than
  // one and all heads share b or c.
  void gradients(const Kernel& kernel, int values, int index, int windows, std::uintptr_t states, std::uintptr_t dstates,
                 const std::array<std::uintptr_t, 4>& dx_db_dc_ddt, const std::array<Strides, 3>& strides,
                 std::uintptr_t parts, std::uintptr_t sums_so_far, int most_blocks) const;

  // Sums all of those up, into the gradients of d, dt_bias and a: addresses, 0 where not wanted, and types.
  void vectors(const Kernel& kernel, std::uintptr_t parts, const std::array<std::uintptr_t, 3>& sums,
               const std::array<int, 3>& types) const;

 private:
  Window window(int index, int windows) const;
  void launch(Pass pass, const Kernel& kernel, int directions, bool back, PassParams params) const;
  Mixing mixing(const Mixed& of, std::int64_t first, std::int64_t heads, std::int64_t width) const;
  void carry_on(const Kernel& carry, int directions, const Params& params) const;
  TensorMap tokens_map(std::uintptr_t tensor, std::int64_t heads, std::int64_t width, const Strides& strides,
                       int tokens = kChunk) const;
  TensorMap values_map(std::uintptr_t tensor) const;
  TensorMap states_map(std::uintptr_t tensor, std::int64_t heads) const;

  Params params_{};
  Shape shape_;
  int width_, merged_;
  std::int64_t chunks_;
  void* stream_;
};

}  // namespace hylo::ssd
