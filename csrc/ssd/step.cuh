// State-space duality, one token: a head's state is read once, updated in registers and written once. A translation
// unit of its own: the build passes HYLO_T (type of x, b, c and o), HYLO_S (of the state), HYLO_K, HYLO_TEAM (threads
// of a block) and HYLO_ROWS (of a thread).

#include "common/dependent.cuh"
#include "ssd/step_rows.cuh"

namespace hylo::ssd {

template <class T, class S, int kK, int kTeam, int kRows>
__device__ __forceinline__ void step(const StepParams& p) {
  using Rows = StateRows<S, kK, kRows>;
  constexpr int kGroups = kTeam / Rows::kLanes;
  const int head = blockIdx.y, first = (blockIdx.x * kGroups + threadIdx.x / Rows::kLanes) * kRows;
  const long long batch = blockIdx.z;
  const bool inside = first < p.values;  // all of a thread's rows are, or none
  const int row = inside ? first : 0;
  const Rows rows(threadIdx.x % Rows::kLanes);

  const long long pooled = read_index(p.indices.data, p.indices.stride, p.indices.wide, batch);
  T* o = static_cast<T*>(p.o) + (batch * gridDim.y + head) * p.values + row + rows.summed_row();
  const bool writes_o = inside && rows.stores_sums();
  if (pooled < 0) {  // padding
    const float zeros[Rows::kLeft] = {};
    if (writes_o) store(o, zeros);
    return;
  }

  S* state = static_cast<S*>(p.state) + pooled * p.state_b + head * p.state_h + static_cast<long long>(row) * kK;
  Words r_state[kRows][Rows::kPieces];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int piece = 0; piece < Rows::kPieces; ++piece) {
      r_state[i][piece] = {};
      if (inside && rows.exists(piece)) r_state[i][piece] = load_words(state + i * kK + rows.column(piece));
    }
  }
  T r_x[kRows];
  typename Rows::Vectors r_b, r_c;
  read(r_x, static_cast<const T*>(p.x) + batch * p.x_b + head / p.x_group * p.x_h + row);
  rows.read_vector(r_b, static_cast<const T*>(p.b) + batch * p.b_b + head / p.b_group * p.b_h);
  rows.read_vector(r_c, static_cast<const T*>(p.c) + batch * p.c_b + head / p.c_group * p.c_h);
  const Step now = make_step(p.gates, load_step(p.gates, batch, head));
  float sums[kRows], r_o[Rows::kLeft];
  rows.update(
      state, inside, now, [&](int i, int piece) { return r_state[i][piece]; },
      [&](int i) { return to_float(r_x[i]); }, r_b, r_c, sums);
  rows.sum(sums, r_o);
  if (writes_o) store(o, r_o);
}

}  // namespace hylo::ssd

extern "C" __global__ void __launch_bounds__(HYLO_TEAM)
    ssd_fwd_kernel_step(const __grid_constant__ hylo::ssd::StepParams p) {
  hylo::start_next_kernel();
  hylo::fetch_parameters(p);
  hylo::await_kernel_before();
  hylo::ssd::step<hylo::HYLO_T, hylo::HYLO_S, HYLO_K, HYLO_TEAM, HYLO_ROWS>(p);
}
