// What csrc/common/cluster.cuh writes in PTX, in C++: the blocks of a cluster run in turn, as the threads of one do.
#pragma once

#include "common/portable.h"

namespace hylo {

inline void cluster_arrive() { emulated_cluster_arrive(); }

inline void cluster_wait() { emulated_cluster_wait(); }

inline unsigned char* dynamic_shared() { return emulated_dynamic_shared(-1); }

// What lies in another block where `here` does in this one.
template <class T>
T* emulated_there(T* here, int block) {
  const auto at = reinterpret_cast<unsigned char*>(here) - dynamic_shared();
  return reinterpret_cast<T*>(emulated_dynamic_shared(block) + at);
}

class Inbox {
 public:
  void open(int numbers) { missing_ = numbers; }

  void send(float* shared, int block, float value) {
    *emulated_there(shared, block) = value;
    --emulated_there(this, block)->missing_;
  }

  void send(float* shared, int block, const float (&values)[4]) {
    for (int i = 0; i < 4; ++i) send(shared + i, block, values[i]);
  }

  void await() { emulated_await_zero(&missing_); }

 private:
  DoubleWord missing_;
};

}  // namespace hylo
