// Products of few rows, from torch tensors to their result in one call.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "bindings/loaded_kernels.h"
#include "bindings/torch_tensors.h"
#include "skinny_linear/launch.h"

namespace hylo {

class SkinnyLinear {
 public:
  // load(device, type, B, convolves, shared_bytes, max_cluster): the kernel compiled for that, or a str, the reason why
  // there is none. device_type: DLPack's number; another than CUDA's is for tests with an emulated driver.
  SkinnyLinear(const pybind11::module_& torch, pybind11::object load, int device_type);

  // Gives y, which is the residual where there is one, or a str: the reason why these inputs are not taken. residual,
  // norm, conv_weight, conv_state: tensors or None. silu: of the convolution. constant: no kernel that may still run
  // writes the weights. spread: None or the numbers of a Spread.
  pybind11::object run(pybind11::handle x, pybind11::handle weight, pybind11::handle residual, bool swiglu,
                       bool constant, pybind11::handle spread, pybind11::handle norm, float eps,
                       pybind11::handle conv_weight, pybind11::handle conv_state, bool silu);

  // That reason, or None.
  pybind11::object why_not(pybind11::handle x, pybind11::handle weight, pybind11::handle residual, bool swiglu,
                           pybind11::handle norm, pybind11::handle conv_weight, pybind11::handle conv_state);

 private:
  using Kernels = LoadedKernels<skinny_linear::Kind>;

  // Of x, weight, residual, norm, conv_weight, conv_state.
  std::string view(PyObject* const (&tensors)[6], skinny_linear::Inputs& inputs) const;
  const Kernels::Loaded& loaded(const skinny_linear::Kind& kind);

  TorchTensors torch_;
  pybind11::object load_;
  int device_type_;
  Kernels kernels_;
};

void define_skinny_linear(pybind11::module_& m);

}  // namespace hylo
