// What csrc/common/dependent.cuh writes in PTX: kernels run one after the other here.
#pragma once

namespace hylo {

inline void await_kernel_before() {}
inline void start_next_kernel() {}
template <class Params>
void fetch_parameters(const Params&) {}

}  // namespace hylo
