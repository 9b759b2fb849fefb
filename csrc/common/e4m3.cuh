// Numbers of one byte: e4m3, whose bits are those of FlashMLA's caches and of torch.float8_e4m3fn.
#pragma once

#include <cuda_fp16.h>

#include "common/portable.h"

namespace hylo {

// Four of them, the lowest byte first; exact.
__device__ __forceinline__ void unpack_e4m3(Word packed, float (&numbers)[4]) {
  Word halves[2];
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; "
      "cvt.rn.f16x2.e4m3x2 %0, low; cvt.rn.f16x2.e4m3x2 %1, high; }"
      : "=r"(halves[0]), "=r"(halves[1])
      : "r"(packed));
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&halves[i]));
    numbers[2 * i] = both.x;
    numbers[2 * i + 1] = both.y;
  }
}

}  // namespace hylo
