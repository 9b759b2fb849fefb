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
// By thread, of whichever block: groups, the last of them still open.
inline std::vector<std::vector<Copy>> copies_asked_for[1024];

inline void copy_async(void* shared, const void* global, bool exists) {
  const Copy copy = {shared, global, exists};
  auto& groups = copies_asked_for[threadIdx.x];
  if (groups.empty()) groups.emplace_back();
  emulated_reverse ? groups.back().push_back(copy) : copy.run();
}

inline void group_copies() { copies_asked_for[threadIdx.x].emplace_back(); }

template <int kUnderWay>
void await_copies_but() {
  auto& groups = copies_asked_for[threadIdx.x];
  const int done = static_cast<int>(groups.size()) - 1 - kUnderWay;  // without the open one
  for (int i = 0; i < done; ++i) {
    for (const Copy& copy : groups[i]) copy.run();
  }
  if (done > 0) groups.erase(groups.begin(), groups.begin() + done);
}

inline void await_copies() {
  group_copies();
  await_copies_but<0>();
}

}  // namespace hylo
