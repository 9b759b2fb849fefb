// How the bindings hand shapes and tensors to the launchers of the chunked kernels.
#pragma once

#include <array>
#include <cstdint>

#include "common/scalar.h"

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

}  // namespace hylo::ssd
