#include "mla_step/launch.h"

#include <algorithm>
#include <initializer_list>
#include <utility>

#include "common/tensor_checks.h"
#include "mla_step/params.h"
#include "mla_step/traits.cuh"

namespace hylo::mla_step {
namespace {

constexpr std::int64_t kMostRows = 1 << 24;  // query rows of all sequences

Word word(std::int64_t number) { return static_cast<Word>(number); }
int number(std::int64_t size) { return static_cast<int>(size); }

bool has_shapes(const Inputs& x) {
  if (x.q_nope.dims != 4 || x.q_rope.dims != 4 || x.cache.dims != 3) return false;
  if (x.w_uk.dims != 3 || x.w_uv.dims != 3) return false;
  const auto B = x.q_nope.shape[0], H = x.q_nope.shape[2], nope = x.q_nope.shape[3], E = x.q_rope.shape[3];
  const auto HK = x.w_uk.shape[0], R = x.w_uk.shape[2];
  if (!has_shape(x.q_nope, B, 1, H, nope) || !has_shape(x.q_rope, B, 1, H, E) || E % 2 != 0) return false;
  if (!has_shape(x.w_uk, HK, nope, R) || !has_shape(x.w_uv, HK, x.w_uv.shape[1], R)) return false;
  if (HK == 0 || H % HK != 0 || x.key_scales < 0 || (x.key_scales > 0 && H % x.key_scales != 0)) return false;
  if (x.cache.shape[2] < R + E + x.key_scales || !has_shape(x.kv_new, B, 1, x.cache.shape[2])) return false;
  for (const Tensor* angles : {&x.cos, &x.sin}) {
    if (angles->dims != 3 || !has_shape(*angles, angles->shape[0] == 1 ? 1 : B, 1, E)) return false;
  }
  return has_shape(x.lengths, B) && has_shape(x.position, B);
}

std::string wrong_types(const Inputs& x) {
  const ElementType& type = x.q_nope.type;
  for (const Tensor* tensor : {&x.q_rope, &x.kv_new, &x.w_uk, &x.w_uv, &x.cache}) {
    if ((type != kBf16 && type != kFp16) || tensor->type != type) {
      return "q_nope, q_rope, kv_new, w_uk, w_uv and kv_cache are not of one dtype, bfloat16 or float16";
    }
  }
  if (!is_integer(x.lengths) || !is_integer(x.position)) return "cache_seqlens or position is not int32 or int64";
  if (scalar_type(x.cos.type) == kNoScalar || scalar_type(x.sin.type) == kNoScalar) {
    return "cos or sin is of no floating dtype";
  }
  return "";
}

std::string wrong_sizes(const Inputs& x) {
  const auto nope = x.q_nope.shape[3], v = x.w_uv.shape[1];
  if (nope % kStep != 0 || nope == 0 || nope > kMaxNope) {
    return "nope is " + std::to_string(nope) + ", not a multiple of 16 up to 128";
  }
  if (v % kValues != 0 || v == 0) return "v is " + std::to_string(v) + ", not a multiple of 16";
  if (x.q_nope.shape[0] * x.q_nope.shape[2] > kMostRows) return "there are more than 2^24 heads of all sequences";
  return "";
}

std::string wrong_layout(const Inputs& x) {
  for (const auto& [name, tensor] : {std::pair{"q_nope", &x.q_nope}, {"w_uk", &x.w_uk}, {"w_uv", &x.w_uv}}) {
    if (!has_aligned_rows(*tensor)) {
      return std::string("the last dim of ") + name + " is not contiguous, or does not start at 16-byte multiples";
    }
  }
  const auto apart = [](const Tensor& tensor, int dim) { return tensor.shape[dim] > 1 && tensor.strides[dim] != 1; };
  if (apart(x.q_rope, 3) || apart(x.kv_new, 2)) return "the last dim of q_rope or of kv_new is not contiguous";
  return "";
}

Share share_of(const Inputs& x, std::int64_t parts) {
  const auto HK = x.w_uk.shape[0], group = x.q_nope.shape[2] / HK;
  Share share{};
  share.parts = number(parts);
  share.group = number(group);
  share.rows = number(x.q_nope.shape[0] * group);
  const int units = number(HK * parts), tiles = ceil_div(share.rows, kTileRows);
  share.tiles = std::max(ceil_div(tiles, std::max(kManyWarps / units, 1)), 1);
  share.runs = ceil_div(tiles, share.tiles);
  share.warps = units * share.runs;
  share.by_runs = divider(word(share.runs));
  share.by_parts = divider(word(parts));
  share.by_group = divider(word(group));
  return share;
}

unsigned blocks_of(const Share& share) { return static_cast<unsigned>(ceil_div(share.warps, kThreads / 32)); }

Scalar angles_of(const Tensor& tensor) {
  return {tensor.data, tensor.shape[0] == 1 ? 0 : tensor.strides[0], tensor.strides[2], scalar_type(tensor.type)};
}

char* place(const void* workspace, std::int64_t at) {
  return const_cast<char*>(static_cast<const char*>(workspace)) + 2 * at;
}

}  // namespace

std::string why_not(const Inputs& x, int device_type) {
  if (x.q_nope.device_type != device_type) return "q_nope is not on a CUDA device";
  if (!are_on_one_device({&x.q_nope, &x.q_rope, &x.kv_new, &x.w_uk, &x.w_uv, &x.cache, &x.lengths, &x.position, &x.cos,
                          &x.sin, if_there(x.has_starts, x.starts), if_there(x.paged, x.table)},
                         device_type)) {
    return "the tensors are not on one device";
  }
  if (!has_shapes(x)) return kWrongShapes;
  for (const auto& wrong : {&wrong_types, &wrong_sizes, &wrong_layout}) {
    if (std::string reason = wrong(x); !reason.empty()) return reason;
  }
  return "";
}

Kind kind_of(const Inputs& x, bool values) {
  return {x.q_nope.device, x.q_nope.type, number(x.q_nope.shape[3]), number(x.w_uk.shape[2]), values};
}

Workspace workspace_of(const Inputs& x) {
  const auto B = x.q_nope.shape[0], rows = B * x.q_nope.shape[2], R = x.w_uk.shape[2], E = x.q_rope.shape[3];
  Workspace at{};
  at.results = rows * R;
  at.rotated = 2 * rows * R;
  at.counted = at.rotated + rows * E;
  at.size = at.counted + 2 * B;
  return at;
}

void launch_queries(const Kernel& kernel, const Inputs& x, const Workspace& at, void* workspace, void* stream) {
  const auto B = x.q_nope.shape[0], H = x.q_nope.shape[2], R = x.w_uk.shape[2], E = x.q_rope.shape[3];
  const auto page = x.cache.shape[1], row = x.cache.shape[2];
  QueriesParams params{};
  params.q_nope = x.q_nope.data;
  params.weights = x.w_uk.data;
  params.q_rope = x.q_rope.data;
  params.kv_new = x.kv_new.data;
  params.cache = x.cache.data;
  params.latent = place(workspace, at.latent);
  params.rotated = place(workspace, at.rotated);
  params.counted = reinterpret_cast<int*>(place(workspace, at.counted));
  params.lengths = integers_of(true, x.lengths);
  params.position = integers_of(true, x.position);
  params.table = integers_of(x.paged, x.table);
  params.cos = angles_of(x.cos);
  params.sin = angles_of(x.sin);
  params.q_nope_b = x.q_nope.strides[0];
  params.q_nope_h = x.q_nope.strides[2];
  params.weights_h = x.w_uk.strides[0];
  params.weights_n = x.w_uk.strides[1];
  params.q_rope_b = x.q_rope.strides[0];
  params.q_rope_h = x.q_rope.strides[2];
  params.kv_new_b = x.kv_new.strides[0];
  params.cache_page = x.cache.strides[0];
  params.cache_token = x.cache.strides[1];
  params.share = share_of(x, (R + kColumns - 1) / kColumns);
  params.heads = number(H);
  params.rank = number(R);
  params.rope = number(E);
  params.row = number(row);
  params.capacity = number(x.paged ? x.table.shape[1] * page : page);
  params.page = number(page);
  params.parts = number((H * E + row + kThreads * kElements - 1) / (kThreads * kElements));
  params.appending = number(B) * params.parts;
  params.by_parts = divider(word(params.parts));
  params.by_rope = divider(word(std::max(E, std::int64_t{1})));
  params.by_page = divider(word(page));
  const Grid grid{static_cast<unsigned>(params.appending) + blocks_of(params.share)};
  kernel.launch_early(grid, kThreads, &params, stream);
}

void launch_values(const Kernel& kernel, const Inputs& x, const Workspace& at, const void* workspace, void* o,
                   void* stream) {
  ValuesParams params{};
  params.latent = place(workspace, at.results);
  params.weights = x.w_uv.data;
  params.o = o;
  params.weights_h = x.w_uv.strides[0];
  params.weights_v = x.w_uv.strides[1];
  params.share = share_of(x, x.w_uv.shape[1] / kValues);
  params.heads = number(x.q_nope.shape[2]);
  params.values = number(x.w_uv.shape[1]);
  kernel.launch_early({blocks_of(params.share)}, kThreads, &params, stream);
}

}  // namespace hylo::mla_step
