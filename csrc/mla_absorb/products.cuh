// Products of a tile of the cache with few columns: query rows, from 8 on.
#pragma once

#include "common/wgmma.cuh"

namespace hylo::mla_absorb {

#define HYLO_TEXT_0_3 "%0, %1, %2, %3"
#define HYLO_TEXT_0_11 HYLO_TEXT_0_7 ", %8, %9, %10, %11"
#define HYLO_TEXT_0_23 HYLO_TEXT_0_7 HYLO_TEXT_8_15 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define HYLO_D12 HYLO_D8(d, 0), HYLO_D4(d, 8)
#define HYLO_D24 HYLO_D16(d, 0), HYLO_D8(d, 16)
#define HYLO_WGMMA(N, TYPE, TEXT, OPERANDS, A, B, ACCUMULATE, MAJOR_A)                                                  \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %" ACCUMULATE ", 0; wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE \
               "." TYPE " {" TEXT "}, %" A ", %" B ", p, 1, 1, %" MAJOR_A ", 0; }"                                      \
               : OPERANDS                                                                                              \
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(int{kMajorA}))

// wgmma::product_shared, also for 8, 24 and 48 columns; the rows of B run along the dim of the sum.
template <class T, wgmma::Major kMajorA, int kSize>
__device__ __forceinline__ void multiply(float (&d)[kSize], DoubleWord a, DoubleWord b, bool accumulate) {
  if constexpr (kSize == 8 || kSize == 16 || kSize == 32) {
    wgmma::product_shared<T, kMajorA, wgmma::kAlongK>(d, a, b, accumulate);
  } else {
    static_assert(kSize == 4 || kSize == 12 || kSize == 24, "8 to 64 columns, of those that kernels are made for");
#define HYLO_PRODUCT(TYPE)                                                                         \
  if constexpr (kSize == 4) {                                                                      \
    HYLO_WGMMA("8", TYPE, HYLO_TEXT_0_3, HYLO_D4(d, 0), "4", "5", "6", "7");                          \
  } else if constexpr (kSize == 12) {                                                              \
    HYLO_WGMMA("24", TYPE, HYLO_TEXT_0_11, HYLO_D12, "12", "13", "14", "15");                   \
  } else {                                                                                         \
    HYLO_WGMMA("48", TYPE, HYLO_TEXT_0_23, HYLO_D24, "24", "25", "26", "27");                      \
  }
    if constexpr (kIsBf16<T>) {
      HYLO_PRODUCT("bf16")
    } else {
      HYLO_PRODUCT("f16")
    }
#undef HYLO_PRODUCT
  }
}

#undef HYLO_TEXT_0_3
#undef HYLO_TEXT_0_11
#undef HYLO_TEXT_0_23
#undef HYLO_D12
#undef HYLO_D24
#undef HYLO_WGMMA

}  // namespace hylo::mla_absorb
