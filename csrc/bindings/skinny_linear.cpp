#include "bindings/skinny_linear.h"

#include <tuple>
#include <utility>

#include "skinny_linear/traits.cuh"

namespace py = pybind11;

namespace hylo {

using skinny_linear::Inputs;
using skinny_linear::Kind;
using skinny_linear::Spread;

namespace {

Spread read_spread(py::handle from, const Inputs& inputs) {
  if (from.is_none()) return spread_of(inputs);
  const auto [cluster, ahead, rest] = from.cast<std::tuple<int, int, int>>();
  const Spread spread{cluster, ahead, rest};
  if (can_be(spread, inputs)) return spread;
  throw py::value_error("spread must be 1 to 8 blocks, with two tiles of 64 columns for each, and numbers of tiles");
}

}  // namespace

SkinnyLinear::SkinnyLinear(const py::module_& torch, py::object load, int device_type)
    : torch_(torch, device_type), load_(std::move(load)), device_type_(device_type) {}

py::object SkinnyLinear::run(py::handle x, py::handle weight, py::handle residual, bool swiglu, bool constant,
                             py::handle spread, py::handle norm, float eps, py::handle conv_weight, py::handle conv_state,
                             bool silu) {
  Inputs inputs{};
  inputs.swiglu = swiglu;
  inputs.silu = silu;
  inputs.eps = eps;
  const std::string reason =
      view({x.ptr(), weight.ptr(), residual.ptr(), norm.ptr(), conv_weight.ptr(), conv_state.ptr()}, inputs);
  if (!reason.empty()) return py::str(reason);
  const Spread wanted = read_spread(spread, inputs);
  const Kernels::Loaded& found = loaded(kind_of(inputs));
  if (found.kernel == nullptr) return found.found;

  Tensor y = inputs.residual;
  const std::int64_t B = inputs.x.shape[0], N = outputs_of(inputs);
  py::object made = inputs.has_residual ? py::reinterpret_borrow<py::object>(residual)
                                        : torch_.empty(x, inputs.x, inputs.x.type, {B, N});
  if (B == 0 || N == 0) return made;
  if (!inputs.has_residual && !torch_.view(made, y)) return py::str(TorchTensors::kNotAllocated);
  launch(*found.kernel, inputs, wanted, constant, y.data, torch_.stream(inputs.x));
  return made;
}

py::object SkinnyLinear::why_not(py::handle x, py::handle weight, py::handle residual, bool swiglu,
                                 py::handle norm, py::handle conv_weight, py::handle conv_state) {
  Inputs inputs{};
  inputs.swiglu = swiglu;
  const std::string reason =
      view({x.ptr(), weight.ptr(), residual.ptr(), norm.ptr(), conv_weight.ptr(), conv_state.ptr()}, inputs);
  if (!reason.empty()) return py::str(reason);
  const Kernels::Loaded& found = loaded(kind_of(inputs));
  return found.kernel == nullptr ? found.found : py::none();
}

std::string SkinnyLinear::view(PyObject* const (&tensors)[6], Inputs& inputs) const {
  Tensor* const views[] = {&inputs.x,    &inputs.weight,      &inputs.residual,
                           &inputs.norm, &inputs.conv_weight, &inputs.conv_state};
  constexpr int kAlways = 2;
  bool there[6];
  if (!torch_.view(tensors, false, kAlways, views, there)) return TorchTensors::kUnseen;
  inputs.has_residual = there[2];
  inputs.has_norm = there[3];
  inputs.has_conv = there[4] && there[5];
  return skinny_linear::why_not(inputs, device_type_);
}

const SkinnyLinear::Kernels::Loaded& SkinnyLinear::loaded(const Kind& kind) {
  return kernels_.find(kind, [this](const Kind& of) {
    return load_(of.device, build_name(of.type), of.B, of.convolves, skinny_linear::kSharedLimit,
                 skinny_linear::kMaxCluster);
  });
}

void define_skinny_linear(py::module_& m) {
  py::class_<SkinnyLinear>(m, "SkinnyLinear")
      .def(py::init<const py::module_&, py::object, int>(), py::arg("torch"), py::arg("load"),
           py::arg("device_type") = kCuda)
      .def("run", &SkinnyLinear::run, py::arg("x"), py::arg("weight"), py::arg("residual"), py::arg("swiglu"),
           py::arg("constant"), py::arg("spread") = py::none(), py::arg("norm") = py::none(), py::arg("eps") = 0.0f,
           py::arg("conv_weight") = py::none(), py::arg("conv_state") = py::none(), py::arg("silu") = false)
      .def("why_not", &SkinnyLinear::why_not, py::arg("x"), py::arg("weight"), py::arg("residual"), py::arg("swiglu"),
           py::arg("norm") = py::none(), py::arg("conv_weight") = py::none(), py::arg("conv_state") = py::none());
}

}  // namespace hylo
