// Numbers of a type known at run time only, read as fp32.
#pragma once

#include "common/dtype.cuh"
#include "common/scalar.h"

namespace hylo {

__device__ __forceinline__ float read_scalar(const Scalar& of, long long batch, int head) {
  const long long at = batch * of.stride_b + head * of.stride_h;
  switch (of.type) {
    case kScalarBf16: return to_float(static_cast<const bf16*>(of.data)[at]);
    case kScalarFp16: return to_float(static_cast<const fp16*>(of.data)[at]);
    case kScalarFp32: return static_cast<const float*>(of.data)[at];
    default: return static_cast<float>(static_cast<const double*>(of.data)[at]);
  }
}

// The same in two parts, so that nothing waits for the number where it is read, but for a double.
__device__ __forceinline__ Word load_scalar(const Scalar& of, long long batch, int head) {
  const long long at = batch * of.stride_b + head * of.stride_h;
  switch (of.type) {
    case kScalarBf16:
    case kScalarFp16: return static_cast<const unsigned short*>(of.data)[at];
    case kScalarFp32: return static_cast<const Word*>(of.data)[at];
    default: return __float_as_uint(static_cast<float>(static_cast<const double*>(of.data)[at]));
  }
}

__device__ __forceinline__ float scalar_value(int type, Word loaded) {
  if (type == kScalarBf16) return __uint_as_float(loaded << 16);
  if (type == kScalarFp16) return __half2float(__ushort_as_half(static_cast<unsigned short>(loaded)));
  return __uint_as_float(loaded);
}

__device__ __forceinline__ float scalar_value(const Scalar& of, Word loaded) { return scalar_value(of.type, loaded); }

// At an address, where what lies between numbers is counted in bytes.
__device__ __forceinline__ Word load_scalar(int type, const void* at) { return load_scalar({at, 0, 0, type}, 0, 0); }

__device__ __forceinline__ int scalar_bytes(int type) {
  return type == kScalarFp64 ? 8 : type == kScalarFp32 ? 4 : 2;
}

// Rounds to the type.
__device__ __forceinline__ void store_scalar(int type, void* data, long long index, float value) {
  switch (type) {
    case kScalarBf16: return from_float(static_cast<bf16*>(data)[index], value);
    case kScalarFp16: return from_float(static_cast<fp16*>(data)[index], value);
    case kScalarFp32: return from_float(static_cast<float*>(data)[index], value);
    default: static_cast<double*>(data)[index] = value;
  }
}

// Row of a pool that a sequence has, or of a state without one.
__device__ __forceinline__ long long read_index(const void* indices, long long stride, bool wide, long long batch) {
  if (indices == nullptr) return batch;
  const long long at = batch * stride;
  return wide ? static_cast<const long long*>(indices)[at] : static_cast<const int*>(indices)[at];
}

}  // namespace hylo
