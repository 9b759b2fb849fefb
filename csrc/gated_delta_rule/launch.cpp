#include "gated_delta_rule/launch.h"

#include "common/tensor_checks.h"
#include "gated_delta_rule/step_params.h"
#include "gated_delta_rule/step_traits.cuh"

namespace hylo::gated_delta_rule {
namespace {

constexpr std::int64_t kWidthUnit = 16, kMaxK = 256, kMaxGrid = 65535;

bool has_shapes(const StepInputs& x) {
  if (x.q.dims != 4 || x.v.dims != 4 || x.state.dims != 4) return false;
  const auto B = x.q.shape[0], G = x.q.shape[2], K = x.q.shape[3], H = x.v.shape[2], V = x.v.shape[3];
  if (!has_shape(x.q, B, 1, G, K) || !has_shape(x.k, B, 1, G, K) || !has_shape(x.v, B, 1, H, V)) return false;
  if (G == 0 || H % G != 0 || !has_shape(x.gate, B, 1, H) || !has_shape(x.strength, B, 1, H)) return false;
  if (x.raw && !(has_shape(x.a_log, H) && has_shape(x.dt_bias, H))) return false;
  if (x.pool && !has_shape(x.indices, B)) return false;
  return has_shape(x.state, x.pool ? x.state.shape[0] : B, H, K, V);
}

}  // namespace

std::string step_why_not(const StepInputs& x, int device_type) {
  if (x.q.device_type != device_type) return "q is not on a CUDA device";
  const auto if_there = [](bool there, const Tensor& tensor) { return there ? &tensor : nullptr; };
  if (!are_on_one_device({&x.q, &x.k, &x.v, &x.gate, &x.strength, &x.state, if_there(x.pool, x.indices),
                          if_there(x.raw, x.a_log), if_there(x.raw, x.dt_bias)},
                         device_type)) {
    return "the tensors are not on one device";
  }
  if (!has_shapes(x)) return "the shapes are not the op's";
  if (x.k.type != x.q.type || x.v.type != x.q.type || (x.q.type != kBf16 && x.q.type != kFp16 && x.q.type != kFp32)) {
    return "q, k and v are not of one dtype, bfloat16, float16 or float32";
  }
  for (const Tensor* gate : {&x.gate, &x.strength, &x.a_log, &x.dt_bias}) {
    if (gate->data != nullptr && scalar_type(gate->type) == kNoScalar) return "a gate is of no floating dtype";
  }
  if (x.state.type != kFp32 && x.state.type != kBf16) return "the state is not float32 or bfloat16";
  if (x.pool && !is_integer(x.indices)) return "state_indices are not int32 or int64";
  const auto B = x.q.shape[0], K = x.q.shape[3], H = x.v.shape[2], V = x.v.shape[3];
  if (K % kWidthUnit != 0 || K == 0 || K > kMaxK) {
    return "K is " + std::to_string(K) + ", not a multiple of 16 up to 256";
  }
  if (V % kWidthUnit != 0 || V == 0) return "V is " + std::to_string(V) + ", not a multiple of 16";
  if (B > kMaxGrid || H > kMaxGrid) return "there are more than 65535 sequences or heads";
  if (x.state.strides[2] != V) return "the states of heads are not contiguous";
  const char* names[] = {"q", "k", "v", "state"};
  const Tensor* rows[] = {&x.q, &x.k, &x.v, &x.state};
  for (int i = 0; i < 4; ++i) {
    if (!has_aligned_rows(*rows[i])) {
      return std::string("the last dim of ") + names[i] + " is not contiguous, or does not start at 16-byte multiples";
    }
  }
  return {};
}

StepKind step_kind(const StepInputs& x) {
  const auto K = x.q.shape[3];
  const int bytes = static_cast<int>(x.state.bytes());
  const auto all = x.q.shape[0] * x.v.shape[2] * K * x.v.shape[3] * bytes;
  return {x.q.device, x.q.type, x.state.type, static_cast<int>(K), x.raw, step_team(static_cast<int>(K), bytes, all)};
}

void step(const Kernel& kernel, const StepInputs& x, const StepOptions& options, void* o, void* stream) {
  const auto B = x.q.shape[0], G = x.q.shape[2], H = x.v.shape[2], V = x.v.shape[3];
  if (B == 0 || H == 0) return;
  StepParams params{};
  params.q = x.q.data;
  params.k = x.k.data;
  params.v = x.v.data;
  params.state = x.state.data;
  params.o = o;
  params.gate = scalar(x.gate);
  params.strength = scalar(x.strength);
  if (x.raw) {
    params.a_log = scalar(x.a_log);
    params.dt_bias = scalar(x.dt_bias);
  }
  if (x.pool) {
    params.indices = x.indices.data;
    params.indices_stride = x.indices.strides[0];
    params.wide_indices = x.indices.type == kInt64;
  }
  params.q_b = x.q.strides[0];
  params.q_h = x.q.strides[2];
  params.k_b = x.k.strides[0];
  params.k_h = x.k.strides[2];
  params.v_b = x.v.strides[0];
  params.v_h = x.v.strides[2];
  params.state_b = x.state.strides[0];
  params.state_h = x.state.strides[1];
  params.group = static_cast<int>(H / G);
  params.values = static_cast<int>(V);
  params.normalise = options.normalise;
  params.settled_state = options.settled_state;
  params.scale = options.scale;
  params.most_strength = options.most_strength;
  const int team = step_kind(x).team;
  const auto columns = step_columns(team, static_cast<int>(x.state.bytes()));
  const auto blocks = static_cast<unsigned>((V + columns - 1) / columns);
  const Grid grid{blocks, static_cast<unsigned>(H), static_cast<unsigned>(B)};
  kernel.launch_early(grid, static_cast<unsigned>(team), &params, stream);
}

}  // namespace hylo::gated_delta_rule
