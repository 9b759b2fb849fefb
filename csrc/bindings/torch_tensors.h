// torch tensors seen from C++ without torch's headers: through its table of C functions, and through Python.
#pragma once

#include <pybind11/pybind11.h>

#include "common/tensor.h"

namespace hylo {

class TorchTensors {
 public:
  // torch: the module. Throws where it offers no table that we know.
  explicit TorchTensors(const pybind11::module_& torch);

  // Fills in the view of a tensor; false where there is no memory to be seen. With `direct` also where a call must go
  // through torch's dispatcher: a subclass, or a tensor that wants a gradient while gradients are on.
  bool view(pybind11::handle tensor, bool direct, Tensor& out) const;

  // Uninitialised, contiguous, else like `tensor`; on its device.
  pybind11::object empty_like(pybind11::handle tensor) const;

  // The stream that torch would launch on.
  void* stream(const Tensor& tensor) const;

 private:
  bool wants_gradient(pybind11::handle tensor) const;

  const TensorExchange* exchange_;
  pybind11::object tensor_, parameter_, empty_like_, contiguous_, keyword_, grad_enabled_, requires_grad_;
};

}  // namespace hylo
