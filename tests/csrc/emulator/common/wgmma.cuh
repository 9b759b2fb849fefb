// What csrc/common/wgmma.cuh writes in PTX, in C++, as far as emulated kernels need it: each thread makes its own part of
// a product, from what lies in shared memory when it asks for it or, in every second launch, when it waits for it.
#pragma once

#include <functional>
#include <map>
#include <vector>

#include "common/copy_engine.cuh"
#include "common/dtype.cuh"

namespace hylo::wgmma {

constexpr int kTileBytes = 64 * 128;
constexpr int kGroupBytes = 8 * 128;

inline int swizzled(int row, int piece) { return row * 128 + ((piece ^ (row & 7)) << 4); }

inline DoubleWord descriptor_k_major(Word address) {
  return (address >> 4 & 0x3fff) | DoubleWord{1} << 16 | DoubleWord{kGroupBytes >> 4} << 32 | DoubleWord{1} << 62;
}
inline DoubleWord descriptor_n_major(Word address, int next_columns) {
  return (address >> 4 & 0x3fff) | static_cast<DoubleWord>(next_columns >> 4) << 16 |
         DoubleWord{kGroupBytes >> 4} << 32 | DoubleWord{1} << 62;
}
constexpr DoubleWord kNextKMajor = 32 >> 4;
constexpr DoubleWord kNextNMajor = 2 * kGroupBytes >> 4;

using Pending = std::vector<std::function<void()>>;
inline Pending& pending() {
  static std::map<std::pair<unsigned char*, unsigned>, Pending> all;
  return all[{emulated_dynamic_shared(-1), threadIdx.x}];
}
inline void make(std::function<void()> product) {
  emulated_reverse ? pending().push_back(std::move(product)) : product();
}

inline void fence() {}
inline void commit() {}
template <int kInFlight>
void wait() {
  static_assert(kInFlight == 0, "all are waited for");
  Pending all;
  all.swap(pending());
  for (const auto& product : all) product();
}
template <int kSize>
void pin(float (&)[kSize]) {}

template <class T>
Word pack(float low, float high) {
  struct {
    T low, high;
  } both;
  from_float(both.low, low);
  from_float(both.high, high);
  return same_bits<Word>(both);
}
template <class T>
void unpack(Word packed, float& low, float& high) {
  T both[2];
  memcpy(both, &packed, sizeof(both));
  low = to_float(both[0]);
  high = to_float(both[1]);
}
template <class T, int kSize>
void pack_operand(Word (&a)[4], const float (&d)[kSize], int i) {
  for (int r = 0; r < 4; ++r) a[r] = pack<T>(d[8 * i + 2 * r], d[8 * i + 2 * r + 1]);
}

enum Major { kAlongK = 0, kAlongMN = 1 };

// Element `mn` of the operand's own dim and `k` of the sum's, where its descriptor and the swizzle have it.
template <class T>
float operand(DoubleWord descriptor, Major major, int mn, int k) {
  const Word start = (descriptor & 0x3fff) << 4, group = (descriptor >> 32 & 0x3fff) << 4;
  const Word next = (descriptor >> 16 & 0x3fff) << 4;
  const Word at = major == kAlongK ? start + mn / 8 * group + mn % 8 * 128 + k * 2
                                   : start + mn / 64 * next + k / 8 * group + k % 8 * 128 + mn % 64 * 2;
  T value;
  memcpy(&value, emulated_dynamic_shared(-1) + (at ^ (at >> 7 & 7) << 4), 2);
  return to_float(value);
}

template <class T, Major kMajorA, Major kMajorB, int kSize>
void product_shared(float (&d)[kSize], DoubleWord a, DoubleWord b, bool accumulate) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  float* const to = d;
  make([=] {
    for (int i = 0; i < kSize; ++i) {
      const int row = 16 * warp + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + 2 * (lane % 4) + i % 2;
      float sum = accumulate ? to[i] : 0.0f;
      for (int k = 0; k < 16; ++k) sum += operand<T>(a, kMajorA, row, k) * operand<T>(b, kMajorB, column, k);
      to[i] = sum;
    }
  });
}

// A in registers: of a row four lanes have four numbers each.
template <class T, Major kMajorB, int kSize>
void product(float (&d)[kSize], const Word (&a)[4], DoubleWord b, bool accumulate) {
  const int lane = threadIdx.x % 32;
  float* const to = d;
  const Word* const from = a;
  make([=] {
    float rows[2][16];
    for (int k = 0; k < 16; ++k) {
      for (int r = 0; r < 2; ++r) {
        float both[2];
        unpack<T>(emulated_shuffle_of(from[k / 8 * 2 + r], lane / 4 * 4 + k % 8 / 2), both[0], both[1]);
        rows[r][k] = both[k % 2];
      }
    }
    for (int i = 0; i < kSize; ++i) {
      const int column = i / 4 * 8 + 2 * (lane % 4) + i % 2;
      float sum = accumulate ? to[i] : 0.0f;
      for (int k = 0; k < 16; ++k) sum += rows[i / 2 % 2][k] * operand<T>(b, kMajorB, column, k);
      to[i] = sum;
    }
  });
}

}  // namespace hylo::wgmma

namespace hylo {

template <int kEach>
void release_registers() {}
template <int kEach>
void claim_registers() {}

}  // namespace hylo
