// Warps that make keys of rows in fp8: tiles of 16-bit numbers, as the copy engine would have brought them.
#pragma once

#include "common/e4m3.cuh"
#include "common/wgmma.cuh"
#include "mla_absorb/block.cuh"

namespace hylo::mla_absorb {

// A thread has one row of each part of a tile, and every kApart-th 16 bytes of it: neighbours have neighbouring rows, which
// lie an odd number of 16 bytes apart where latents are a multiple of 32, and so meet no bank twice. Four times 16 latents
// are a row of a tile of keys: what a thread makes has the same place in each of its tiles.
template <class T, int kR, int kE, int kN, bool kScaled>
class Converter {
 public:
  static constexpr Dims kDims{kR, kE, kN, kScaled, true};
  static constexpr Room kRoom = room(kDims);
  static constexpr int kApart = kConverting / kRoom.raw_rows, kTilesApart = kApart / 4;
  // Pieces of 16 bytes: of latents, those of a thread, how many of them it loads at once; and of what follows the scales.
  static constexpr int kLatents = kR / 16, kEach = ceil_div(kLatents, kApart), kTogether = kEach < 4 ? kEach : 4;
  static constexpr int kOthers = (raw_row_size(kDims) - fp8_rest_at(kR)) / 16;
  static constexpr int kOthersEach = ceil_div(kOthers, kApart);
  static_assert(kConverting % kRoom.raw_rows == 0 && kApart % 4 == 0 && kR % 16 == 0, "threads have whole pieces of one row");

  __device__ __forceinline__ Converter(const Params& p, int thread, const unsigned char* raw, unsigned char* stages,
                                       SharedByAll& shared)
      : p_(p),
        row_(thread % kRoom.raw_rows),
        first_(thread / kRoom.raw_rows),
        place_(first_ / 4 * kTileSize + wgmma::swizzled(row_, first_ % 4 * 2)),
        raw_(raw + row_ * raw_row_size(kDims)),
        stages_(stages),
        shared_(shared) {}

  __device__ __forceinline__ void run(const Piece& piece) {
    const int count = turns_here(p_, piece).count;
#pragma unroll 1
    for (int i = 0; i < count; ++i, ++tiles_) {
      const unsigned at = tiles_ % kRoom.stages, turn = tiles_ / kRoom.stages;
      Handover& stage = shared_.stages[at];
      if (turn > 0) stage.empty.wait((turn - 1) & 1);
      unsigned char* const keys = stages_ + at * stage_size(kDims);
#pragma unroll 1
      for (int first = 0; first < kTokens; first += kRoom.raw_rows) convert_part(keys + first * 128);
      fence_async();
      stage.full.arrive();
    }
  }

 private:
  // The next rows of a tile, whose keys begin at `keys`.
  __device__ __forceinline__ void convert_part(unsigned char* keys) {
    const unsigned at = parts_ % kRoom.raw, turn = parts_ / kRoom.raw;
    ++parts_;
    Handover& raw = shared_.stages[raw_barrier(kDims, static_cast<int>(at))];
    raw.full.wait(turn & 1);
    const unsigned char* const from = raw_ + at * raw_size(kDims);
    Loaded loaded;
    load(loaded, from, 0);
    store(keys, loaded, 0);
#pragma unroll
    for (int i = kTogether; i < kEach; i += kTogether) {
      load(loaded, from, i);
      store(keys, loaded, i);
    }
    copy_others(keys, from + fp8_rest_at(kR));
    raw.empty.arrive();  // all that was loaded has been stored
  }

  // Pieces of latents, all on their way before the first is converted.
  struct Loaded {
    uint4 codes[kTogether];
    float scales[kTogether];
  };

  // kTogether of the thread's pieces, from the i-th on.
  __device__ __forceinline__ void load(Loaded& loaded, const unsigned char* from, int i) const {
    const auto* const pieces = reinterpret_cast<const uint4*>(from) + first_;
    const auto* const scales = reinterpret_cast<const float*>(from + fp8_scales_at(kR)) + first_ * 16 / kScaleGroup;
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      if (!has(i + j)) continue;
      loaded.codes[j] = pieces[(i + j) * kApart];
      loaded.scales[j] = scales[(i + j) * kApart * 16 / kScaleGroup];
    }
  }

  __device__ __forceinline__ void store(unsigned char* keys, const Loaded& loaded, int i) const {
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      if (!has(i + j)) continue;
      const uint4& codes = loaded.codes[j];
      unsigned char* const tile = keys + (i + j) * kTilesApart * kTileSize;
      *reinterpret_cast<uint4*>(tile + place_) = eight(codes.x, codes.y, loaded.scales[j]);
      *reinterpret_cast<uint4*>(tile + (place_ ^ 16)) = eight(codes.z, codes.w, loaded.scales[j]);
    }
  }

  // Whether the thread has an i-th piece: of all but the last one the compiler knows.
  __device__ __forceinline__ bool has(int i) const {
    return (i + 1) * kApart <= kLatents || (i < kEach && first_ + i * kApart < kLatents);
  }

  // Threads that had more of the latents begin behind the others.
  __device__ __forceinline__ void copy_others(unsigned char* keys, const unsigned char* from) const {
#pragma unroll
    for (int j = 0; j < kOthersEach; ++j) {
      const int i = kApart - 1 - first_ + j * kApart, place = kR / 8 + i;
      if ((j + 1) * kApart > kOthers && i >= kOthers) continue;
      *reinterpret_cast<uint4*>(keys + place / 8 * kTileSize + wgmma::swizzled(row_, place % 8)) =
          reinterpret_cast<const uint4*>(from)[i];
    }
  }

  // Eight latents, rounded once.
  static __device__ __forceinline__ uint4 eight(Word low, Word high, float scale) {
    float x[2][4];
    unpack_e4m3(low, x[0]);
    unpack_e4m3(high, x[1]);
    Word made[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) made[i] = wgmma::pack<T>(x[i / 2][i % 2 * 2] * scale, x[i / 2][i % 2 * 2 + 1] * scale);
    return make_uint4(made[0], made[1], made[2], made[3]);
  }

  const Params& p_;
  const int row_;    // of a part
  const int first_;  // 16 bytes of it
  const int place_;  // of the first half of the keys made of these, from where a part's begin; the other's differs in bit 4
  const unsigned char* const raw_;
  unsigned char* const stages_;
  SharedByAll& shared_;
  unsigned tiles_ = 0, parts_ = 0;  // of the block, so far
};

}  // namespace hylo::mla_absorb
