// What csrc/common/async_copy.cuh writes in PTX, in C++: copied at once, or when it is waited for.
#pragma once

#include <string.h>

#include <vector>

namespace hylo {

struct Copy {
  void* to;
  const void* from;
  bool exists;

  void run() const { exists ? memcpy(to, from, 16) : memset(to, 0, 16); }
};
inline std::vector<Copy> copies_asked_for[1024];  // by thread

inline void copy_async(void* shared, const void* global, bool exists) {
  const Copy copy = {shared, global, exists};
  emulated_reverse ? copies_asked_for[threadIdx.x].push_back(copy) : copy.run();
}

inline void await_copies() {
  for (const Copy& copy : copies_asked_for[threadIdx.x]) copy.run();
  copies_asked_for[threadIdx.x].clear();
}

}  // namespace hylo
