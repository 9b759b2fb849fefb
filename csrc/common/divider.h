// Division by a number that the host knows, as a multiplication; right where numerator times divisor is below 2^32.
#pragma once

#include "common/portable.h"

namespace hylo {

struct Divider {
  Word multiplier;  // of the numerator, the product's upper half counts; 0: the divisor is one
};

HYLO_HOST_DEVICE constexpr Divider divider(Word by) {
  return {by == 1 ? 0 : static_cast<Word>(((DoubleWord{1} << 32) + by - 1) / by)};
}

}  // namespace hylo
