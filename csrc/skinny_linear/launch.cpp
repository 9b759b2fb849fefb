#include "skinny_linear/launch.h"

#include <algorithm>
#include <utility>

#include "common/tensor_checks.h"
#include "skinny_linear/params.h"
#include "skinny_linear/traits.cuh"

namespace hylo::skinny_linear {
namespace {

constexpr int kRowsOfKernel[] = {16, 32, 64};
constexpr std::int64_t kUnit = 8;                              // outputs that rows of y are made of
constexpr std::int64_t kMostOutputs = std::int64_t{65535} * kTile;
constexpr std::int64_t kMaxStride = std::int64_t{1} << 39;     // elements

// An H100's 132 multiprocessors have room for 264. Clusters of more than a pair do not fill it to the last: at 260 blocks
// some wait for others to end.
constexpr int kManyBlocks = 264, kManyInClusters = 224;
constexpr int kPair = 2;

// Tiles of K that are yet to come when the next kernel may begin. Earlier it would fill its stages while memory is busy
// anyway, and many rows leave it room for few.
constexpr int kRestOfFew = 4, kRestOfMany = 2;

int number(std::int64_t size) { return static_cast<int>(size); }

std::int64_t halves_of(const Inputs& x) { return x.swiglu ? 2 : 1; }
int tiles_of_k(const Inputs& x) { return number(x.x.shape[1] / kTile); }
int most_blocks_of_cluster(const Inputs& x) { return std::clamp(tiles_of_k(x) / kLeastTiles, 1, kMaxCluster); }
int tiles_of_outputs(const Inputs& x) { return ceil_div(number(outputs_of(x)), x.swiglu ? kTile : kOutputs); }

bool has_shapes(const Inputs& x) {
  if (x.x.dims != 2 || x.weight.dims != 2 || x.weight.shape[1] != x.x.shape[1]) return false;
  if (x.weight.shape[0] % halves_of(x) != 0) return false;
  if (x.has_residual && !has_shape(x.residual, x.x.shape[0], outputs_of(x))) return false;
  if (x.has_norm && !has_shape(x.norm, x.x.shape[1])) return false;
  if (!x.has_conv) return true;
  const Tensor& weight = x.conv_weight;
  return weight.dims == 2 && weight.shape[0] <= outputs_of(x) &&
         has_shape(x.conv_state, x.x.shape[0], weight.shape[0], weight.shape[1]);
}

std::string wrong_types(const Inputs& x) {
  const ElementType& type = x.x.type;
  const auto is_one = [&type](bool there, const Tensor& tensor) { return !there || tensor.type == type; };
  const bool one = is_one(true, x.weight) && is_one(x.has_residual, x.residual) && is_one(x.has_norm, x.norm) &&
                   is_one(x.has_conv, x.conv_weight) && is_one(x.has_conv, x.conv_state);
  if ((type == kBf16 || type == kFp16) && one) return "";
  return "x, weight and what comes with them are not of one dtype, bfloat16 or float16";
}

std::string wrong_sizes(const Inputs& x) {
  const auto B = x.x.shape[0], K = x.x.shape[1], N = outputs_of(x);
  if (B > kMostRows) return "there are " + std::to_string(B) + " rows, more than 64";
  if (K % kTile != 0 || K == 0) return "K is " + std::to_string(K) + ", not a multiple of 64";
  if (N % kUnit != 0) return "N is " + std::to_string(N) + ", not a multiple of 8";
  if (K > kMostOutputs || N > kMostOutputs) return "K or N is more than 4194240";
  return "";
}

// Bytes from where a matrix starts to where its last row ends.
std::int64_t extent(const Tensor& matrix) {
  const auto rows = matrix.shape[0];
  return rows == 0 ? 0 : ((rows - 1) * matrix.strides[0] + matrix.shape[1]) * matrix.bytes();
}

bool overlap(const Tensor& a, const Tensor& b) {
  const auto *first = static_cast<const char*>(a.data), *second = static_cast<const char*>(b.data);
  return first < second + extent(b) && second < first + extent(a);
}

std::string wrong_layout(const Inputs& x) {
  for (const auto& [name, tensor] : {std::pair{"x", &x.x}, {"weight", &x.weight}}) {
    const auto stride = tensor->strides[0];
    if (tensor->shape[0] > 1 && (stride < tensor->shape[1] || stride >= kMaxStride)) {
      return std::string("rows of ") + name + " lie in each other, or too far apart";
    }
    if (!has_aligned_rows(*tensor)) {
      return std::string("the last dim of ") + name + " is not contiguous, or does not start at 16-byte multiples";
    }
  }
  if (x.weight.strides[0] * x.weight.shape[0] >= kMaxStride) return "weight is too large";
  if (!x.has_residual) return "";
  if (x.swiglu) return "a residual is not added to what swiglu gives";
  const bool contiguous = x.residual.shape[0] <= 1 || x.residual.strides[0] == x.residual.shape[1];
  if (!contiguous || !has_aligned_rows(x.residual)) {
    return "residual is not contiguous, or does not start at a 16-byte multiple";
  }
  if (overlap(x.residual, x.x) || overlap(x.residual, x.weight)) return "residual overlaps x or weight";
  return "";
}

// Whether the last two dims are side by side, each kTaps numbers at a multiple of their size.
bool has_windows(const Tensor& tensor) {
  const int last = tensor.dims - 1;
  const bool between = reinterpret_cast<std::uintptr_t>(tensor.data) % (kTaps * tensor.bytes()) != 0;
  const bool inner = tensor.strides[last] == 1 && (tensor.shape[last - 1] <= 1 || tensor.strides[last - 1] == kTaps);
  return inner && !between && (last < 2 || tensor.shape[0] <= 1 || tensor.strides[0] % kTaps == 0);
}

std::string wrong_norm(const Inputs& x) {
  if (!x.has_norm) return "";
  // what is weighed but not yet divided by the root may be beyond what fp16 holds
  if (x.x.type == kFp16) return "a norm of float16 is not made on the way";
  return has_aligned_rows(x.norm) ? "" : "norm_weight is not contiguous, or does not start at a 16-byte multiple";
}

std::string wrong_conv(const Inputs& x) {
  if (!x.has_conv) return "";
  if (x.has_residual || x.swiglu) return "what goes through a convolution is neither added to nor gated";
  const auto taps = x.conv_weight.shape[1];
  if (taps != kTaps) return "the convolution is over " + std::to_string(taps) + " tokens, not over 4";
  if (has_windows(x.conv_weight) && has_windows(x.conv_state)) return "";
  return "the last two dims of conv_weight or conv_state are not contiguous, or do not start at 8-byte multiples";
}

TensorMap weight_map(const Inputs& x) {
  const Tensor& w = x.weight;
  const auto N = outputs_of(x), stride = w.shape[0] == 1 ? w.shape[1] : w.strides[0];
  const std::uint64_t sizes[4] = {static_cast<std::uint64_t>(w.shape[1]), static_cast<std::uint64_t>(N),
                                  static_cast<std::uint64_t>(halves_of(x)), 1};
  const std::int64_t strides[4] = {1, stride, N * stride, 0};
  return box_map(reinterpret_cast<std::uintptr_t>(w.data), sizes, strides, kTile, kTile, 1);
}

TensorMap x_map(const Inputs& x) {
  const std::uint64_t sizes[4] = {static_cast<std::uint64_t>(x.x.shape[1]), static_cast<std::uint64_t>(x.x.shape[0]), 1,
                                  1};
  const std::int64_t strides[4] = {1, x.x.strides[0], 0, 0};
  return box_map(reinterpret_cast<std::uintptr_t>(x.x.data), sizes, strides, kTile,
                 static_cast<unsigned>(kind_of(x).B), 1);
}

}  // namespace

std::int64_t outputs_of(const Inputs& x) { return x.weight.shape[0] / halves_of(x); }

std::string why_not(const Inputs& x, int device_type) {
  if (x.x.device_type != device_type) return "x is not on a CUDA device";
  if (!are_on_one_device({&x.x, &x.weight, if_there(x.has_residual, x.residual), if_there(x.has_norm, x.norm),
                          if_there(x.has_conv, x.conv_weight), if_there(x.has_conv, x.conv_state)},
                         device_type)) {
    return "the tensors are not on one device";
  }
  if (!has_shapes(x)) return kWrongShapes;
  for (const auto& wrong : {&wrong_types, &wrong_sizes, &wrong_layout, &wrong_norm, &wrong_conv}) {
    if (std::string reason = wrong(x); !reason.empty()) return reason;
  }
  return "";
}

Kind kind_of(const Inputs& x) {
  const auto fits = [&x](int rows) { return rows >= x.x.shape[0]; };
  const int B = *std::find_if(std::begin(kRowsOfKernel), std::end(kRowsOfKernel), fits);
  return {x.x.device, x.x.type, B, x.has_conv};
}

Spread spread_of(const Inputs& x) {
  const int tiles = std::max(tiles_of_outputs(x), 1);
  const int pair = std::min(kManyBlocks / tiles, kPair), more = kManyInClusters / tiles;
  const int rest = kind_of(x).B == kMostRows ? kRestOfMany : kRestOfFew;
  return {std::clamp(std::max(pair, more), 1, most_blocks_of_cluster(x)), 0, rest};
}

bool can_be(const Spread& spread, const Inputs& x) {
  return spread.cluster > 0 && spread.cluster <= most_blocks_of_cluster(x) && spread.ahead >= 0 && spread.rest >= 0;
}

void launch(const Kernel& kernel, const Inputs& x, const Spread& spread, bool constant, void* y, void* stream) {
  const int B = number(x.x.shape[0]), cluster = spread.cluster;
  Params params{};
  params.weights = weight_map(x);
  params.x = x_map(x);
  params.y = y;
  params.batch = B;
  params.columns = number(outputs_of(x));
  params.cluster = cluster;
  params.share = ceil_div(pairs_of(B), cluster);
  params.tiles = tiles_of_k(x) / cluster;
  params.more = tiles_of_k(x) % cluster;
  params.stages = stages_of(kind_of(x).B, cluster, params.share);
  params.ahead = std::min(spread.ahead, tiles_of_k(x));
  params.rest = spread.rest;
  params.constant = constant;
  params.swiglu = x.swiglu;
  params.adds = x.has_residual;
  if (x.has_norm) {
    params.norm = x.norm.data;
    params.eps = x.eps;
    params.per_width = 1.0f / static_cast<float>(x.x.shape[1]);
  }
  if (x.has_conv) {
    params.conv_weight = x.conv_weight.data;
    params.conv_state = x.conv_state.data;
    params.conv_b = x.conv_state.strides[0];
    params.channels = number(x.conv_weight.shape[0]);
    params.silu = x.silu;
  }
  params.by_share = divider(static_cast<Word>(params.share));
  const auto blocks = static_cast<unsigned>(cluster);
  const Grid grid{blocks, static_cast<unsigned>(tiles_of_outputs(x)), 1};
  kernel.launch_clusters(grid, blocks, kThreads, kSharedLimit, &params, stream);
}

}  // namespace hylo::skinny_linear
