// Copies from global to shared memory that run beside the threads that ask for them.
#pragma once

#include "common/portable.h"

namespace hylo {

// 16 bytes, both addresses multiples of 16; zeros where nothing exists, and then nothing is read.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool exists) {
  const Word to = static_cast<Word>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(exists ? 16 : 0) : "memory");
}

// All that this thread asked for.
__device__ __forceinline__ void await_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// What a thread asked for since the last time is a group, if only of nothing. All but its last kUnderWay are waited for.
__device__ __forceinline__ void group_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kUnderWay>
__device__ __forceinline__ void await_copies_but() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kUnderWay) : "memory");
}

}  // namespace hylo
