// Tensors of another library, read in place. The layouts are DLPack 1.x's: part of its binary interface, which torch
// offers as a table of C functions (torch.Tensor.__dlpack_c_exchange_api__).
#pragma once

#include <cstdint>

namespace hylo {

struct ElementType {
  std::uint8_t code, bits;
  std::uint16_t lanes;

  constexpr bool operator==(const ElementType& other) const { return code == other.code && bits == other.bits; }
  constexpr bool operator!=(const ElementType& other) const { return !(*this == other); }
};

constexpr ElementType kInt32{0, 32, 1}, kInt64{0, 64, 1}, kUint8{1, 8, 1}, kE4m3{10, 8, 1};
constexpr ElementType kFp16{2, 16, 1}, kFp32{2, 32, 1}, kFp64{2, 64, 1}, kBf16{4, 16, 1};

// The name of a type that kernels are compiled for.
constexpr const char* build_name(const ElementType& type) {
  return type == kBf16 ? "bf16" : type == kFp16 ? "fp16" : "fp32";
}

// Shape and strides are borrowed from the tensor that this is a view of. Strides count elements.
struct Tensor {
  void* data;
  std::int32_t device_type, device;
  std::int32_t dims;
  ElementType type;
  const std::int64_t* shape;
  const std::int64_t* strides;
  std::uint64_t byte_offset;

  std::int64_t bytes() const { return type.bits / 8; }
};

constexpr std::int32_t kCuda = 2;  // a device type

// What the table has; the first two are the version and the table of an older one.
struct TensorExchange {
  std::uint32_t major, minor;
  const void* older;
  void* allocate;
  void* share;
  void* take;
  int (*view)(void* python_object, Tensor* out);
  int (*current_stream)(std::int32_t device_type, std::int32_t device, void** out);
};

constexpr std::uint32_t kExchangeMajor = 1;

}  // namespace hylo
