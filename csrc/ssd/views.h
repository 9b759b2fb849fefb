// How the bindings hand shapes and tensors to the launchers of the chunked kernels.
#pragma once

#include <array>
#include <cstdint>

#include "common/scalar.h"
#include "ssd/params.h"

namespace hylo::ssd {

using Strides = std::array<std::int64_t, 4>;
using Shape = std::array<std::int64_t, 9>;       // B, T, HX, GB, G, H, V, K, N
using ScalarView = std::array<std::int64_t, 5>;  // address, ScalarType, strides of B, T, H

enum Dim { kB, kT, kHX, kGB, kG, kH, kV, kK, kN };

inline Scalar of_heads(const ScalarView& view) {
  return {reinterpret_cast<const void*>(view[0]), 0, view[4], static_cast<int>(view[1])};
}
inline TokenScalar of_tokens(const ScalarView& view) {
  return {reinterpret_cast<const void*>(view[0]), view[2], view[3], view[4], static_cast<int>(view[1])};
}

// What the parameters of both families of kernels have in common.
template <class P>
void set_shape(P& params, const Shape& shape) {
  const auto size = [&](Dim dim) { return static_cast<int>(shape[dim]); };
  params.sequences = size(kN);
  params.tokens = size(kT);
  params.heads = size(kH);
  params.x_group = size(kH) / size(kHX);
  params.b_group = size(kH) / size(kGB);
  params.c_group = size(kH) / size(kG);
  params.values = size(kV);
  params.width = size(kK);
}
template <class P>
void set_gates(P& params, const ScalarView& dt, const ScalarView& a, const ScalarView& d, const ScalarView& dt_bias,
               bool softplus, float least, float greatest) {
  params.dt = of_tokens(dt);
  params.a = of_heads(a);
  params.d = of_heads(d);
  params.dt_bias = of_heads(dt_bias);
  params.softplus = softplus;
  params.least = least;
  params.greatest = greatest;
}
template <class P>
VectorsParams vectors_params(std::uintptr_t parts, int more, const std::array<std::uintptr_t, 3>& sums,
                             const std::array<int, 3>& types, const P& of) {
  VectorsParams params{reinterpret_cast<const float*>(parts), {}, of.chunks, more, of.heads};
  for (int i = 0; i < 3; ++i) params.sums[i] = {reinterpret_cast<void*>(sums[i]), types[i]};
  return params;
}

}  // namespace hylo::ssd
