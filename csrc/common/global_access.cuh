// PTX for global memory: 16 bytes at once, which as intrinsics or plain C++ the compiler splits into words in places,
// and a hint.
#pragma once

#include "common/portable.h"

namespace hylo {

struct alignas(16) Words {
  Word at[4];
};

// What is read once need not push anything else out of the first cache.
__device__ __forceinline__ Words load_words(const void* address) {
  Words words;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.at[0]), "=r"(words.at[1]), "=r"(words.at[2]), "=r"(words.at[3])
               : "l"(address));
  return words;
}

__device__ __forceinline__ void store_words(void* address, const Words& words) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(words.at[0]), "r"(words.at[1]),
               "r"(words.at[2]), "r"(words.at[3]));
}

// Has the line of an address come as far as the second cache. What other kernels write is seen there at once, so this
// may be said before they have ended.
__device__ __forceinline__ void prefetch(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// A number as it is now, past the first cache: one that is still being written, and that will be read again.
__device__ __forceinline__ int load_so_far(const int* address) {
  int value;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(address));
  return value;
}
__device__ __forceinline__ long long load_so_far(const long long* address) {
  long long value;
  asm volatile("ld.relaxed.gpu.global.s64 %0, [%1];" : "=l"(value) : "l"(address));
  return value;
}

// Makes the compiler take these words for new ones. It would keep what it once unpacked of them: twice the registers.
__device__ __forceinline__ void forget_uses(Words& words) {
  asm volatile("" : "+r"(words.at[0]), "+r"(words.at[1]), "+r"(words.at[2]), "+r"(words.at[3]));
}

}  // namespace hylo
