// What launchers ask of tensors before they take them.
#pragma once

#include <initializer_list>

#include "common/scalar.h"
#include "common/tensor.h"

namespace hylo {

constexpr int kRowAlignment = 16;  // bytes
constexpr int kNoScalar = -1;
constexpr const char* kWrongShapes = "the shapes are not the op's";  // the op says itself which

inline int scalar_type(const ElementType& type) {
  if (type == kBf16) return kScalarBf16;
  if (type == kFp16) return kScalarFp16;
  if (type == kFp32) return kScalarFp32;
  return type == kFp64 ? kScalarFp64 : kNoScalar;
}

// Of [B, 1, H], or of [H]: the heads' alone.
inline Scalar scalar(const Tensor& tensor) {
  const bool of_batch = tensor.dims == 3;
  return {tensor.data, of_batch ? tensor.strides[0] : 0, tensor.strides[tensor.dims - 1], scalar_type(tensor.type)};
}

inline bool is_integer(const Tensor& tensor) { return tensor.type == kInt32 || tensor.type == kInt64; }
inline Integers integers_of(bool there, const Tensor& tensor) {
  return there ? Integers{tensor.data, tensor.strides[0], tensor.type == kInt64} : Integers{};
}

inline const Tensor* if_there(bool there, const Tensor& tensor) { return there ? &tensor : nullptr; }

template <class... Sizes>
bool has_shape(const Tensor& tensor, Sizes... sizes) {
  const std::int64_t wanted[] = {sizes...};
  if (tensor.dims != static_cast<int>(sizeof...(sizes))) return false;
  for (int i = 0; i < tensor.dims; ++i) {
    if (tensor.shape[i] != wanted[i]) return false;
  }
  return true;
}

// Whether every row of the last dim starts at a multiple of 16 bytes and has its elements side by side.
inline bool has_aligned_rows(const Tensor& tensor) {
  const int last = tensor.dims - 1;
  auto starts = reinterpret_cast<std::uintptr_t>(tensor.data);
  for (int i = 0; i < last; ++i) {
    if (tensor.shape[i] > 1) starts |= static_cast<std::uintptr_t>(tensor.strides[i] * tensor.bytes());
  }
  return tensor.strides[last] == 1 && starts % kRowAlignment == 0;
}

// Whether all that are there (not null) are on the same device of a type.
inline bool are_on_one_device(std::initializer_list<const Tensor*> tensors, std::int32_t device_type) {
  const Tensor* first = nullptr;
  for (const Tensor* tensor : tensors) {
    if (tensor == nullptr) continue;
    if (first == nullptr) first = tensor;
    if (tensor->device_type != device_type || tensor->device != first->device) return false;
  }
  return true;
}

}  // namespace hylo
