#include "bindings/ssd_step.h"

#include <limits>
#include <utility>

#include "bindings/positional.h"

namespace py = pybind11;

namespace hylo {
namespace {

using ssd::Mamba2Inputs;
using ssd::Mamba2Kind;
using ssd::Mamba2Plan;
using ssd::Mamba2Shape;
using ssd::StepInputs;
using ssd::StepKind;
using ssd::StepOptions;

constexpr const char* kTooMany = "more heads share channels or a norm than a cluster of thread blocks has room for";

bool read_limits(py::handle dt_limit, StepOptions& out) {
  double least = -std::numeric_limits<double>::infinity(), greatest = -least;
  if (!dt_limit.is_none()) {
    const bool pair = PyTuple_Check(dt_limit.ptr()) || PyList_Check(dt_limit.ptr());
    if (!pair || py::len(dt_limit) != 2) return false;
    const auto both = py::reinterpret_borrow<py::sequence>(dt_limit);
    if (!read_number(both[0], least) || !read_number(both[1], greatest) || !(least <= greatest)) return false;
  }
  out.least = static_cast<float>(least);
  out.greatest = static_cast<float>(greatest);
  return true;
}

bool read_dims(PyObject* const* from, Mamba2Inputs& out) {
  std::int64_t* const dims[] = {&out.K, &out.x_heads, &out.b_heads};
  for (int i = 0; i < 3; ++i) {
    if (!PyLong_Check(from[i])) return false;
    *dims[i] = PyLong_AsLongLong(from[i]);
    if (*dims[i] == -1 && PyErr_Occurred()) throw py::error_already_set();
  }
  return true;
}

void expect(Py_ssize_t count, Py_ssize_t wanted) {
  if (count != wanted) throw py::type_error(std::to_string(wanted) + " arguments are expected");
}

}  // namespace

// --- SsdStep ---

SsdStep::SsdStep(const py::module_& torch, py::object load, int device_type)
    : torch_(torch, device_type), load_(std::move(load)), device_type_(device_type) {}

py::object SsdStep::run(const py::tuple& tensors, bool softplus, py::handle dt_limit) {
  return launch(TorchTensors::items<kTensors>(tensors), softplus, dt_limit, false);
}

py::object SsdStep::direct(PyObject* const* arguments, Py_ssize_t count) {
  expect(count, kTensors + 2);
  PyObject* const* const options = arguments + kTensors;
  if (!PyBool_Check(options[0])) return py::str("dt_softplus is no bool");
  return launch(arguments, options[0] == Py_True, options[1], true);
}

py::object SsdStep::launch(PyObject* const* tensors, bool softplus, py::handle dt_limit, bool direct) {
  StepInputs inputs{};
  StepOptions options{softplus, 0.0f, 0.0f};
  const std::string reason = view(tensors, direct, inputs);
  if (!reason.empty()) return py::str(reason);
  if (!read_limits(dt_limit, options)) return py::str("dt_limit is not (least, greatest)");
  const Kernels::Loaded& kind = loaded(step_kind(inputs));
  if (kind.kernel == nullptr) return kind.found;

  const auto B = inputs.x.shape[0], H = inputs.state.shape[1], V = inputs.state.shape[2];
  Tensor made;
  py::object o = torch_.empty(tensors[0], inputs.x, inputs.x.type, {B, 1, H, V});
  if (!torch_.view(o, made)) return py::str(TorchTensors::kNotAllocated);
  step(*kind.kernel, inputs, options, made.data, torch_.stream(inputs.x));
  return o;
}

py::object SsdStep::why_not(const py::tuple& tensors) {
  StepInputs inputs{};
  const std::string reason = view(TorchTensors::items<kTensors>(tensors), false, inputs);
  if (!reason.empty()) return py::str(reason);
  const Kernels::Loaded& kind = loaded(step_kind(inputs));
  return kind.kernel == nullptr ? kind.found : py::none();
}

std::string SsdStep::view(PyObject* const* tensors, bool direct, StepInputs& x) const {
  Tensor* const views[] = {&x.x, &x.gates.dt, &x.gates.a,       &x.b,      &x.c,
                           &x.state, &x.gates.d, &x.gates.dt_bias, &x.indices};
  constexpr int kAlways = 6;
  bool there[kTensors];
  if (!torch_.view(tensors, direct, kAlways, views, there)) return TorchTensors::kUnseen;
  x.gates.has_d = there[6];
  x.gates.has_bias = there[7];
  x.pool = there[8];
  return step_why_not(x, device_type_);
}

const SsdStep::Kernels::Loaded& SsdStep::loaded(const StepKind& kind) {
  return kernels_.find(kind, [this](const StepKind& of) {
    return load_(of.device, build_name(of.type), build_name(of.state), of.K, of.threads, of.rows);
  });
}

// --- Mamba2Step ---

Mamba2Step::Mamba2Step(const py::module_& torch, py::object load, int device_type)
    : torch_(torch, device_type), load_(std::move(load)), device_type_(device_type) {}

py::object Mamba2Step::run(const py::tuple& tensors, const py::tuple& dims, bool softplus, py::handle dt_limit,
                           py::handle eps, bool norm_before_gate, bool settled_state) {
  const Options options{softplus, dt_limit, eps, norm_before_gate, settled_state};
  return launch(TorchTensors::items<kTensors>(tensors), TorchTensors::items<kDims>(dims), options, false);
}

py::object Mamba2Step::direct(PyObject* const* arguments, Py_ssize_t count) {
  expect(count, kTensors + kDims + 5);
  PyObject* const* const dims = arguments + kTensors;
  PyObject* const* const options = dims + kDims;
  const auto is_true = [options](int i) { return options[i] == Py_True; };
  const bool bools = PyBool_Check(options[0]) && PyBool_Check(options[3]) && PyBool_Check(options[4]);
  if (!bools) return py::str("dt_softplus, norm_before_gate or settled_state is no bool");
  return launch(arguments, dims, {is_true(0), options[1], options[2], is_true(3), is_true(4)}, true);
}

py::object Mamba2Step::launch(PyObject* const* tensors, PyObject* const* dims, const Options& asked, bool direct) {
  Mamba2Inputs inputs{};
  double epsilon = 0.0;
  ssd::Mamba2Options options{{asked.softplus, 0.0f, 0.0f}, 0.0f, asked.norm_before_gate, asked.settled_state};
  const std::string reason = view(tensors, dims, direct, inputs);
  if (!reason.empty()) return py::str(reason);
  if (!read_limits(asked.dt_limit, options.step)) return py::str("dt_limit is not (least, greatest)");
  if (!read_number(asked.eps, epsilon)) return py::str("eps is no number");
  options.eps = static_cast<float>(epsilon);
  const Mamba2Plan& plan = planned(mamba2_shape(inputs));
  if (!plan.fits) return py::str(kTooMany);
  const Kernels::Loaded& kind = loaded(mamba2_step_kind(inputs, plan));
  if (kind.kernel == nullptr) return kind.found;

  Tensor made;
  py::object y = torch_.empty_like(tensors[0], inputs.z);
  if (!torch_.view(y, made)) return py::str(TorchTensors::kNotAllocated);
  mamba2_step(*kind.kernel, inputs, plan, options, made.data, torch_.stream(inputs.z));
  return y;
}

py::object Mamba2Step::why_not(const py::tuple& tensors, const py::tuple& dims) {
  Mamba2Inputs inputs{};
  const std::string reason =
      view(TorchTensors::items<kTensors>(tensors), TorchTensors::items<kDims>(dims), false, inputs);
  if (!reason.empty()) return py::str(reason);
  const Mamba2Plan& plan = planned(mamba2_shape(inputs));
  if (!plan.fits) return py::str(kTooMany);
  const Kernels::Loaded& kind = loaded(mamba2_step_kind(inputs, plan));
  return kind.kernel == nullptr ? kind.found : py::none();
}

std::string Mamba2Step::view(PyObject* const* tensors, PyObject* const* dims, bool direct, Mamba2Inputs& x) const {
  Tensor* const views[] = {&x.z,           &x.xbc,        &x.gates.dt, &x.conv_weight, &x.gates.a, &x.norm_weight,
                           &x.conv_state,  &x.state,      &x.conv_bias, &x.gates.d,    &x.gates.dt_bias,
                           &x.indices};
  constexpr int kAlways = 8;
  bool there[kTensors];
  if (!torch_.view(tensors, direct, kAlways, views, there)) return TorchTensors::kUnseen;
  if (!read_dims(dims, x)) return "d_state, x_heads or b_heads is no integer";
  x.has_conv_bias = there[8];
  x.gates.has_d = there[9];
  x.gates.has_bias = there[10];
  x.pool = there[11];
  return mamba2_step_why_not(x, device_type_);
}

const Mamba2Plan& Mamba2Step::planned(const Mamba2Shape& shape) {
  for (const Mamba2Plan& known : plans_) {
    if (known.shape == shape) return known;
  }
  plans_.push_back(mamba2_plan(shape));
  return plans_.back();
}

const Mamba2Step::Kernels::Loaded& Mamba2Step::loaded(const Mamba2Kind& kind) {
  return kernels_.find(kind, [this](const Mamba2Kind& of) {
    return load_(of.device, build_name(of.type), build_name(of.conv_state), build_name(of.weights),
                 build_name(of.state), of.K, of.W, of.threads, of.rows, ssd::kMamba2MaxShared, ssd::kMaxCluster);
  });
}

void define_ssd_steps(py::module_& m) {
  py::class_<SsdStep>(m, "SsdStep")
      .def(py::init<const py::module_&, py::object, int>(), py::arg("torch"), py::arg("load"),
           py::arg("device_type") = kCuda)
      .def("run", &SsdStep::run)
      .def_property_readonly("direct", &positional_function<SsdStep, &SsdStep::direct>)
      .def("why_not", &SsdStep::why_not);
  py::class_<Mamba2Step>(m, "Mamba2Step")
      .def(py::init<const py::module_&, py::object, int>(), py::arg("torch"), py::arg("load"),
           py::arg("device_type") = kCuda)
      .def("run", &Mamba2Step::run)
      .def_property_readonly("direct", &positional_function<Mamba2Step, &Mamba2Step::direct>)
      .def("why_not", &Mamba2Step::why_not);
}

}  // namespace hylo
