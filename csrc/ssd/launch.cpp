#include "ssd/launch.h"

#include <algorithm>
#include <iterator>
#include <numeric>
#include <stdexcept>

#include "ssd/gradients_traits.cuh"

namespace hylo::ssd {
namespace {

std::uint64_t size(std::int64_t n) { return static_cast<std::uint64_t>(n); }
unsigned count(std::int64_t n) { return static_cast<unsigned>(n); }
std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// A tile is one for both chains of every block if no pair (2 n, 2 n + 1) of units, which count through the tiles of a
// head and then the heads, belongs to two of what is read. A launch that goes back, too, reads d_o and c
// for x and b.
Slots slots_of(bool back, int width, const Shape& shape) {
  const int each = chains(width);
  const std::int64_t tiles = ceil_div(shape[kV], kTile);
  const auto slots = [&](Dim heads) { return tiles * (shape[kH] / shape[heads]) % each == 0 ? 1 : each; };
  const int either = std::max(slots(kGB), slots(kG));
  if (back) return {each, either, either};
  return {tiles == 1 ? slots(kHX) : each, slots(kGB), slots(kG)};
}

Pass pass_named(const std::string& kernel) {
  if (kernel == "ends") return kEnds;
  if (kernel == "mixed_ends") return kMixedEnds;
  if (kernel == "o") return kOutputs;
  if (kernel == "states") return kStates;
  throw std::invalid_argument("there is no chunked kernel '" + kernel + "'");
}

// Heads one after the other that are all which share one of x, b, c with one of them.
int set_of(const Params& p) { return std::lcm(std::lcm(p.x_group, p.b_group), p.c_group); }

// Heads that windows do not divide. A set; but where all heads are one set since they share b or c, those that share what
// is left: sums over the others can go on in the next window.
int indivisible(const Params& p) {
  const auto unless_all = [&](int group) { return group == p.heads ? 1 : group; };
  const int set = set_of(p);
  return set < p.heads ? set : std::lcm(std::lcm(p.x_group, unless_all(p.b_group)), unless_all(p.c_group));
}

// Places of everything in shared memory, in bytes, where tiles of the tokens and of the states have so many slots, but
// those that serve several heads only one. Returns the end.
int place_gradients(int values, int width, int of_tokens, int of_states, GradientsParams& p) {
  const int v = values / kTile * kTileSize, k = width / kTile * kTileSize, states = v * (width / kTile);
  const int groups[kTileKinds] = {p.common.x_group, p.common.b_group, p.common.c_group, 1, 1, 1};
  const int sizes[kTileKinds] = {v, k, k, v, states, states};
  int end = 0;
  for (int i = 0; i < kTileKinds; ++i) {
    const int depth = i >= kTilesStates ? of_states : groups[i] > 1 ? 1 : of_tokens;
    p.slots[i] = {end, depth, sizes[i], groups[i], std::min(groups[i], std::max(p.common.window.count, 1))};
    end += depth * sizes[i];
  }
  p.staging = end;
  p.pairs = p.staging + kGradientWarpgroups * kTileSize;
  p.factors = p.pairs + 2 * kTileSize;
  p.sums = p.factors + kHeadRing * kFactorsSize;
  return p.sums + kHeadRing * kSumsSize;
}

// As many slots as there is room for: what is asked for early hides how far away it is, tokens' tiles first since they are
// the smaller ones. Returns the dynamic shared memory it takes.
int place_gradients(int values, int width, GradientsParams& p) {
  for (int of_states = kMostDepth; of_states > 0; --of_states) {
    for (int of_tokens = kMostDepth; of_tokens >= std::min(of_states, 2); --of_tokens) {
      const int end = place_gradients(values, width, of_tokens, of_states, p) + 1024;
      if (end <= kSharedLimit - 2048) return end;
    }
  }
  return place_gradients(values, width, 1, 1, p) + 1024;
}

}  // namespace

int chunk_shared_bytes(const std::string& kernel, int width, const Shape& shape) {
  if (kernel == "carry" || kernel == "vectors") return 0;
  if (kernel == "mix") return kHaloSize + kTileSize + 1024;
  const Pass pass = pass_named(kernel);
  if (pass == kOutputs || pass == kMixedEnds) return pass_shared(pass, width, slots_of(false, width, shape));
  return std::max(pass_shared(pass, width, slots_of(false, width, shape)),
                  pass_shared(pass, width, slots_of(true, width, shape)));
}

int most_windows(const Shape& shape) {
  Params params{};
  set_shape(params, shape);
  return std::max(params.heads / indivisible(params), 1);
}

int gradients_shared_bytes(int values, int width, const Shape& shape) {
  GradientsParams params{};
  set_shape(params.common, shape);
  return place_gradients(values, width, params);
}

ChunkCall::ChunkCall(const std::array<std::uintptr_t, 3>& x_b_c, const std::array<Strides, 3>& strides,
                     const ScalarView& dt, const ScalarView& a, const ScalarView& d, const ScalarView& dt_bias,
                     std::uintptr_t cu_seqlens, std::uintptr_t initial_state, const Shape& shape, int width, int chunks,
                     int pieces, int merged, const std::array<std::uintptr_t, 2>& ends,
                     const std::array<std::uintptr_t, 2>& totals, bool softplus, float least, float greatest,
                     std::uintptr_t stream)
    : shape_(shape), width_(width), merged_(merged), chunks_(chunks), stream_(reinterpret_cast<void*>(stream)) {
  if (pieces % merged != 0) throw std::invalid_argument("segments must have equally many pieces");
  if (width % kTile != 0 || width < shape[kK]) throw std::invalid_argument("kernels are too narrow for K");
  if (chunks > 0) {
    params_.x = tokens_map(x_b_c[0], shape[kHX], shape[kV], strides[0]);
    params_.b = tokens_map(x_b_c[1], shape[kGB], shape[kK], strides[1]);
    params_.c = tokens_map(x_b_c[2], shape[kG], shape[kK], strides[2]);
  }
  set_gates(params_, dt, a, d, dt_bias, softplus, least, greatest);
  for (const Direction direction : {kForth, kBack}) {
    params_.ends[direction] = reinterpret_cast<float*>(ends[direction]);
    params_.totals[direction] = reinterpret_cast<float*>(totals[direction]);
  }
  params_.pieces = pieces;
  params_.merged = 1;
  params_.first_state = reinterpret_cast<const float*>(initial_state);
  params_.cu_seqlens = reinterpret_cast<const int*>(cu_seqlens);
  set_shape(params_, shape);
  params_.chunks = chunks;
  params_.window = {0, params_.heads};
}

void ChunkCall::set_gradients(std::uintptr_t d_o, std::uintptr_t d_final_state) {
  if (chunks_ > 0) params_.d_o = values_map(d_o);
  params_.last_gradient = reinterpret_cast<const float*>(d_final_state);
}

int ChunkCall::owed_rows() const {
  return static_cast<int>(2 * shape_[kN] * (params_.pieces / merged_) * ceil_div(shape_[kV], kTile) * kOwedParts);
}

Window ChunkCall::window(int index, int windows) const {
  const int each = indivisible(params_), count = params_.heads / each;
  const int first = count * index / windows, end = count * (index + 1) / windows;
  return {first * each, (end - first) * each};
}

int ChunkCall::window_heads(int windows) const {
  int most = 0;
  for (int i = 0; i < windows; ++i) most = std::max(most, window(i, windows).count);
  return most;
}

void ChunkCall::begin(const Kernel& ends, const Kernel& carry, bool forth, bool back) const {
  if (params_.pieces == 1) return;
  Params params = params_;
  params.first_direction = forth ? kForth : kBack;
  const int directions = forth + back;
  launch(kEnds, ends, directions, back, {params, {}, {}});
  carry_on(carry, directions, params);
}

Mixing ChunkCall::mixing(const Mixed& of, std::int64_t first, std::int64_t heads, std::int64_t width) const {
  if (of.taps > kTaps) throw std::invalid_argument("a convolution is too wide");
  const Strides strides{of.stride_b, of.stride_t, width, 1};
  const TensorMap raw = tokens_map(of.raw + 2 * first, heads, width, strides, kHalo + kChunk);
  return {raw, of_heads(of.weight), of_heads(of.bias), of.taps};
}

void ChunkCall::mix(const Kernel& mix, const Mixed& of) const {
  const std::int64_t first = shape_[kH] * shape_[kV], others = of.channels - first;
  MixParams params{mixing(of, first, 1, others),
                   tokens_map(of.mixed + 2 * first, 1, others, {shape_[kT] * of.channels, of.channels, others, 1}),
                   reinterpret_cast<const char*>(of.raw),
                   2 * of.stride_b,
                   2 * of.stride_t,
                   reinterpret_cast<void*>(of.last_inputs),
                   static_cast<int>(shape_[kT]),
                   static_cast<int>(of.channels),
                   static_cast<int>(first)};
  const Grid grid{count(ceil_div(others, kTile)), count(ceil_div(shape_[kT], kChunk)), count(shape_[kB])};
  mix.launch(grid, 128, &params, stream_);
}

void ChunkCall::begin_mixed(const Kernel& ends, const Kernel& carry, const Mixed& of) {
  params_.made = true;
  launch(kMixedEnds, ends, 1, false, {params_, {}, mixing(of, 0, shape_[kH], shape_[kV])});
  carry_on(carry, 1, params_);
}

void ChunkCall::carry_on(const Kernel& carry, int directions, const Params& params) const {
  PassParams all{params, {}, {}};
  const std::int64_t blocks = ceil_div(shape_[kV] * shape_[kK], kCarryThreads * kCarryEach);
  carry.launch_early({count(blocks), count(shape_[kH]), count(directions * shape_[kN])}, kCarryThreads, &all, stream_);
}

void ChunkCall::outputs(const Kernel& kernel, std::uintptr_t o, std::uintptr_t final_state) const {
  Params params = params_;
  if (chunks_ > 0) params.o = values_map(o);
  params.o_at = reinterpret_cast<void*>(o);
  params.last_state = reinterpret_cast<float*>(final_state);
  launch(kOutputs, kernel, 1, false, {params, {}, {}});
}

void ChunkCall::states(const Kernel& kernel, int index, int windows, std::uintptr_t states, std::uintptr_t dstates,
                       std::uintptr_t d_initial_state, std::uintptr_t parts) const {
  Params params = params_;
  params.merged = merged_;
  params.window = window(index, windows);
  if (chunks_ > 0) {
    params.states[kForth] = states_map(states, params.window.count);
    params.states[kBack] = states_map(dstates, params.window.count);
  }
  params.first_gradient = reinterpret_cast<float*>(d_initial_state);
  params.owed = reinterpret_cast<float*>(parts) + kHeadParts * chunks_ * shape_[kH];
  launch(kStates, kernel, 2, true, {params, {}, {}});
}

void ChunkCall::gradients(const Kernel& kernel, int values, int index, int windows, std::uintptr_t states,
                          std::uintptr_t dstates, const std::array<std::uintptr_t, 4>& dx_db_dc_ddt,
                          const std::array<Strides, 3>& strides, std::uintptr_t parts, std::uintptr_t sums_so_far,
                          int most_blocks) const {
  if (chunks_ == 0) return;
  GradientsParams params{};
  params.common = params_;
  params.common.window = window(index, windows);
  const int heads = params.common.window.count;
  const TensorMap tiles[kTileKinds] = {params_.x,   params_.b,
                                       params_.c,   params_.d_o,
                                       states_map(states, heads), states_map(dstates, heads)};
  std::copy(std::begin(tiles), std::end(tiles), params.tiles);
  constexpr Dim dims[3][2] = {{kHX, kV}, {kGB, kK}, {kG, kK}};
  for (int i = 0; i < 3; ++i) {
    params.maps[i] = tokens_map(dx_db_dc_ddt[i], shape_[dims[i][0]], shape_[dims[i][1]], strides[i]);
    params.gradients[i] = reinterpret_cast<void*>(dx_db_dc_ddt[i]);
    params.strides[i] = static_cast<int>(strides[i][kT]);
  }
  params.ddt = reinterpret_cast<void*>(dx_db_dc_ddt[3]);
  params.parts = reinterpret_cast<float*>(parts);
  params.sums_so_far = reinterpret_cast<float*>(sums_so_far);
  params.set = std::min(set_of(params_), heads);
  params.sets = heads / params.set;
  place_gradients(values, width_, params);
  for (int i = kTilesB; i <= kTilesC; ++i) {
    if (params.slots[i].turns == params.slots[i].group) continue;
    params.earlier |= (index > 0) << i;
    params.later |= (index + 1 < windows) << i;
  }
  const std::int64_t items = std::int64_t{chunks_} * params.sets;
  kernel.launch_early({count(std::min<std::int64_t>(items, most_blocks))}, kGradientThreads, &params, stream_);
}

void ChunkCall::vectors(const Kernel& kernel, std::uintptr_t parts, const std::array<std::uintptr_t, 3>& sums,
                        const std::array<int, 3>& types) const {
  VectorsParams params = vectors_params(parts, owed_rows(), sums, types, params_);
  kernel.launch_early({count(ceil_div(shape_[kH], 32)), 3}, 32 * kVectorWarps, &params, stream_);
}

void ChunkCall::launch(Pass pass, const Kernel& kernel, int directions, bool back, PassParams params) const {
  params.slots = slots_of(back, width_, shape_);
  const Params& p = params.common;
  const std::int64_t units = p.window.count * ceil_div(shape_[kV], kTile), segments = p.pieces / p.merged;
  const Grid grid{count(ceil_div(units, chains(width_))), count(shape_[kN] * segments), count(directions)};
  kernel.launch_early(grid, count(pass_threads(pass, width_)), &params, stream_);
}

// Boxes of so many tokens x 64 columns of one head.
TensorMap ChunkCall::tokens_map(std::uintptr_t tensor, std::int64_t heads, std::int64_t width, const Strides& strides,
                                int tokens) const {
  return box_map(tensor, {size(width), size(heads), size(shape_[kT]), size(shape_[kB])},
                 {strides[3], strides[2], strides[1], strides[0]}, kTile, tokens, 2);
}

// The same of a contiguous tensor as o is.
TensorMap ChunkCall::values_map(std::uintptr_t tensor) const {
  const std::int64_t H = shape_[kH], V = shape_[kV];
  return tokens_map(tensor, H, V, {shape_[kT] * H * V, H * V, V, 1});
}

// Boxes of 64 rows of V x 64 columns of K of a contiguous [chunks, heads, V, K].
TensorMap ChunkCall::states_map(std::uintptr_t tensor, std::int64_t H) const {
  const std::int64_t V = shape_[kV], K = shape_[kK];
  return box_map(tensor, {size(K), size(V), size(H), size(chunks_)}, {1, K, V * K, H * V * K}, kTile, kTile, 1);
}

}  // namespace hylo::ssd
