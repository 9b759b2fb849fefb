#include "bindings/gated_delta_rule_step.h"

#include <cmath>
#include <utility>

#include "bindings/positional.h"

namespace py = pybind11;

namespace hylo {

using gated_delta_rule::StepInputs;
using gated_delta_rule::StepKind;

GatedDeltaRuleStep::GatedDeltaRuleStep(const py::module_& torch, py::object load, int device_type)
    : torch_(torch, device_type), load_(std::move(load)), device_type_(device_type) {}

py::object GatedDeltaRuleStep::run(const py::tuple& tensors, py::handle scale, bool normalise, float most_strength,
                                   bool settled_state, bool direct) {
  StepInputs inputs{};
  const std::string reason = view(tensors, direct, inputs);
  if (!reason.empty()) return py::str(reason);
  const Kernels::Loaded& kind = loaded(step_kind(inputs));
  if (kind.kernel == nullptr) return kind.found;
  double factor = 1.0 / std::sqrt(static_cast<double>(inputs.q.shape[3]));
  if (!scale.is_none() && !read_number(scale, factor)) return py::str("scale is no number");

  Tensor made;
  py::object o = torch_.empty_like(PyTuple_GET_ITEM(tensors.ptr(), 2), inputs.v);
  if (!torch_.view(o, made)) return py::str(TorchTensors::kNotAllocated);
  step(*kind.kernel, inputs, {static_cast<float>(factor), normalise, most_strength, settled_state}, made.data,
       torch_.stream(inputs.q));
  return o;
}

py::object GatedDeltaRuleStep::why_not(const py::tuple& tensors) {
  StepInputs inputs{};
  const std::string reason = view(tensors, false, inputs);
  if (!reason.empty()) return py::str(reason);
  const Kernels::Loaded& kind = loaded(step_kind(inputs));
  return kind.kernel == nullptr ? kind.found : py::none();
}

std::string GatedDeltaRuleStep::view(const py::tuple& tensors, bool direct, StepInputs& inputs) const {
  Tensor* const views[] = {&inputs.q,     &inputs.k,     &inputs.v,       &inputs.gate,   &inputs.strength,
                           &inputs.state, &inputs.a_log, &inputs.dt_bias, &inputs.indices};
  constexpr int kAlways = 6;
  bool there[9];
  if (!torch_.view(tensors, direct, kAlways, views, there)) return TorchTensors::kUnseen;
  inputs.raw = there[6] || there[7];
  inputs.pool = there[8];
  return step_why_not(inputs, device_type_);
}

const GatedDeltaRuleStep::Kernels::Loaded& GatedDeltaRuleStep::loaded(const StepKind& kind) {
  return kernels_.find(kind, [this](const StepKind& of) {
    return load_(of.device, build_name(of.type), build_name(of.state), of.K, of.raw, of.team);
  });
}

void define_gated_delta_rule_step(py::module_& m) {
  py::class_<GatedDeltaRuleStep>(m, "GatedDeltaRuleStep")
      .def(py::init<const py::module_&, py::object, int>(), py::arg("torch"), py::arg("load"),
           py::arg("device_type") = kCuda)
      .def("run", &GatedDeltaRuleStep::run)
      .def("why_not", &GatedDeltaRuleStep::why_not);
}

}  // namespace hylo
