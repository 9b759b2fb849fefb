#include "ssd/launch_step.h"

#include <algorithm>
#include <numeric>

#include "common/tensor_checks.h"
#include "ssd/step_params.h"
#include "ssd/step_traits.cuh"

namespace hylo::ssd {
namespace {

constexpr std::int64_t kWidthUnit = 16, kMaxK = 256, kMaxGrid = 65535;

bool is_kernel_type(const ElementType& type) { return type == kBf16 || type == kFp16 || type == kFp32; }

bool divides(std::int64_t of, std::int64_t heads) { return of > 0 && heads % of == 0; }

bool has_shapes(const StepGateInputs& x, std::int64_t B, std::int64_t H) {
  return has_shape(x.dt, B, 1, H) && has_shape(x.a, H) && (!x.has_d || has_shape(x.d, H)) &&
         (!x.has_bias || has_shape(x.dt_bias, H));
}

// What both steps ask of the rest. Empty: nothing is wrong.
std::string why_not(const StepGateInputs& gates, const Tensor& state, bool pool, const Tensor& indices,
                    std::int64_t B) {
  const Tensor* const d = if_there(gates.has_d, gates.d);
  for (const Tensor* gate : {&gates.dt, &gates.a, d, if_there(gates.has_bias, gates.dt_bias)}) {
    if (gate != nullptr && scalar_type(gate->type) == kNoScalar) return "dt, a, d or dt_bias is of no floating dtype";
  }
  if (state.type != kFp32 && state.type != kBf16) return "the state is not float32 or bfloat16";
  if (pool && !is_integer(indices)) return "state_indices are not int32 or int64";
  const auto H = state.shape[1], V = state.shape[2], K = state.shape[3];
  if (K % kWidthUnit != 0 || K == 0 || K > kMaxK) {
    return "K is " + std::to_string(K) + ", not a multiple of 16 up to 256";
  }
  if (V % kWidthUnit != 0 || V == 0) return "V is " + std::to_string(V) + ", not a multiple of 16";
  if (B > kMaxGrid || H > kMaxGrid) return "there are more than 65535 sequences or heads";
  if (state.strides[2] != K) return "the states of heads are not contiguous";
  return "";
}

std::string name_unaligned(std::initializer_list<std::pair<const char*, const Tensor*>> tensors) {
  for (const auto& [name, tensor] : tensors) {
    if (!has_aligned_rows(*tensor)) {
      return std::string("the last dim of ") + name + " is not contiguous, or does not start at 16-byte multiples";
    }
  }
  return "";
}

bool is_few(const Tensor& state, std::int64_t B) {
  return B * state.shape[1] * state.shape[2] * state.shape[3] * state.bytes() <= kStepFew;
}

StepGates gates_of(const StepGateInputs& x, const StepOptions& options) {
  const auto if_given = [](bool there, const Tensor& tensor) { return there ? scalar(tensor) : Scalar{}; };
  return {scalar(x.dt),     scalar(x.a),      if_given(x.has_bias, x.dt_bias), if_given(x.has_d, x.d),
          options.least, options.greatest, options.softplus};
}


}  // namespace

std::string step_why_not(const StepInputs& x, int device_type) {
  const StepGateInputs& gates = x.gates;
  if (x.x.device_type != device_type) return "x is not on a CUDA device";
  if (!are_on_one_device({&x.x, &x.b, &x.c, &x.state, &gates.dt, &gates.a, if_there(gates.has_d, gates.d),
                          if_there(gates.has_bias, gates.dt_bias), if_there(x.pool, x.indices)},
                         device_type)) {
    return "the tensors are not on one device";
  }
  if (x.x.dims != 4 || x.b.dims != 4 || x.c.dims != 4 || x.state.dims != 4) return kWrongShapes;
  const auto B = x.x.shape[0], H = x.state.shape[1], HX = x.x.shape[2], GB = x.b.shape[2], G = x.c.shape[2];
  const auto V = x.x.shape[3], K = x.b.shape[3];
  if (!divides(HX, H) || !divides(GB, H) || !divides(G, H) || !has_shapes(gates, B, H)) return kWrongShapes;
  if (!has_shape(x.x, B, 1, HX, V) || !has_shape(x.b, B, 1, GB, K) || !has_shape(x.c, B, 1, G, K)) return kWrongShapes;
  if (x.pool && !has_shape(x.indices, B)) return kWrongShapes;
  if (!has_shape(x.state, x.pool ? x.state.shape[0] : B, H, V, K)) return kWrongShapes;
  if (x.b.type != x.x.type || x.c.type != x.x.type || !is_kernel_type(x.x.type)) {
    return "x, b and c are not of one dtype, bfloat16, float16 or float32";
  }
  const std::string reason = why_not(gates, x.state, x.pool, x.indices, B);
  return reason.empty() ? name_unaligned({{"x", &x.x}, {"b", &x.b}, {"c", &x.c}, {"state", &x.state}}) : reason;
}

StepKind step_kind(const StepInputs& x) {
  const int K = static_cast<int>(x.state.shape[3]), V = static_cast<int>(x.state.shape[2]);
  const StepTeam team = step_team(K, V, static_cast<int>(x.state.bytes()), is_few(x.state, x.x.shape[0]));
  return {x.x.device, x.x.type, x.state.type, K, team.threads, team.rows};
}

void step(const Kernel& kernel, const StepInputs& x, const StepOptions& options, void* o, void* stream) {
  const auto B = x.x.shape[0], H = x.state.shape[1], V = x.state.shape[2];
  if (B == 0) return;
  const auto group = [H](const Tensor& of) { return divider(static_cast<Word>(H / of.shape[2])); };
  StepParams params{};
  params.x = x.x.data;
  params.b = x.b.data;
  params.c = x.c.data;
  params.state = x.state.data;
  params.o = o;
  params.indices = integers_of(x.pool, x.indices);
  params.gates = gates_of(x.gates, options);
  params.x_b = x.x.strides[0];
  params.x_h = x.x.strides[2];
  params.b_b = x.b.strides[0];
  params.b_h = x.b.strides[2];
  params.c_b = x.c.strides[0];
  params.c_h = x.c.strides[2];
  params.state_b = x.state.strides[0];
  params.state_h = x.state.strides[1];
  params.x_group = group(x.x);
  params.b_group = group(x.b);
  params.c_group = group(x.c);
  params.values = static_cast<int>(V);
  const StepKind kind = step_kind(x);
  const int rows = step_block_rows(kind.K, static_cast<int>(x.state.bytes()), {kind.threads, kind.rows});
  const Grid grid{static_cast<unsigned>((V + rows - 1) / rows), static_cast<unsigned>(H), static_cast<unsigned>(B)};
  kernel.launch_early(grid, static_cast<unsigned>(kind.threads), &params, stream);
}

// --- of a whole Mamba2 block ---

namespace {

// Heads that share one of a kind.
struct Mamba2Groups {
  int x, b, c, norm;

  explicit Mamba2Groups(const Mamba2Shape& shape)
      : x(shape.heads / shape.x_heads),
        b(shape.heads / shape.b_heads),
        c(shape.heads / shape.c_heads),
        norm(shape.heads / shape.norms) {}
};

// Of those that `group` neighbours share, how many the numbers from first to last need.
int shared_by(int first, int last, int group) { return last / group - first / group + 1; }

bool has_shapes(const Mamba2Inputs& x) {
  if (x.z.dims != 4 || x.xbc.dims != 3 || x.conv_weight.dims != 2 || x.norm_weight.dims != 2) return false;
  if (x.conv_state.dims != 3 || x.state.dims != 4 || x.K <= 0) return false;
  const auto B = x.z.shape[0], H = x.z.shape[2], V = x.z.shape[3], D = x.xbc.shape[2], W = x.conv_weight.shape[1];
  const auto for_c = D - x.x_heads * V - x.b_heads * x.K, rows = x.pool ? x.state.shape[0] : B;
  const auto NG = x.norm_weight.shape[0];
  if (for_c % x.K != 0 || !divides(for_c / x.K, H) || !divides(x.x_heads, H) || !divides(x.b_heads, H)) return false;
  if (!has_shape(x.z, B, 1, H, V) || !has_shape(x.xbc, B, 1, D) || !has_shape(x.conv_weight, D, W)) return false;
  if ((x.has_conv_bias && !has_shape(x.conv_bias, D)) || (x.pool && !has_shape(x.indices, B))) return false;
  if (!divides(NG, H) || !has_shape(x.norm_weight, NG, H / NG * V) || !has_shapes(x.gates, B, H)) return false;
  return has_shape(x.state, rows, H, V, x.K) && has_shape(x.conv_state, rows, D, W);
}

bool is_contiguous(const Tensor& tensor, int from) {
  std::int64_t step = 1;
  for (int i = tensor.dims - 1; i >= from; step *= tensor.shape[i--]) {
    if (tensor.shape[i] > 1 && tensor.strides[i] != step) return false;
  }
  return true;
}

bool is_aligned(const Tensor& tensor) { return reinterpret_cast<std::uintptr_t>(tensor.data) % kRowAlignment == 0; }

std::string wrong_layout(const Mamba2Inputs& x) {
  const auto W = x.conv_weight.shape[1];
  if (x.z.strides[3] != 1 || x.xbc.strides[2] != 1) return "the last dim of z or of xbc is not contiguous";
  if (!is_contiguous(x.conv_weight, 0) || !is_contiguous(x.norm_weight, 0) ||
      (x.has_conv_bias && !is_contiguous(x.conv_bias, 0))) {
    return "conv_weight, conv_bias or norm_weight is not contiguous";
  }
  if (!is_aligned(x.conv_weight) || !is_aligned(x.conv_state)) {
    return "conv_weight or conv_state does not start at a multiple of 16 bytes";
  }
  const auto rows_apart = x.conv_state.shape[0] > 1 ? x.conv_state.strides[0] : W;
  if (!is_contiguous(x.conv_state, 1) || rows_apart % W != 0) return "the rows of conv_state are not contiguous";
  return name_unaligned({{"state", &x.state}});
}

}  // namespace

std::string mamba2_step_why_not(const Mamba2Inputs& x, int device_type) {
  const StepGateInputs& gates = x.gates;
  if (x.z.device_type != device_type) return "z is not on a CUDA device";
  if (!are_on_one_device({&x.z, &x.xbc, &x.conv_weight, if_there(x.has_conv_bias, x.conv_bias), &x.norm_weight,
                          &x.conv_state, &x.state, &gates.dt, &gates.a, if_there(gates.has_d, gates.d),
                          if_there(gates.has_bias, gates.dt_bias), if_there(x.pool, x.indices)},
                         device_type)) {
    return "the tensors are not on one device";
  }
  if (!has_shapes(x)) return kWrongShapes;
  if (x.xbc.type != x.z.type || !is_kernel_type(x.z.type)) {
    return "z and xbc are not of one dtype, bfloat16, float16 or float32";
  }
  const auto weights = x.conv_weight.type;
  if (x.norm_weight.type != weights || (x.has_conv_bias && x.conv_bias.type != weights) || !is_kernel_type(weights)) {
    return "conv_weight, conv_bias and norm_weight are not of one dtype, bfloat16, float16 or float32";
  }
  if (!is_kernel_type(x.conv_state.type)) return "conv_state is not bfloat16, float16 or float32";
  const auto B = x.z.shape[0], H = x.z.shape[2], V = x.z.shape[3], W = x.conv_weight.shape[1];
  if (std::string reason = why_not(gates, x.state, x.pool, x.indices, B); !reason.empty()) return reason;
  if (W < 2 || W > 4) return "the convolution's width is " + std::to_string(W) + ", not 2 to 4";
  if (std::string wrong = wrong_layout(x); !wrong.empty()) return wrong;
  if (H * V >= 1 << 16) return "H V is " + std::to_string(H * V) + ", not below 65536";
  return "";
}

Mamba2Shape mamba2_shape(const Mamba2Inputs& x) {
  const auto of = [](std::int64_t number) { return static_cast<int>(number); };
  const auto B = x.z.shape[0], V = x.z.shape[3], c_channels = x.xbc.shape[2] - x.x_heads * V - x.b_heads * x.K;
  Mamba2Shape shape{};
  shape.heads = of(x.z.shape[2]);
  shape.values = of(V);
  shape.K = of(x.K);
  shape.W = of(x.conv_weight.shape[1]);
  shape.x_heads = of(x.x_heads);
  shape.b_heads = of(x.b_heads);
  shape.c_heads = of(c_channels / x.K);
  shape.norms = of(x.norm_weight.shape[0]);
  shape.state_bytes = of(x.state.bytes());
  shape.conv_bytes = of(x.conv_state.bytes());
  const Mamba2Groups group(shape);
  shape.set = std::lcm(std::lcm(group.x, group.b), std::lcm(group.c, group.norm));
  shape.few = B * (shape.heads / shape.set) <= kMamba2FewSets;
  return shape;
}

Mamba2Plan mamba2_plan(const Mamba2Shape& shape) {
  const int V = shape.values, K = shape.K;
  const Mamba2Groups group(shape);
  Mamba2Plan plan{};
  plan.shape = shape;
  plan.cluster = mamba2_cluster(shape.set, V, shape.few);
  plan.rows = shape.set * V / plan.cluster;
  int heads = 0, channels = 0;  // that a block needs, at most
  for (int block = 0; block < plan.cluster; ++block) {
    const int first_row = block * plan.rows, last_row = first_row + plan.rows - 1;
    const int first = first_row / V, last = last_row / V;
    const int of_b_and_c = shared_by(first, last, group.b) + shared_by(first, last, group.c);
    channels = std::max(channels, shared_by(first, last, group.x) * V + of_b_and_c * K);
    heads = std::max(heads, last - first + 1);
    plan.sums += shared_by(first_row, last_row, group.norm * V);
  }
  if (plan.rows % (group.norm * V) == 0) plan.sums = 0;
  plan.passes = mamba2_passes(K, shape.state_bytes, plan.rows, shape.few);
  plan.shared = mamba2_shared(plan.passes.bytes, shape.set / group.norm, plan.cluster, heads, channels, plan.rows,
                              shape.W * shape.conv_bytes);
  plan.fits = plan.shared.bytes <= kMamba2MaxShared && heads <= plan.passes.team.threads;
  return plan;
}

Mamba2Kind mamba2_step_kind(const Mamba2Inputs& x, const Mamba2Plan& plan) {
  const int K = static_cast<int>(x.K), W = static_cast<int>(x.conv_weight.shape[1]);
  return {x.z.device, x.z.type, x.conv_state.type, x.conv_weight.type, x.state.type, K, W, plan.passes.team.threads,
          plan.passes.team.rows};
}

void mamba2_step(const Kernel& kernel, const Mamba2Inputs& x, const Mamba2Plan& plan, const Mamba2Options& options,
                 void* y, void* stream) {
  const auto B = x.z.shape[0];
  if (B == 0) return;
  const Mamba2Shape& shape = plan.shape;
  const Mamba2Groups group(shape);
  const auto by = [](int number) { return divider(static_cast<Word>(number)); };
  Mamba2StepParams params{};
  params.z = x.z.data;
  params.xbc = x.xbc.data;
  params.conv_weight = x.conv_weight.data;
  params.conv_bias = x.has_conv_bias ? x.conv_bias.data : nullptr;
  params.norm_weight = x.norm_weight.data;
  params.conv_state = x.conv_state.data;
  params.state = x.state.data;
  params.y = y;
  params.indices = integers_of(x.pool, x.indices);
  params.gates = gates_of(x.gates, options.step);
  params.z_b = x.z.strides[0];
  params.z_h = x.z.strides[2];
  params.xbc_b = x.xbc.strides[0];
  params.conv_b = x.conv_state.strides[0];
  params.state_b = x.state.strides[0];
  params.state_h = x.state.strides[1];
  params.heads = shape.heads;
  params.values = shape.values;
  params.x_heads = shape.x_heads;
  params.b_heads = shape.b_heads;
  params.x_group = group.x;
  params.b_group = group.b;
  params.c_group = group.c;
  params.norm_width = group.norm * shape.values;
  params.by_x_group = by(group.x);
  params.by_b_group = by(group.b);
  params.by_c_group = by(group.c);
  params.by_values = by(shape.values);
  params.by_norm_width = by(params.norm_width);
  params.by_rows = by(plan.rows);
  params.set = shape.set;
  params.rows = plan.rows;
  params.passes = plan.passes.all;
  params.held = plan.passes.held;
  params.sums = plan.sums;
  params.shared = plan.shared;
  params.per_norm_width = 1.0f / static_cast<float>(params.norm_width);
  params.eps = options.eps;
  params.norm_before_gate = options.norm_before_gate;
  params.settled_state = options.settled_state;
  const auto cluster = static_cast<unsigned>(plan.cluster);
  const Grid grid{cluster, static_cast<unsigned>(shape.heads / shape.set), static_cast<unsigned>(B)};
  kernel.launch_clusters(grid, cluster, static_cast<unsigned>(plan.passes.team.threads),
                         static_cast<unsigned>(plan.shared.bytes), &params, stream);
}

}  // namespace hylo::ssd
