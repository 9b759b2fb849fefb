// For kernels that begin before the one ahead of them in the stream has ended (`Kernel::launch_early`). In others, nothing.
#pragma once

#include "common/portable.h"

namespace hylo {

// Returns when the kernel ahead has ended and what it wrote is there. It ended after all kernels ahead of itself, if it
// waits, too.
__device__ __forceinline__ void await_kernel_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// The next kernel may begin once all blocks have said so or ended.
__device__ __forceinline__ void start_next_kernel() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Fetches a kernel's parameters, which come from far away line by line: before the wait for the kernel ahead this takes no
// time.
template <class Params>
__device__ __forceinline__ void fetch_parameters(const Params& p) {
  const Word* const words = reinterpret_cast<const Word*>(&p);
  Word mixed = 0;
#pragma unroll
  for (unsigned i = 0; i < sizeof(Params) / sizeof(Word); i += 16) mixed ^= words[i];
  // What is not used is not read. Whichever number it is, nothing follows from it.
  asm volatile("{ .reg .pred some; setp.eq.u32 some, %0, 1; @some nanosleep.u32 0; }" ::"r"(mixed));
}

}  // namespace hylo
