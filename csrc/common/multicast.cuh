// Shared memory that blocks of a cluster fill for each other: copies that come to several of them, and a barrier that says
// to another block that this one is done with its own. Both after the cluster's barrier, and to blocks that have not
// ended.
#pragma once

#include "common/chunks.cuh"
#include "common/cluster.cuh"
#include "common/copy_engine.cuh"

namespace hylo {

// copy_box into each block whose bit is set in `blocks`, at the same place, whose barrier at the place of `done` counts
// what comes there. It may count it before it has been announced, but not before the phase ahead has ended.
__device__ __forceinline__ void copy_box_to(unsigned short blocks, void* shared, const TensorMap& map, Barrier& done,
                                            int x, int y, int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(shared_address(shared)),
      "l"(&map), "r"(done.address()), "r"(x), "r"(y), "r"(z), "r"(w), "h"(blocks)
      : "memory");
}

// One arrival for a warp, which comes as a whole, at another block's barrier, that lies where this one does. Copies that
// the other asks for after it has waited do not change what the warp loaded; but of what it stored this says nothing: to
// release that to the cluster takes as long as all that a block stored.
__device__ __forceinline__ void arrive_there(Barrier& barrier, int block) {
  __syncwarp();
  if (lane() != 0) return;
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(there(&barrier, block)) : "memory");
}

}  // namespace hylo
