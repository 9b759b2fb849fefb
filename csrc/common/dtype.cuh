// Storage types by the names that the build passes (bf16, fp16, fp32), and vectors of them to and from fp32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/portable.h"

namespace hylo {

using bf16 = __nv_bfloat16;
using fp16 = __half;
using fp32 = float;

template <class T>
constexpr bool kIsBf16 = false;
template <>
constexpr bool kIsBf16<bf16> = true;

constexpr int kMaxAccessBytes = 16;

HYLO_HOST_DEVICE constexpr int access_bytes(int bytes) { return bytes < kMaxAccessBytes ? bytes : kMaxAccessBytes; }

// kSize neighbours (a power of two), moved by as few accesses as 16 bytes each allow.
template <class T, int kSize>
struct alignas(access_bytes(sizeof(T) * kSize)) Vector {
  T values[kSize];
};

__device__ __forceinline__ float to_float(bf16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(fp16 value) { return __half2float(value); }
__device__ __forceinline__ float to_float(fp32 value) { return value; }

__device__ __forceinline__ void from_float(bf16& out, float value) { out = __float2bfloat16_rn(value); }
__device__ __forceinline__ void from_float(fp16& out, float value) { out = __float2half_rn(value); }
__device__ __forceinline__ void from_float(fp32& out, float value) { out = value; }

template <int kSize, class T>
__device__ __forceinline__ void load(float (&out)[kSize], const T* address) {
  const auto raw = *reinterpret_cast<const Vector<T, kSize>*>(address);
#pragma unroll
  for (int i = 0; i < kSize; ++i) out[i] = to_float(raw.values[i]);
}

template <int kSize, class T>
__device__ __forceinline__ void store(T* address, const float (&values)[kSize]) {
  Vector<T, kSize> raw;
#pragma unroll
  for (int i = 0; i < kSize; ++i) from_float(raw.values[i], values[i]);
  *reinterpret_cast<Vector<T, kSize>*>(address) = raw;
}

}  // namespace hylo
