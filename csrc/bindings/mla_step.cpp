#include "bindings/mla_step.h"

#include <utility>

#include "bindings/positional.h"

namespace py = pybind11;

namespace hylo {
namespace {

using mla_step::Inputs;
using mla_step::Kind;
using mla_step::Workspace;

// None is no column; a number must be positive.
bool read_columns(py::handle from, std::int64_t& out) {
  out = 0;
  if (from.is_none()) return true;
  if (!PyLong_Check(from.ptr())) return false;
  out = PyLong_AsLongLong(from.ptr());
  if (out == -1 && PyErr_Occurred()) throw py::error_already_set();
  return out > 0;
}

// What the attention is given: the caller's tensors, and those in the workspace once they are placed there.
class AttentionInputs {
 public:
  explicit AttentionInputs(const Inputs& x) {
    const std::int64_t B = x.q_nope.shape[0], H = x.q_nope.shape[2], R = x.w_uk.shape[2], E = x.q_rope.shape[3];
    set(latent_, {B, 1, H, R}, {H * R, H * R, R, 1});
    set(rotated_, {B, 1, H, E}, {H * E, H * E, E, 1});
    set(counted_, {B, 0, 0, 0}, {1, 0, 0, 0});
    set(scales_, {x.cache.shape[0], x.cache.shape[1], x.key_scales, 0}, {x.cache.strides[0], x.cache.strides[1], 1, 0});
    const auto tensor = [&x](void* data, int dims, ElementType type, const Layout& of) {
      return Tensor{data, x.q_nope.device_type, x.q_nope.device, dims, type, of.shape, of.strides, 0};
    };
    const ElementType type = x.q_nope.type;
    all_.q_nope = tensor(nullptr, 4, type, latent_);
    all_.q_rope = tensor(nullptr, 4, type, rotated_);
    all_.cache = x.cache;
    all_.lengths = tensor(nullptr, 1, kInt32, counted_);
    all_.starts = x.starts;
    all_.has_starts = x.has_starts;
    all_.table = x.table;
    all_.paged = x.paged;
    all_.scaled = x.key_scales > 0;
    all_.scales = tensor(static_cast<char*>(x.cache.data) + (R + E) * x.cache.bytes(), 3, type, scales_);
  }
  AttentionInputs(const AttentionInputs&) = delete;
  AttentionInputs& operator=(const AttentionInputs&) = delete;

  void place(const Workspace& at, char* start) {
    all_.q_nope.data = start + 2 * at.latent;
    all_.q_rope.data = start + 2 * at.rotated;
    all_.lengths.data = start + 2 * at.counted;
  }

  const mla_absorb::Inputs& all() const { return all_; }

 private:
  struct Layout {
    std::int64_t shape[4], strides[4];
  };

  static void set(Layout& of, const std::int64_t (&shape)[4], const std::int64_t (&strides)[4]) {
    for (int i = 0; i < 4; ++i) {
      of.shape[i] = shape[i];
      of.strides[i] = strides[i];
    }
  }

  Layout latent_, rotated_, counted_, scales_;
  mla_absorb::Inputs all_;
};

bool has_rows(const Inputs& x) { return x.q_nope.shape[0] > 0 && x.q_nope.shape[2] > 0; }

}  // namespace

MlaStep::MlaStep(const py::module_& torch, py::object load, py::object attention, int device_type)
    : torch_(torch, device_type),
      load_(std::move(load)),
      held_attention_(std::move(attention)),
      attention_(held_attention_.cast<MlaAbsorb&>()),
      device_type_(device_type) {}

py::object MlaStep::run(const py::tuple& tensors, py::handle scale, py::handle key_scale) {
  return launch(TorchTensors::items<kTensors>(tensors), scale, key_scale, false);
}

py::object MlaStep::direct(PyObject* const* arguments, Py_ssize_t count) {
  if (count != kTensors + 2) throw py::type_error("fourteen arguments are expected");
  return launch(arguments, arguments[kTensors], arguments[kTensors + 1], true);
}

py::object MlaStep::launch(PyObject* const* tensors, py::handle scale, py::handle key_scale, bool direct) {
  Inputs x{};
  mla_absorb::Options options{0.0f, true};
  const std::string reason = view(tensors, key_scale, direct, x);
  if (!reason.empty()) return py::str(reason);
  if (!read_number(scale, options.scale)) return py::str("scale is no number");
  AttentionInputs attention(x);
  Found found{};
  if (py::object refused = find(x, attention.all(), found); !refused.is_none()) return refused;

  Tensor seen_o;
  const Tensor& q = x.q_nope;
  py::object o = torch_.empty(tensors[0], q, q.type, {q.shape[0], 1, q.shape[2], x.w_uv.shape[1]});
  if (!has_rows(x)) return o;
  void* const stream = torch_.stream(q);
  const Workspace at = workspace_of(x);
  const MlaAbsorb::Ready ready =
      attention_.prepare(*found.attention, attention.all(), {tensors[0], stream, {}, at.size / 2 + 1});
  if (!torch_.view(o, seen_o) || !ready.workspace.seen) return py::str(TorchTensors::kNotAllocated);
  char* const workspace = static_cast<char*>(ready.workspace.start);
  attention.place(at, workspace);
  launch_queries(*found.queries, x, at, workspace, stream);
  mla_absorb::launch(*found.attention, attention.all(), options, ready.plan, workspace + 2 * at.results, nullptr,
                     ready.partial, ready.workspace.tickets, stream);
  launch_values(*found.values, x, at, workspace, seen_o.data, stream);
  return o;
}

py::object MlaStep::why_not(const py::tuple& tensors, py::handle key_scale) {
  Inputs x{};
  const std::string reason = view(TorchTensors::items<kTensors>(tensors), key_scale, false, x);
  if (!reason.empty()) return py::str(reason);
  Found found{};
  return find(x, AttentionInputs(x).all(), found);
}

std::string MlaStep::view(PyObject* const* tensors, py::handle key_scale, bool direct, Inputs& x) const {
  Tensor* const views[] = {&x.q_nope,   &x.q_rope, &x.kv_new, &x.w_uk, &x.w_uv,   &x.cache,
                           &x.lengths, &x.position, &x.cos,   &x.sin,  &x.starts, &x.table};
  constexpr int kAlways = 10;
  bool there[kTensors];
  if (!torch_.view(tensors, direct, kAlways, views, there)) return TorchTensors::kUnseen;
  if (!read_columns(key_scale, x.key_scales)) return "key_scale is no positive integer";
  x.has_starts = there[10];
  x.paged = there[11];
  return mla_step::why_not(x, device_type_);
}

py::object MlaStep::find(const Inputs& x, const mla_absorb::Inputs& attention, Found& found) {
  if (!has_rows(x)) return py::none();
  if (py::object refused = attention_.find(attention, found.attention); !refused.is_none()) return refused;
  for (const bool behind : {false, true}) {
    const Kernels::Loaded& kind = loaded(kind_of(x, behind));
    if (kind.kernel == nullptr) return kind.found;
    (behind ? found.values : found.queries) = kind.kernel;
  }
  return py::none();
}

const MlaStep::Kernels::Loaded& MlaStep::loaded(const Kind& kind) {
  return kernels_.find(kind, [this](const Kind& of) {
    return load_(of.device, build_name(of.type), of.nope, of.R, of.values);
  });
}

void define_mla_step(py::module_& m) {
  py::class_<MlaStep>(m, "MlaStep")
      .def(py::init<const py::module_&, py::object, py::object, int>(), py::arg("torch"), py::arg("load"),
           py::arg("attention"), py::arg("device_type") = kCuda)
      .def("run", &MlaStep::run)
      .def_property_readonly("direct", &positional_function<MlaStep, &MlaStep::direct>)
      .def("why_not", &MlaStep::why_not);
}

}  // namespace hylo
