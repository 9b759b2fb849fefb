// What csrc/common/fast_math.cuh writes in PTX, in C++.
#pragma once

namespace hylo {

inline float exp2_fast(float x) { return exp2f(x); }
inline float reciprocal_fast(float x) { return 1.0f / x; }

}  // namespace hylo
