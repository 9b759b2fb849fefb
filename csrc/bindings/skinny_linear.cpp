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
                             py::handle spread) {
  Inputs inputs{};
  inputs.swiglu = swiglu;
  const std::string reason = view(x, weight, residual, inputs);
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

py::object SkinnyLinear::why_not(py::handle x, py::handle weight, py::handle residual, bool swiglu) {
  Inputs inputs{};
  inputs.swiglu = swiglu;
  const std::string reason = view(x, weight, residual, inputs);
  if (!reason.empty()) return py::str(reason);
  const Kernels::Loaded& found = loaded(kind_of(inputs));
  return found.kernel == nullptr ? found.found : py::none();
}

std::string SkinnyLinear::view(py::handle x, py::handle weight, py::handle residual, Inputs& inputs) const {
  PyObject* const tensors[] = {x.ptr(), weight.ptr(), residual.ptr()};
  Tensor* const views[] = {&inputs.x, &inputs.weight, &inputs.residual};
  constexpr int kAlways = 2;
  bool there[3];
  if (!torch_.view(tensors, false, kAlways, views, there)) return TorchTensors::kUnseen;
  inputs.has_residual = there[2];
  return skinny_linear::why_not(inputs, device_type_);
}

const SkinnyLinear::Kernels::Loaded& SkinnyLinear::loaded(const Kind& kind) {
  return kernels_.find(kind, [this](const Kind& of) {
    return load_(of.device, build_name(of.type), of.B, skinny_linear::kSharedLimit, skinny_linear::kMaxCluster);
  });
}

void define_skinny_linear(py::module_& m) {
  py::class_<SkinnyLinear>(m, "SkinnyLinear")
      .def(py::init<const py::module_&, py::object, int>(), py::arg("torch"), py::arg("load"),
           py::arg("device_type") = kCuda)
      .def("run", &SkinnyLinear::run, py::arg("x"), py::arg("weight"), py::arg("residual"), py::arg("swiglu"),
           py::arg("constant"), py::arg("spread") = py::none())
      .def("why_not", &SkinnyLinear::why_not);
}

}  // namespace hylo
