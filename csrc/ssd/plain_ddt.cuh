// From the sums that dx and dc leave to the gradients of dt, and a chunk's parts of those of a, d and dt_bias.
#pragma once

#include "ssd/plain_gates.cuh"

namespace hylo::ssd::plain {

// A chunk and head, by a warp: two tokens a lane. A gate decays what later tokens read of earlier ones and of the
// state, and what earlier ones add to the next state.
__device__ __forceinline__ void finish_gates(const Params& p, int index, int head) {
  const Chunk chunk = chunk_at(p, index);
  if (chunk.tokens <= 0) return;
  const int of_values = slices(p.values), token = 2 * lane();
  const long long own = static_cast<long long>(index) * p.heads + head;
  const float* const sums = p.sums + own * sum_rows(p.values, p.width) * kChunk + token;
  const auto total = [&](int first, int count, int apart) {
    float2 sum = make_float2(0.0f, 0.0f);
    for (int i = 0; i < count; ++i) {
      const float2 more = *reinterpret_cast<const float2*>(sums + (first + i * apart) * kChunk);
      sum.x += more.x, sum.y += more.y;
    }
    return sum;
  };
  const float2 pairs = total(kPairs, of_values, kSums), at_end = total(kAtEnd, of_values, kSums);
  const float2 direct = total(kDirect, of_values, kSums), skipped = total(kSkipped, of_values, kSums);
  const float2 read = total(kSums * of_values, slices(p.width), 1);
  float later = read.x + read.y, earlier = at_end.x + at_end.y;  // sums from here on, and up to here
#pragma unroll
  for (int away = 1; away < 32; away *= 2) {
    const float more_later = __shfl_down_sync(kAllLanes, later, away);
    const float more_earlier = __shfl_up_sync(kAllLanes, earlier, away);
    if (lane() + away < 32) later += more_later;
    if (lane() >= away) earlier += more_earlier;
  }
  float behind = __shfl_down_sync(kAllLanes, later, 1), before = __shfl_up_sync(kAllLanes, earlier, 1);
  if (lane() == 31) behind = 0.0f;
  if (lane() == 0) before = 0.0f;
  const float2 gate = make_float2(pairs.x + later + before, pairs.y + (read.y + behind) + (before + at_end.x));

  const Factors factors = factors_of(p, index, head);
  const float rate = number_of_head(p.a, head);
  const float2 ddt = make_float2(factors.at(kSlope, token) * (direct.x + rate * gate.x),
                                 factors.at(kSlope, token + 1) * (direct.y + rate * gate.y));
  for (int i = 0; i < 2; ++i) {
    if (token + i >= chunk.tokens) continue;
    const long long row = static_cast<long long>(chunk.batch) * p.tokens + chunk.begin + token + i;
    store_scalar(p.dt.type, p.ddt, row * p.heads + head, i == 0 ? ddt.x : ddt.y);
  }
  const float of_head[kHeadParts] = {skipped.x + skipped.y, ddt.x + ddt.y,
                                     factors.at(kStep, token) * gate.x + factors.at(kStep, token + 1) * gate.y};
  for (int which = 0; which < kHeadParts; ++which) {
    float sum = of_head[which];
#pragma unroll
    for (int away = 16; away > 0; away /= 2) sum += __shfl_xor_sync(kAllLanes, sum, away);
    if (lane() == 0) p.parts[(static_cast<long long>(which) * p.chunks) * p.heads + own] = sum;
  }
}

}  // namespace hylo::ssd::plain
