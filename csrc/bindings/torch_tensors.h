// torch tensors seen from C++ without torch's headers: through its table of C functions, and through Python.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <string>

#include "common/tensor.h"

namespace hylo {

class TorchTensors {
 public:
  // torch: the module. Throws where it offers no table that we know.
  explicit TorchTensors(const pybind11::module_& torch);

  // Fills in the view of a tensor; false where there is no memory to be seen.
  bool view(pybind11::handle tensor, Tensor& out) const { return see(tensor, false, false, out); }

  // Of each tensor of a tuple, as many as there are views; those from `always` on may be None: they are not `there`.
  // With `direct` false also where a call must go through torch's dispatcher: for a subclass, or a tensor that wants a
  // gradient while gradients are on.
  template <int kCount>
  bool view(const pybind11::tuple& tensors, bool direct, int always, Tensor* const (&out)[kCount],
            bool (&there)[kCount]) const {
    if (tensors.size() != kCount) throw pybind11::type_error(std::to_string(kCount) + " tensors are expected");
    const bool gradients = direct && gradients_are_on();
    for (int i = 0; i < kCount; ++i) {
      const pybind11::handle tensor = PyTuple_GET_ITEM(tensors.ptr(), i);
      there[i] = i < always || !tensor.is_none();
      if (there[i] && !see(tensor, direct, gradients, *out[i])) return false;
    }
    return true;
  }

  // Uninitialised, contiguous, else like `tensor`; on its device.
  pybind11::object empty_like(pybind11::handle tensor) const;

  // The same of another shape.
  pybind11::object empty(pybind11::handle like, std::initializer_list<std::int64_t> sizes) const;

  // The stream that torch would launch on.
  void* stream(const Tensor& tensor) const;

 private:
  // no_subclass, no_gradient: what is not to be seen.
  bool see(pybind11::handle tensor, bool no_subclass, bool no_gradient, Tensor& out) const;
  bool gradients_are_on() const { return grad_enabled_().ptr() == Py_True; }
  bool wants_gradient(pybind11::handle tensor) const;

  const TensorExchange* exchange_;
  pybind11::object tensor_, parameter_, empty_like_, contiguous_, keyword_, grad_enabled_, requires_grad_, new_empty_;
};

}  // namespace hylo
