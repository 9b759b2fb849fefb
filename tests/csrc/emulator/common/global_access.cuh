// What csrc/common/global_access.cuh writes in PTX, in C++.
#pragma once

#include "common/portable.h"

namespace hylo {

struct alignas(16) Words {
  Word at[4];
};

inline Words load_words(const void* address) {
  return *static_cast<const Words*>(address);
}

inline void store_words(void* address, const Words& words) {
  *static_cast<Words*>(address) = words;
}

inline void forget_uses(Words&) {}
inline void prefetch(const void*) {}
// In one of the two orders the kernel before has yet to write.
template <class Number>
Number load_so_far(const Number* address) {
  return emulated_reverse ? *address / 2 + 1 : *address;
}

}  // namespace hylo
