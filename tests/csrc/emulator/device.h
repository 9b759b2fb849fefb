// Runs a CUDA kernel's source on the CPU, one block after the other, each thread of a block a fiber that is switched
// at barriers only. Shows indexing, tails and algebra; says nothing about races, rounding of fast math, or speed.
#pragma once

#include <crt/host_defines.h>
#include <math.h>
#include <string.h>

#undef __device__
#undef __host__
#undef __global__
#undef __shared__
#undef __launch_bounds__
#undef __grid_constant__
#define __device__
#define __host__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__

struct Index {
  unsigned x, y, z;
};

inline Index threadIdx, blockIdx, blockDim, gridDim;

void __syncthreads();
float __shfl_xor_sync(unsigned mask, float value, int offset);

inline float __expf(float x) { return expf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

template <class To, class From>
To same_bits(From from) {
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}
inline float __uint_as_float(unsigned x) { return same_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return same_bits<unsigned>(x); }

// A kernel whose one argument lies at `params`, found by the name that stands in for its cubin.
struct EmulatedKernel {
  EmulatedKernel(const char* name, void (*run)(const void* params));
};
