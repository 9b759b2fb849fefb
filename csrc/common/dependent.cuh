// For kernels that begin before the one ahead of them in the stream has ended (`Kernel::launch_early`). In others, nothing.
#pragma once

namespace hylo {

// Returns when the kernel ahead has ended and what it wrote is there. It ended after all kernels ahead of itself, if it
// waits, too.
__device__ __forceinline__ void await_kernel_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// The next kernel may begin once all blocks have said so or ended.
__device__ __forceinline__ void start_next_kernel() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

}  // namespace hylo
