// From what each piece of a sequence adds to the state alone to what it begins with, in place; and where a sequence ends.
// Back, the same of the gradients of the states.
#pragma once

#include "common/chunks.cuh"
#include "common/dependent.cuh"
#include "ssd/params.h"
#include "ssd/traits.cuh"

namespace hylo::ssd {

constexpr int kAhead = 8;  // pieces

// Through `pieces` of a sequence: each adds `*place(i)` to the state, which decays by `decay(i)` in it, and is left what
// it begins with.
template <class Place, class Decay>
__device__ __forceinline__ void carry_on(float4& state, int pieces, const Place& place, const Decay& decay) {
  for (int first = 0; first < pieces; first += kAhead) {
    float4 added[kAhead];
    float decays[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i >= pieces) break;
      added[i] = *place(first + i);
      decays[i] = decay(first + i);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i >= pieces) break;
      *place(first + i) = state;
      state.x = decays[i] * state.x + added[i].x;
      state.y = decays[i] * state.y + added[i].y;
      state.z = decays[i] * state.z + added[i].z;
      state.w = decays[i] * state.w + added[i].w;
    }
  }
}

// A thread for four neighbours of a head's state; blocks along those, heads, and sequences of a direction.
__device__ __forceinline__ void carry(const Params& p) {
  const int size = p.values * p.width, element = kCarryEach * (blockIdx.x * kCarryThreads + threadIdx.x);
  start_next_kernel();
  await_kernel_before();
  if (element >= size) return;
  const int head = blockIdx.y, sequence = blockIdx.z % p.sequences;
  const bool back = static_cast<int>(blockIdx.z) / p.sequences + p.first_direction == kBack;
  const float* given = back ? p.last_gradient : p.first_state;
  float4 state = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (given != nullptr) {
    state = *reinterpret_cast<const float4*>(given + (static_cast<long long>(sequence) * p.heads + head) * size + element);
  }
  const auto piece = [&](int i) {
    return (static_cast<long long>(sequence) * p.pieces + (back ? p.pieces - 1 - i : i)) * p.heads + head;
  };
  float* const ends = p.ends[back] + element;
  const float* const totals = p.totals[back];
  carry_on(
      state, p.pieces, [&](int i) { return reinterpret_cast<float4*>(ends + piece(i) * size); },
      [&](int i) { return totals[piece(i)]; });
}

}  // namespace hylo::ssd
