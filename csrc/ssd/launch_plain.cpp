#include "ssd/launch_plain.h"

#include <stdexcept>

#include "ssd/gradients_traits.cuh"
#include "ssd/plain_traits.cuh"

namespace hylo::ssd::plain {
namespace {

unsigned count(std::int64_t n) { return static_cast<unsigned>(n); }
std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
float* floats(std::uintptr_t tensor) { return reinterpret_cast<float*>(tensor); }

Rows rows(std::uintptr_t tensor, const Strides& strides) {
  return {reinterpret_cast<const void*>(tensor), {strides[0], strides[1], strides[2]}};
}

}  // namespace

int shared_bytes(const std::string& kernel) {
  if (kernel == "ends") return ends_shared();
  if (kernel == "o") return collect_shared(kO);
  if (kernel == "dx") return collect_shared(kDX);
  if (kernel == "db") return collect_shared(kDB);
  if (kernel == "dc") return collect_shared(kDC);
  if (kernel == "factors" || kernel == "carry" || kernel == "ddt" || kernel == "vectors") return 0;
  throw std::invalid_argument("there is no plain kernel '" + kernel + "'");
}

int factors_length() { return kFactorsLength; }
int sums_length(int values, int width) { return sum_rows(values, width) * kChunk; }

Call::Call(const std::array<std::uintptr_t, 3>& x_b_c, const std::array<Strides, 3>& strides,
                     const ScalarView& dt, const ScalarView& a, const ScalarView& d, const ScalarView& dt_bias,
                     std::uintptr_t cu_seqlens, const Shape& shape, int chunks, std::uintptr_t factors, bool softplus,
                     float least, float greatest, std::uintptr_t stream)
    : shape_(shape), stream_(reinterpret_cast<void*>(stream)) {
  params_.x = rows(x_b_c[0], strides[0]);
  params_.b = rows(x_b_c[1], strides[1]);
  params_.c = rows(x_b_c[2], strides[2]);
  set_gates(params_, dt, a, d, dt_bias, softplus, least, greatest);
  params_.factors = floats(factors);
  params_.cu_seqlens = reinterpret_cast<const int*>(cu_seqlens);
  set_shape(params_, shape);
  params_.chunks = chunks;
}

void Call::factors(const Kernel& kernel) const {
  if (params_.chunks == 0) return;
  Params params = params_;
  kernel.launch({count(ceil_div(std::int64_t{params.chunks} * params.heads, kGateWarps))}, kThreads, &params, stream_);
}

void Call::set_states(int direction, std::uintptr_t states, std::uintptr_t given, std::uintptr_t left) {
  params_.states[direction] = floats(states);
  params_.given[direction] = floats(given);
  params_.left[direction] = floats(left);
}

void Call::set_gradient(std::uintptr_t d_o) {
  const std::int64_t T = shape_[kT], H = shape_[kH], V = shape_[kV];
  params_.d_o = rows(d_o, {T * H * V, H * V, V, 1});
}

void Call::states(const Kernel& ends, const Kernel& carry, int directions) const {
  Params params = params_;
  const unsigned heads = count(shape_[kH]), ways = count(directions);
  if (params.chunks > 0) {
    const std::int64_t blocks = std::int64_t{params.chunks} * slices(params.values);
    ends.launch({count(blocks), heads, ways}, kThreads, &params, stream_);
  }
  const std::int64_t pieces = ceil_div(shape_[kV] * shape_[kK], kCarryThreads * kCarryEach);
  carry.launch({count(pieces * shape_[kN]), heads, ways}, kCarryThreads, &params, stream_);
}

void Call::outputs(const Kernel& kernel, std::uintptr_t o) const {
  Params params = params_;
  params.results[kO] = floats(o);
  collect(kernel, shape_[kV], kH, params);
}

void Call::gradients(const std::array<const Kernel*, 3>& dx_db_dc, const std::array<std::uintptr_t, 3>& results,
                          std::uintptr_t sums) {
  params_.sums = floats(sums);
  Params params = params_;
  for (int i = 0; i < 3; ++i) params.results[kDX + i] = floats(results[i]);
  collect(*dx_db_dc[0], shape_[kV], kHX, params);
  collect(*dx_db_dc[1], shape_[kK], kGB, params);
  collect(*dx_db_dc[2], shape_[kK], kG, params);
}

void Call::ddt(const Kernel& kernel, std::uintptr_t ddt, std::uintptr_t parts) const {
  Params params = params_;
  params.ddt = floats(ddt);
  params.parts = floats(parts);
  if (params.chunks == 0) return;
  kernel.launch({count(ceil_div(std::int64_t{params.chunks} * params.heads, kGateWarps))}, kThreads, &params, stream_);
}

void Call::vectors(const Kernel& kernel, std::uintptr_t parts, const std::array<std::uintptr_t, 3>& sums,
                        const std::array<int, 3>& types) const {
  VectorsParams params = vectors_params(parts, 0, sums, types, params_);
  kernel.launch({count(ceil_div(shape_[kH], 32)), 3}, 32 * kVectorWarps, &params, stream_);
}

void Call::collect(const Kernel& kernel, std::int64_t columns, Dim owners, const Params& given) const {
  if (given.chunks == 0) return;
  Params params = given;
  const std::int64_t blocks = std::int64_t{params.chunks} * slices(static_cast<int>(columns));
  kernel.launch({count(blocks), count(shape_[owners])}, kThreads, &params, stream_);
}

}  // namespace hylo::ssd::plain
