// The decode steps of the state-space scan and of a whole Mamba2 block, from torch tensors to their results in one
// call: every microsecond on the host counts there.
#pragma once

#include <pybind11/pybind11.h>

#include <deque>
#include <string>

#include "bindings/loaded_kernels.h"
#include "bindings/torch_tensors.h"
#include "ssd/launch_step.h"

namespace hylo {

class SsdStep {
 public:
  // load(device, type, state, K, threads, rows): the kernel compiled for that, or a str, the reason why there is none.
  // It is called once for each. device_type: DLPack's number; another than CUDA's is for tests with an emulated driver.
  SsdStep(const pybind11::module_& torch, pybind11::object load, int device_type);

  // Gives o, or a str: the reason why these inputs are not taken. The state is updated in place.
  // tensors: x, dt, a, b, c, state, d, dt_bias, indices; the last three may be None.
  // dt_limit: None or two numbers.
  pybind11::object run(const pybind11::tuple& tensors, bool softplus, pybind11::handle dt_limit);

  // The same of the nine tensors, softplus and dt_limit side by side, where TorchTensors::view finds no need of torch's
  // dispatcher.
  pybind11::object direct(PyObject* const* arguments, Py_ssize_t count);

  // That reason, or None.
  pybind11::object why_not(const pybind11::tuple& tensors);

 private:
  using Kernels = LoadedKernels<ssd::StepKind>;
  static constexpr int kTensors = 9;

  pybind11::object launch(PyObject* const* tensors, bool softplus, pybind11::handle dt_limit, bool direct);
  std::string view(PyObject* const* tensors, bool direct, ssd::StepInputs& inputs) const;
  const Kernels::Loaded& loaded(const ssd::StepKind& kind);

  TorchTensors torch_;
  pybind11::object load_;
  int device_type_;
  Kernels kernels_;
};

class Mamba2Step {
 public:
  // The same with load(device, type, conv state, weights, state, K, W, threads, rows, shared bytes, cluster).
  Mamba2Step(const pybind11::module_& torch, pybind11::object load, int device_type);

  // Gives y, or a str. tensors: z, xbc, dt, conv_weight, a, norm_weight, conv_state, state, conv_bias, d, dt_bias,
  // indices; the last four may be None. dims: d_state, x_heads, b_heads.
  pybind11::object run(const pybind11::tuple& tensors, const pybind11::tuple& dims, bool softplus,
                       pybind11::handle dt_limit, pybind11::handle eps, bool norm_before_gate, bool settled_state);

  // The same of the tensors, dims and what follows, side by side, as above.
  pybind11::object direct(PyObject* const* arguments, Py_ssize_t count);

  pybind11::object why_not(const pybind11::tuple& tensors, const pybind11::tuple& dims);

 private:
  using Kernels = LoadedKernels<ssd::Mamba2Kind>;
  static constexpr int kTensors = 12, kDims = 3;

  // What of a call is no tensor and no dim.
  struct Options {
    bool softplus;
    pybind11::handle dt_limit, eps;
    bool norm_before_gate, settled_state;
  };

  pybind11::object launch(PyObject* const* tensors, PyObject* const* dims, const Options& options, bool direct);
  std::string view(PyObject* const* tensors, PyObject* const* dims, bool direct, ssd::Mamba2Inputs& inputs) const;
  const ssd::Mamba2Plan& planned(const ssd::Mamba2Shape& shape);
  const Kernels::Loaded& loaded(const ssd::Mamba2Kind& kind);

  TorchTensors torch_;
  pybind11::object load_;
  int device_type_;
  Kernels kernels_;
  std::deque<ssd::Mamba2Plan> plans_;  // what it holds stays in place
};

void define_ssd_steps(pybind11::module_& m);

}  // namespace hylo
