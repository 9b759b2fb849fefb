// The decode step from torch tensors to its result in one call: every microsecond on the host counts there.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "bindings/loaded_kernels.h"
#include "bindings/torch_tensors.h"
#include "gated_delta_rule/launch.h"

namespace hylo {

class GatedDeltaRuleStep {
 public:
  // load(device, type, state, K, raw): the kernel compiled for that, or a str, the reason why there is none. It is
  // called once for each. device_type: DLPack's number; another than CUDA's is for tests with an emulated driver.
  GatedDeltaRuleStep(const pybind11::module_& torch, pybind11::object load, int device_type);

  // Gives o, or a str: the reason why these tensors are not taken. The state is updated in place.
  // tensors: q, k, v, gate, strength, state, a_log, dt_bias, indices; the last three may be None.
  // scale: None is K ** -0.5. settled_state: as the op has it. direct: as TorchTensors::view has it.
  pybind11::object run(const pybind11::tuple& tensors, pybind11::handle scale, bool normalise, float most_strength,
                       bool settled_state, bool direct);

  // That reason, or None.
  pybind11::object why_not(const pybind11::tuple& tensors);

 private:
  using Kernels = LoadedKernels<gated_delta_rule::StepKind>;

  std::string view(const pybind11::tuple& tensors, bool direct, gated_delta_rule::StepInputs& inputs) const;
  const Kernels::Loaded& loaded(const gated_delta_rule::StepKind& kind);

  TorchTensors torch_;
  pybind11::object load_;
  int device_type_;
  Kernels kernels_;
};

void define_gated_delta_rule_step(pybind11::module_& m);

}  // namespace hylo
