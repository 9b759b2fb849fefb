// Functions that host code and kernels both call, in files that both compile.
#pragma once

#ifdef __CUDACC__
#define HYLO_HOST_DEVICE __host__ __device__
#else
#define HYLO_HOST_DEVICE
#endif

namespace hylo {

// Device code includes no standard header: NVRTC has none.
using Word = unsigned;
using DoubleWord = unsigned long long;
static_assert(sizeof(Word) == 4 && sizeof(DoubleWord) == 8);

HYLO_HOST_DEVICE constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

constexpr int kChunk = 64;  // tokens that the chunked kernels take at once
constexpr int kProductThreads = 256;  // of every block that multiplies with fp32_product.cuh

}  // namespace hylo
