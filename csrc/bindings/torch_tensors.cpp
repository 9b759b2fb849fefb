#include "bindings/torch_tensors.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace py = pybind11;

namespace hylo {
namespace {

bool is_empty(const Tensor& tensor) {
  for (int i = 0; i < tensor.dims; ++i) {
    if (tensor.shape[i] == 0) return true;
  }
  return false;
}

// torch has no gradients of integers.
bool may_want_gradient(const ElementType& type) { return type != kInt32 && type != kInt64; }

// torch's function, or None where this torch has none of that name.
py::object found(const py::module_& torch, const char* modules, const char* name) {
  const py::object missing = py::none();
  py::object at = torch;
  for (const py::handle module : py::str(modules).attr("split")(".")) at = py::getattr(at, module, missing);
  return py::getattr(at, name, missing);
}

py::object called(py::handle function) {
  auto answer = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(function.ptr()));
  if (!answer) throw py::error_already_set();
  return answer;
}

}  // namespace

// Compiled graphs allocate by the functions that are looked for: without torch's dispatcher, on the current device.
TorchTensors::TorchTensors(const py::module_& torch, std::int32_t device_type)
    : torch_(torch),
      tensor_(torch.attr("Tensor")),
      parameter_(torch.attr("nn").attr("Parameter")),
      grad_enabled_(torch.attr("is_grad_enabled")),
      requires_grad_(tensor_.attr("requires_grad")),
      new_empty_(py::str("new_empty")),
      dtype_keyword_(py::make_tuple("dtype")),
      current_device_(py::none()) {
  const bool cuda = device_type == kCuda;
  fast_empty_ = found(torch, "_C._dynamo.guards", cuda ? "_empty_strided_cuda" : "_empty_strided_cpu");
  if (cuda) current_device_ = found(torch, "_C", "_cuda_getDevice");
  if (cuda && current_device_.is_none()) fast_empty_ = py::none();
  const py::object capsule = tensor_.attr("__dlpack_c_exchange_api__");
  exchange_ = static_cast<const TensorExchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (exchange_ == nullptr) throw py::error_already_set();
  if (exchange_->major != kExchangeMajor || exchange_->view == nullptr) {
    throw std::runtime_error("torch offers DLPack " + std::to_string(exchange_->major) + ", not 1, or no views");
  }
  if (Py_TYPE(requires_grad_.ptr())->tp_descr_get == nullptr) {
    throw std::runtime_error("torch.Tensor.requires_grad is no property");
  }
}

bool TorchTensors::see(py::handle tensor, bool no_subclass, bool no_gradient, Tensor& out) const {
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr()));
  const bool plain = type == tensor_.ptr() || type == parameter_.ptr();
  if (!plain && (no_subclass || !py::isinstance(tensor, tensor_))) return false;
  if (exchange_->view(tensor.ptr(), &out) != 0) {
    PyErr_Clear();
    return false;
  }
  if (no_gradient && may_want_gradient(out.type) && wants_gradient(tensor)) return false;
  if (out.data == nullptr && !is_empty(out)) return false;  // a fake tensor or a wrapper
  out.data = static_cast<char*>(out.data) + out.byte_offset;
  return true;
}

bool TorchTensors::gradients_are_on() const { return called(grad_enabled_).ptr() == Py_True; }

// Asks the property itself: no subclass comes here, so that none has another.
bool TorchTensors::wants_gradient(py::handle tensor) const {
  PyObject* const property = requires_grad_.ptr();
  const auto get = Py_TYPE(property)->tp_descr_get;
  const auto wanted = py::reinterpret_steal<py::object>(
      get(property, tensor.ptr(), reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr()))));
  if (!wanted) throw py::error_already_set();
  return wanted.ptr() == Py_True;
}

py::object TorchTensors::empty_like(py::handle tensor, const Tensor& seen) {
  return make(tensor, seen, seen.type, seen.shape, seen.dims);
}

py::object TorchTensors::empty(py::handle tensor, const Tensor& seen, ElementType type,
                               std::initializer_list<std::int64_t> sizes) {
  return make(tensor, seen, type, sizes.begin(), static_cast<int>(sizes.size()));
}

py::object TorchTensors::make(py::handle tensor, const Tensor& seen, ElementType type, const std::int64_t* sizes,
                              int dims) {
  const py::object arguments = layout(type, sizes, dims).arguments;  // held: others may come to call meanwhile
  PyObject* made = nullptr;
  if (!fast_empty_.is_none() && is_current(seen.device)) {
    made = PyObject_Call(fast_empty_.ptr(), arguments.ptr(), nullptr);
  } else {
    PyObject* general[] = {tensor.ptr(), PyTuple_GET_ITEM(arguments.ptr(), 0), PyTuple_GET_ITEM(arguments.ptr(), 2)};
    made = PyObject_VectorcallMethod(new_empty_.ptr(), general, 2, dtype_keyword_.ptr());
  }
  if (made == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}

bool TorchTensors::is_current(std::int32_t device) const {
  if (current_device_.is_none()) return true;  // there is one only
  return PyLong_AsLong(called(current_device_).ptr()) == device;
}

// Calls ask for the same few again and again.
const TorchTensors::Layout& TorchTensors::layout(ElementType type, const std::int64_t* sizes, int dims) {
  if (dims > kMaxDims) throw std::runtime_error("results have up to four dims");
  for (const Layout& known : layouts_) {
    if (known.arguments && known.type == type && known.dims == dims &&
        std::equal(sizes, sizes + dims, known.sizes.begin())) {
      return known;
    }
  }
  Layout made{type, dims, {}, {}};
  std::copy(sizes, sizes + dims, made.sizes.begin());
  py::tuple shape(dims), strides(dims);
  std::int64_t step = 1;
  for (int i = dims - 1; i >= 0; step *= std::max<std::int64_t>(sizes[i--], 1)) {
    shape[i] = sizes[i];
    strides[i] = step;
  }
  made.arguments = py::make_tuple(shape, strides, dtype(type));
  Layout& kept = layouts_[next_layout_++ % layouts_.size()];
  return kept = std::move(made);
}

py::object TorchTensors::dtype(ElementType type) const {
  if (type == kBf16) return torch_.attr("bfloat16");
  if (type == kFp16) return torch_.attr("float16");
  if (type == kFp32) return torch_.attr("float32");
  if (type == kFp64) return torch_.attr("float64");
  throw std::runtime_error("results are of a floating dtype");
}

void* TorchTensors::stream(const Tensor& tensor) const {
  void* current = nullptr;
  if (exchange_->current_stream(tensor.device_type, tensor.device, &current) != 0) throw py::error_already_set();
  return current;
}

}  // namespace hylo
