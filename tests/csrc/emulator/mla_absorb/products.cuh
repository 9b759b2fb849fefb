// csrc/mla_absorb/products.cuh, of any number of columns.
#pragma once

#include "common/wgmma.cuh"

namespace hylo::mla_absorb {

template <class T, wgmma::Major kMajorA, int kSize>
void multiply(float (&d)[kSize], DoubleWord a, DoubleWord b, bool accumulate) {
  wgmma::product_shared<T, kMajorA, wgmma::kAlongK>(d, a, b, accumulate);
}

}  // namespace hylo::mla_absorb
