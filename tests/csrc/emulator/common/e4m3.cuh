// What csrc/common/e4m3.cuh writes in PTX, in C++.
#pragma once

#include "common/portable.h"

namespace hylo {

inline float emulated_e4m3(unsigned byte) {
  const int exponent = byte >> 3 & 15, mantissa = byte & 7;
  const float size = exponent == 0 ? ldexpf(mantissa, -9) : ldexpf(8 + mantissa, exponent - 10);
  const float number = (byte & 0x7f) == 0x7f ? NAN : size;
  return byte & 0x80 ? -number : number;
}

inline void unpack_e4m3(Word packed, float (&numbers)[4]) {
  for (int i = 0; i < 4; ++i) numbers[i] = emulated_e4m3(packed >> 8 * i & 0xff);
}

}  // namespace hylo
