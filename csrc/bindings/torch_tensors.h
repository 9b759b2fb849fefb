// torch tensors seen from C++ without torch's headers: through its table of C functions, and through Python.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <initializer_list>
#include <string>

#include "common/tensor.h"

namespace hylo {

class TorchTensors {
 public:
  static constexpr const char* kUnseen = "a tensor has no memory to be seen";
  static constexpr const char* kNotAllocated = "what torch allocates cannot be seen";

  // torch: the module. device_type: DLPack's number, of what is allocated. Throws where torch offers no table that we
  // know.
  TorchTensors(const pybind11::module_& torch, std::int32_t device_type);

  // Fills in the view of a tensor; false where there is no memory to be seen.
  bool view(pybind11::handle tensor, Tensor& out) const { return see(tensor, false, false, out); }

  // Of each tensor of a tuple, as many as there are views; those from `always` on may be None: they are not `there`.
  // With `direct` false also where a call must go through torch's dispatcher: for a subclass, or a tensor that wants a
  // gradient while gradients are on.
  template <int kCount>
  bool view(const pybind11::tuple& tensors, bool direct, int always, Tensor* const (&out)[kCount],
            bool (&there)[kCount]) const {
    return view(items<kCount>(tensors), direct, always, out, there);
  }

  template <int kCount>
  bool view(PyObject* const* tensors, bool direct, int always, Tensor* const (&out)[kCount],
            bool (&there)[kCount]) const {
    const bool gradients = direct && gradients_are_on();
    for (int i = 0; i < kCount; ++i) {
      there[i] = i < always || tensors[i] != Py_None;
      if (there[i] && !see(tensors[i], direct, gradients, *out[i])) return false;
    }
    return true;
  }

  // What a tuple of so many holds.
  template <int kCount>
  static PyObject* const* items(const pybind11::tuple& tensors) {
    if (tensors.size() != kCount) throw pybind11::type_error(std::to_string(kCount) + " are expected");
    return PySequence_Fast_ITEMS(tensors.ptr());
  }

  // Uninitialised, contiguous, on the device of `tensor`, that `seen` is the view of; of that or of another type and
  // shape.
  pybind11::object empty_like(pybind11::handle tensor, const Tensor& seen);
  pybind11::object empty(pybind11::handle tensor, const Tensor& seen, ElementType type,
                         std::initializer_list<std::int64_t> sizes);

  // The stream that torch would launch on.
  void* stream(const Tensor& tensor) const;

 private:
  static constexpr int kMaxDims = 4;

  // What torch's function takes for a type and a shape: sizes, strides and dtype, as a tuple.
  struct Layout {
    ElementType type;
    int dims;
    std::array<std::int64_t, kMaxDims> sizes;
    pybind11::object arguments;
  };

  // no_subclass, no_gradient: what is not to be seen.
  bool see(pybind11::handle tensor, bool no_subclass, bool no_gradient, Tensor& out) const;
  bool gradients_are_on() const;
  bool wants_gradient(pybind11::handle tensor) const;

  pybind11::object make(pybind11::handle tensor, const Tensor& seen, ElementType type, const std::int64_t* sizes,
                        int dims);
  const Layout& layout(ElementType type, const std::int64_t* sizes, int dims);
  pybind11::object dtype(ElementType type) const;
  bool is_current(std::int32_t device) const;

  const TensorExchange* exchange_;
  pybind11::object torch_, tensor_, parameter_, grad_enabled_, requires_grad_, new_empty_, dtype_keyword_;
  pybind11::object fast_empty_, current_device_;  // either may be None
  std::array<Layout, 8> layouts_{};               // of the last calls
  std::size_t next_layout_ = 0;
};

}  // namespace hylo
