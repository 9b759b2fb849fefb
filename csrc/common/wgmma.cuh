// Hopper's warpgroup matrix product: D [64, N] in registers += A [64, 16] * B [16, N], B in shared memory.
//
// A warpgroup's 128 threads hold D as its four warps' 16 rows each: thread (warp, lane) has the rows 16 warp + lane / 4
// + 8 r and the columns 8 j + 2 (lane % 4) + e, in register 4 j + 2 r + e. Two neighbouring j of that, packed to 16
// bits, are an A operand of 16 columns (`pack_operand`), so a result feeds the next product without leaving registers.
#pragma once

#include "common/dtype.cuh"

namespace hylo::wgmma {

constexpr int kTileBytes = 64 * 128;    // 64 rows of 64 16-bit numbers, 128-byte swizzle, starts at a multiple of 1024
constexpr int kGroupBytes = 8 * 128;    // eight rows of it

// Where 16 bytes of a swizzled tile lie, in bytes from its start: a row, and which of the row's eight pieces.
__device__ __forceinline__ int swizzled(int row, int piece) { return row * 128 + ((piece ^ (row & 7)) << 4); }

// Tiles whose rows run along N and columns along K; more than 64 rows are tiles one after the other.
__device__ __forceinline__ DoubleWord descriptor_k_major(Word address) {
  return (address >> 4 & 0x3fff) | DoubleWord{1} << 16 | DoubleWord{kGroupBytes >> 4} << 32 |
         DoubleWord{1} << 62;
}

// Tiles whose rows run along K and columns along N; columns beyond 64 continue `next_columns` bytes further.
__device__ __forceinline__ DoubleWord descriptor_n_major(Word address, int next_columns) {
  return (address >> 4 & 0x3fff) | static_cast<DoubleWord>(next_columns >> 4) << 16 |
         DoubleWord{kGroupBytes >> 4} << 32 | DoubleWord{1} << 62;
}

// What a descriptor grows by for the next 16 of K.
constexpr DoubleWord kNextKMajor = 32 >> 4;
constexpr DoubleWord kNextNMajor = 2 * kGroupBytes >> 4;

// Registers written before are seen by the products after it.
__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kInFlight>
__device__ __forceinline__ void wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kInFlight) : "memory");
}

// Keeps the compiler from moving uses of an accumulator across a wait, which it cannot see through.
template <int kSize>
__device__ __forceinline__ void pin(float (&d)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

template <class T>
__device__ __forceinline__ Word pack(float low, float high) {
  Word packed;
  if constexpr (kIsBf16<T>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

template <class T>
__device__ __forceinline__ void unpack(Word packed, float& low, float& high) {
  if constexpr (kIsBf16<T>) {
    low = __uint_as_float(packed << 16);
    high = __uint_as_float(packed & 0xffff0000u);
  } else {
    const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&packed));
    low = both.x;
    high = both.y;
  }
}

// Columns 16 i to 16 i + 15 of an accumulator as an A operand.
template <class T, int kSize>
__device__ __forceinline__ void pack_operand(Word (&a)[4], const float (&d)[kSize], int i) {
#pragma unroll
  for (int r = 0; r < 4; ++r) a[r] = pack<T>(d[8 * i + 2 * r], d[8 * i + 2 * r + 1]);
}

// --- the products ---
//
// `accumulate` false starts from zero. kMajor says along which dim the rows of 128 bytes run that an operand in shared
// memory is made of: that of the sum (kAlongK), or the operand's own (kAlongMN: the instruction transposes).
enum Major { kAlongK = 0, kAlongMN = 1 };

// The registers of an accumulator, in the instruction's text and among its operands.
#define HYLO_TEXT_0_7 "%0, %1, %2, %3, %4, %5, %6, %7"
#define HYLO_TEXT_8_15 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define HYLO_TEXT_0_31                                                                              \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define HYLO_TEXT_32_63                                                                                    \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, " \
  "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define HYLO_TEXT_64_127                                                                                         \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, "  \
  "%85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, "    \
  "%105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, " \
  "%123, %124, %125, %126, %127"
#define HYLO_D4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define HYLO_D16(d, i) HYLO_D4(d, i), HYLO_D4(d, i + 4), HYLO_D4(d, i + 8), HYLO_D4(d, i + 12)
#define HYLO_D8(d, i) HYLO_D4(d, i), HYLO_D4(d, i + 4)
#define HYLO_D32(d, i) HYLO_D16(d, i), HYLO_D16(d, i + 16)
#define HYLO_D64(d, i) HYLO_D32(d, i), HYLO_D32(d, i + 32)
#define HYLO_D128(d) HYLO_D64(d, 0), HYLO_D64(d, 64)

// N columns, the type, the accumulator's text and operands; then the numbers of the operands behind it.
#define HYLO_WGMMA_REGISTERS(N, TYPE, TEXT, OPERANDS, A0, A1, A2, A3, B, ACCUMULATE, MAJOR_B)                          \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %" ACCUMULATE ", 0; wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE \
               "." TYPE " {" TEXT "}, {%" A0 ", %" A1 ", %" A2 ", %" A3 "}, %" B ", p, 1, 1, %" MAJOR_B "; }"            \
               : OPERANDS                                                                                              \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)), "n"(int{kMajorB}))
#define HYLO_WGMMA_SHARED(N, TYPE, TEXT, OPERANDS, A, B, ACCUMULATE, MAJOR_A, MAJOR_B)                                  \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %" ACCUMULATE ", 0; wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE \
               "." TYPE " {" TEXT "}, %" A ", %" B ", p, 1, 1, %" MAJOR_A ", %" MAJOR_B "; }"                            \
               : OPERANDS                                                                                              \
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(int{kMajorA}), "n"(int{kMajorB}))

// A in registers (`pack_operand`), B [16, N] in shared memory; N is twice the accumulator's registers.
template <class T, Major kMajorB, int kSize>
__device__ __forceinline__ void product(float (&d)[kSize], const Word (&a)[4], DoubleWord b, bool accumulate) {
  static_assert(kSize == 8 || kSize == 16 || kSize == 32 || kSize == 64 || kSize == 128, "16 to 256 columns");
#define HYLO_PRODUCT(TYPE)                                                                                             \
  if constexpr (kSize == 8) {                                                                                          \
    HYLO_WGMMA_REGISTERS("16", TYPE, HYLO_TEXT_0_7, HYLO_D8(d, 0), "8", "9", "10", "11", "12", "13", "14");            \
  } else if constexpr (kSize == 16) {                                                                                  \
    HYLO_WGMMA_REGISTERS("32", TYPE, HYLO_TEXT_0_7 HYLO_TEXT_8_15, HYLO_D16(d, 0), "16", "17", "18", "19", "20", "21", \
                         "22");                                                                                        \
  } else if constexpr (kSize == 32) {                                                                                  \
    HYLO_WGMMA_REGISTERS("64", TYPE, HYLO_TEXT_0_31, HYLO_D32(d, 0), "32", "33", "34", "35", "36", "37", "38");        \
  } else if constexpr (kSize == 64) {                                                                                  \
    HYLO_WGMMA_REGISTERS("128", TYPE, HYLO_TEXT_0_31 HYLO_TEXT_32_63, HYLO_D64(d, 0), "64", "65", "66", "67", "68",    \
                         "69", "70");                                                                                  \
  } else {                                                                                                             \
    HYLO_WGMMA_REGISTERS("256", TYPE, HYLO_TEXT_0_31 HYLO_TEXT_32_63 HYLO_TEXT_64_127, HYLO_D128(d), "128", "129", "130", "131", "132", "133", "134");                            \
  }
  if constexpr (kIsBf16<T>) {
    HYLO_PRODUCT("bf16")
  } else {
    HYLO_PRODUCT("f16")
  }
#undef HYLO_PRODUCT
}

// A [64, 16] in shared memory as well.
template <class T, Major kMajorA, Major kMajorB, int kSize>
__device__ __forceinline__ void product_shared(float (&d)[kSize], DoubleWord a, DoubleWord b, bool accumulate) {
  static_assert(kSize == 8 || kSize == 16 || kSize == 32 || kSize == 64, "16 to 128 columns");
#define HYLO_PRODUCT(TYPE)                                                                                             \
  if constexpr (kSize == 8) {                                                                                          \
    HYLO_WGMMA_SHARED("16", TYPE, HYLO_TEXT_0_7, HYLO_D8(d, 0), "8", "9", "10", "11", "12");                           \
  } else if constexpr (kSize == 16) {                                                                                  \
    HYLO_WGMMA_SHARED("32", TYPE, HYLO_TEXT_0_7 HYLO_TEXT_8_15, HYLO_D16(d, 0), "16", "17", "18", "19", "20");         \
  } else if constexpr (kSize == 32) {                                                                                  \
    HYLO_WGMMA_SHARED("64", TYPE, HYLO_TEXT_0_31, HYLO_D32(d, 0), "32", "33", "34", "35", "36");                       \
  } else {                                                                                                             \
    HYLO_WGMMA_SHARED("128", TYPE, HYLO_TEXT_0_31 HYLO_TEXT_32_63, HYLO_D64(d, 0), "64", "65", "66", "67", "68");      \
  }
  if constexpr (kIsBf16<T>) {
    HYLO_PRODUCT("bf16")
  } else {
    HYLO_PRODUCT("f16")
  }
#undef HYLO_PRODUCT
}

#undef HYLO_WGMMA_REGISTERS
#undef HYLO_WGMMA_SHARED

}  // namespace hylo::wgmma

namespace hylo {

// A warpgroup hands registers back to its block, or takes some that others handed back. All its warps call.
template <int kEach>
__device__ __forceinline__ void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kEach));
}
template <int kEach>
__device__ __forceinline__ void claim_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kEach));
}

}  // namespace hylo
