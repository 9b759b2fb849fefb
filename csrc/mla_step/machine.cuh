// PTX: the warp's matrix product.
#pragma once

#include "common/dtype.cuh"

namespace hylo::mla_step {

// D [16, 8] += A [16, 16] B [16, 8]. Lane 4 g + t has of D the rows g (its first two numbers) and g + 8, the columns
// 2 t and 2 t + 1; of A the same rows in turn, at 2 t and 2 t + 1 of the sum (its first two words) and at those plus 8;
// of B the column g at the same places of the sum.
template <class T>
__device__ __forceinline__ void multiply(float (&d)[4], const Word (&a)[4], Word b_low, Word b_high) {
#define HYLO_MMA(TYPE)                                                                                             \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                                              \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                              \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                    \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high))
  if constexpr (kIsBf16<T>) {
    HYLO_MMA("bf16");
  } else {
    HYLO_MMA("f16");
  }
#undef HYLO_MMA
}

}  // namespace hylo::mla_step
