// From what each chunk adds to the state alone to the state before it, in place, and where a sequence ends. Back, from
// what each adds to the gradient of the state to that of the state behind it.
#pragma once

#include "ssd/carry.cuh"
#include "ssd/plain_gates.cuh"
#include "ssd/plain_tokens.cuh"

namespace hylo::ssd::plain {

// A thread for four neighbours of a head's state in one sequence, which `block` counts along.
__device__ __forceinline__ void carry_chunks(const Params& p, int sequence_index, int block, int head,
                                             Direction direction) {
  const int size = p.values * p.width, element = kCarryEach * (block * kCarryThreads + threadIdx.x);
  const int first = first_chunk(p, sequence_index);  // by whole warps, as the next one
  const int chunks = chunks_of(sequence_at(p, sequence_index).tokens);
  if (element >= size) return;
  const long long own = (static_cast<long long>(sequence_index) * p.heads + head) * size + element;
  float4 state = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (p.given[direction] != nullptr) state = *reinterpret_cast<const float4*>(p.given[direction] + own);
  const auto chunk = [&](int i) { return first + (direction == kBack ? chunks - 1 - i : i); };
  carry_on(
      state, chunks,
      [&](int i) { return reinterpret_cast<float4*>(p.states[direction] + state_at(p, chunk(i), head) + element); },
      [&](int i) { return factors_of(p, chunk(i), head).whole(); });
  if (p.left[direction] != nullptr) *reinterpret_cast<float4*>(p.left[direction] + own) = state;
}

}  // namespace hylo::ssd::plain
