// The device's part of division as multiplication.
#pragma once

#include "common/divider.h"

namespace hylo {

__device__ __forceinline__ int operator/(int number, const Divider& by) {
  return by.multiplier == 0 ? number : static_cast<int>(__umulhi(number, by.multiplier));
}

}  // namespace hylo
