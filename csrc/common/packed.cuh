// Numbers that stay packed in registers as they lie in memory, until they are needed in fp32.
#pragma once

#include "common/dtype.cuh"
#include "common/global_access.cuh"

namespace hylo {

template <class S>
__device__ __forceinline__ float unpack(const Words& words, int i);
template <>
__device__ __forceinline__ float unpack<fp32>(const Words& words, int i) {
  return __uint_as_float(words.at[i]);
}
template <>
__device__ __forceinline__ float unpack<bf16>(const Words& words, int i) {  // bf16 is the upper half of fp32
  return __uint_as_float(i % 2 == 0 ? words.at[i / 2] << 16 : words.at[i / 2] & 0xffff0000u);
}

template <class S>
__device__ __forceinline__ Word pack(const float* values);
template <>
__device__ __forceinline__ Word pack<fp32>(const float* values) {
  return __float_as_uint(values[0]);
}
template <>
__device__ __forceinline__ Word pack<bf16>(const float* values) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(values[0], values[1]);
  return *reinterpret_cast<const Word*>(&pair);
}

// As many as 16 bytes hold.
template <class S>
__device__ __forceinline__ Words pack_words(const float* values) {
  constexpr int kInWord = sizeof(Word) / sizeof(S);
  return {pack<S>(values), pack<S>(values + kInWord), pack<S>(values + 2 * kInWord), pack<S>(values + 3 * kInWord)};
}

// kSize neighbours, moved by as wide accesses as their number and 16 bytes allow.
template <class T, int kSize>
__device__ __forceinline__ void read(T (&out)[kSize], const T* address) {
  constexpr int kAtOnce = kSize & -kSize;
#pragma unroll
  for (int i = 0; i < kSize; i += kAtOnce) {
    const auto raw = *reinterpret_cast<const Vector<T, kAtOnce>*>(address + i);
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) out[i + j] = raw.values[j];
  }
}

template <class T, int kSize>
__device__ __forceinline__ void write(T* address, const T (&values)[kSize]) {
  constexpr int kAtOnce = kSize & -kSize;
#pragma unroll
  for (int i = 0; i < kSize; i += kAtOnce) {
    Vector<T, kAtOnce> raw;
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) raw.values[j] = values[i + j];
    *reinterpret_cast<Vector<T, kAtOnce>*>(address + i) = raw;
  }
}

}  // namespace hylo
