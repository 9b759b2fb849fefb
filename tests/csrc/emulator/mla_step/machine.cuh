// What csrc/mla_step/machine.cuh writes in PTX, in C++: lanes ask each other for their parts of both factors.
#pragma once

#include "common/dtype.cuh"

namespace hylo::mla_step {

template <class T>
float half_of(unsigned long long words, int i) {
  const auto bits = static_cast<unsigned short>(words >> 16 * i);
  return to_float(same_bits<T>(bits));
}

template <class T>
void multiply(float (&d)[4], const Word (&a)[4], Word b_low, Word b_high) {
  const auto both = [](Word low, Word high) { return low | static_cast<unsigned long long>(high) << 32; };
  const unsigned long long upper = both(a[0], a[2]), lower = both(a[1], a[3]), b = both(b_low, b_high);
  const int group = emulated_lane() / 4, turn = emulated_lane() % 4;
  for (int t = 0; t < 4; ++t) {
    const unsigned long long rows[2] = {emulated_shuffle(upper, 4 * group + t), emulated_shuffle(lower, 4 * group + t)};
    const unsigned long long columns[2] = {emulated_shuffle(b, 4 * (2 * turn) + t),
                                           emulated_shuffle(b, 4 * (2 * turn + 1) + t)};
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < 4; ++j) d[i] += half_of<T>(rows[i / 2], j) * half_of<T>(columns[i % 2], j);
    }
  }
}

}  // namespace hylo::mla_step
