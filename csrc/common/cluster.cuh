// PTX of thread block clusters: a barrier of all their blocks, and stores into each other's shared memory. A launch
// without clusters has clusters of one block.
#pragma once

#include "common/copy_engine.cuh"
#include "common/portable.h"

namespace hylo {

// A barrier in two halves. All threads of all blocks of a cluster come, each warp as a whole, later on wait, and may
// come again. What they loaded before they came is not changed by what is stored after the wait; but stores before it
// may still be on their way, since to have them arrive takes as long as all that a block stored.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// The address, in another block of the cluster, of what lies at `shared` here.
__device__ __forceinline__ Word there(const void* shared, int block) {
  Word mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(shared_address(shared)), "r"(block));
  return mapped;
}

// Numbers that the blocks of a cluster, itself included, put into a block's shared memory. It lies there too, at the
// same place in each.
class Inbox {
 public:
  // For so many numbers. One thread opens it and comes to the cluster's barrier; all others meet this one, too.
  __device__ __forceinline__ void open(int numbers) {
    const int bytes = numbers * static_cast<int>(sizeof(float));
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&bits_)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&bits_)), "r"(bytes)
                 : "memory");
  }

  // Into the place of `shared` in another block, after the cluster's barrier.
  __device__ __forceinline__ void send(float* shared, int block, float value) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
                     there(shared, block)),
                 "r"(__float_as_uint(value)), "r"(there(&bits_, block))
                 : "memory");
  }

  // The same of four neighbours, at a multiple of 16 bytes. What a send takes is one message, whatever it brings.
  __device__ __forceinline__ void send(float* shared, int block, const float (&values)[4]) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
            there(shared, block)),
        "r"(__float_as_uint(values[0])), "r"(__float_as_uint(values[1])), "r"(__float_as_uint(values[2])),
        "r"(__float_as_uint(values[3])), "r"(there(&bits_, block))
        : "memory");
  }

  // Until all have come.
  __device__ __forceinline__ void await() {
    asm volatile(
        "{ .reg .pred done; "
        "again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0; "
        "@!done bra again; }" ::"r"(shared_address(&bits_))
        : "memory");
  }

 private:
  DoubleWord bits_;
};

// The shared memory that a launch asks for, of this block.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char dynamic_shared_bytes[];
  return dynamic_shared_bytes;
}

}  // namespace hylo
