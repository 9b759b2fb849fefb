// What csrc/common/multicast.cuh writes in PTX, in C++.
#pragma once

#include "common/cluster.cuh"
#include "common/copy_engine.cuh"

namespace hylo {

inline void copy_box_to(unsigned short blocks, void* shared, const TensorMap& map, Barrier& done, int x, int y, int z,
                        int w) {
  for (int block = 0; blocks >> block != 0; ++block) {
    if ((blocks >> block & 1) == 0) continue;
    Barrier& there = *emulated_there(&done, block);
    emulated_fetch_box(emulated_dynamic_shared(block), shared_address(shared), map, there, x, y, z, w);
  }
}

inline void arrive_there(Barrier& barrier, int block) {
  __syncwarp();
  if (emulated_lane() == 0) emulated_there(&barrier, block)->arrive();
}

}  // namespace hylo
