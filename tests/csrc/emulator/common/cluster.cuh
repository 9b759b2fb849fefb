// What csrc/common/cluster.cuh writes in PTX, in C++: the blocks of a cluster run in turn, as the threads of one do.
#pragma once

#include "common/portable.h"

namespace hylo {

inline void cluster_arrive() { emulated_cluster_arrive(); }

inline void cluster_wait() { emulated_cluster_wait(); }

inline unsigned char* dynamic_shared() { return emulated_dynamic_shared(-1); }

class Inbox {
 public:
  void open(int numbers) { missing_ = numbers; }

  void send(float* shared, int block, float value) {
    *there(shared, block) = value;
    --there(this, block)->missing_;
  }

  void send(float* shared, int block, const float (&values)[4]) {
    for (int i = 0; i < 4; ++i) send(shared + i, block, values[i]);
  }

  void await() { emulated_await_zero(&missing_); }

 private:
  template <class T>
  static T* there(T* shared, int block) {
    const auto at = reinterpret_cast<unsigned char*>(shared) - dynamic_shared();
    return reinterpret_cast<T*>(emulated_dynamic_shared(block) + at);
  }

  DoubleWord missing_;
};

}  // namespace hylo
