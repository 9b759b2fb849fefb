// Runs a CUDA kernel's source on the CPU, one block or cluster of blocks after the other, or so many at once as a test asks
// for, each thread of it a fiber that is switched at barriers only, and where it looks at the clock. Shows indexing, tails and algebra; says nothing about rounding of fast math, or
// speed. Of races it shows those of blocks that go on without the others of their cluster, and those that make every
// second launch of a kernel, with its warps in any order, their threads in reverse and copies as late as can be, hang or give
// other bits.
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

// Whether this is such a launch.
inline bool emulated_reverse = false;

void __syncthreads();

// Of all blocks of a cluster; until others have counted a number down; and the dynamic shared memory of a block, or of
// this one (-1).
void emulated_cluster_arrive();
void emulated_cluster_wait();
void emulated_await_zero(const unsigned long long* number);
unsigned char* emulated_dynamic_shared(int block);
// Cycles, which go by when nobody can do anything but wait for them; and where others may come first.
unsigned emulated_clock();
void emulated_let_others_go_ahead();
unsigned emulated_cluster_size();

// The value of another lane, or this one's where there is no such lane. Whole warps call it.
unsigned long long emulated_shuffle(unsigned long long value, int from);

inline float __expf(float x) { return expf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

template <class To, class From>
To same_bits(From from) {
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}
inline unsigned __umulhi(unsigned x, unsigned y) { return static_cast<unsigned long long>(x) * y >> 32; }
inline int max(int x, int y) { return x > y ? x : y; }
inline int min(int x, int y) { return x < y ? x : y; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline void __threadfence() {}
inline void __syncwarp() { emulated_shuffle(0, 0); }
inline float __int_as_float(int x) { return same_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return same_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return same_bits<unsigned>(x); }

template <class T>
T emulated_shuffle_of(T value, int from) {
  unsigned long long bits = 0;
  memcpy(&bits, &value, sizeof(value));
  bits = emulated_shuffle(bits, from);
  memcpy(&value, &bits, sizeof(value));
  return value;
}
inline int emulated_lane() { return threadIdx.x % 32; }
template <class T>
T __shfl_sync(unsigned, T value, int from) {
  return emulated_shuffle_of(value, from);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int offset) {
  return emulated_shuffle_of(value, emulated_lane() ^ offset);
}
template <class T>
T __shfl_down_sync(unsigned, T value, int offset) {
  return emulated_shuffle_of(value, emulated_lane() + offset);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int offset) {
  return emulated_shuffle_of(value, emulated_lane() - offset);
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(mask, value, offset);
  return value;
}
inline int __reduce_max_sync(unsigned mask, int value) {
  for (int offset = 16; offset > 0; offset /= 2) value = max(value, __shfl_xor_sync(mask, value, offset));
  return value;
}
inline unsigned __ballot_sync(unsigned mask, bool voted) {
  return __reduce_add_sync(mask, voted ? 1u << emulated_lane() : 0u);
}
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }

// A kernel whose one argument lies at `params`, found by the name that stands in for its cubin, and its own.
struct EmulatedKernel {
  EmulatedKernel(const char* cubin, const char* symbol, void (*run)(const void* params));
};
