// Warps that make keys of rows in fp8: tiles of 16-bit numbers, as the copy engine would have brought them.
#pragma once

#include "common/e4m3.cuh"
#include "common/wgmma.cuh"
#include "mla_absorb/block.cuh"

namespace hylo::mla_absorb {

// A thread has one row of each part of a tile, and every kApart-th 16 bytes of it: neighbours have neighbouring rows, which
// lie an odd number of 16 bytes apart where latents are a multiple of 32, and so meet no bank twice.
template <class T, int kR, int kE, int kN, bool kScaled>
class Converter {
 public:
  static constexpr Dims kDims{kR, kE, kN, kScaled, true};
  static constexpr Room kRoom = room(kDims);
  static constexpr int kApart = kConverting / kRoom.raw_rows;
  // Pieces of 16 bytes: of latents, so many of which a thread has on their way at once, and of what follows the scales.
  static constexpr int kLatents = kR / 16, kOthers = (raw_row_size(kDims) - fp8_rest_at(kR)) / 16, kTogether = 2;
  static_assert(kConverting % kRoom.raw_rows == 0 && kR % 16 == 0, "threads have whole pieces of one row");

  __device__ __forceinline__ Converter(const Params& p, int thread, const unsigned char* raw, unsigned char* stages,
                                       SharedByAll& shared)
      : p_(p), row_(thread % kRoom.raw_rows), first_(thread / kRoom.raw_rows), raw_(raw), stages_(stages), shared_(shared) {}

  __device__ __forceinline__ void run(const Piece& piece) {
    const int count = turns_here(p_, piece).count;
#pragma unroll 1
    for (int i = 0; i < count; ++i, ++tiles_) {
      const unsigned at = tiles_ % kRoom.stages, turn = tiles_ / kRoom.stages;
      Handover& stage = shared_.stages[at];
      if (turn > 0) stage.empty.wait((turn - 1) & 1);
#pragma unroll 1
      for (int first = 0; first < kTokens; first += kRoom.raw_rows) convert_part(stages_ + at * stage_size(kDims), first);
      fence_async();
      stage.full.arrive();
    }
  }

 private:
  // The rows of a tile from `first` on.
  __device__ __forceinline__ void convert_part(unsigned char* keys, int first) {
    const unsigned at = parts_ % kRoom.raw, turn = parts_ / kRoom.raw;
    ++parts_;
    Handover& raw = shared_.stages[raw_barrier(kDims, static_cast<int>(at))];
    raw.full.wait(turn & 1);
    const unsigned char* const from = raw_ + at * raw_size(kDims) + row_ * raw_row_size(kDims);
    convert_latents(keys, first + row_, from);
    copy_others(keys, first + row_, from + fp8_rest_at(kR));
    raw.empty.arrive();  // all that was loaded has been stored
  }

  __device__ __forceinline__ void convert_latents(unsigned char* keys, int row, const unsigned char* from) const {
    const auto* const pieces = reinterpret_cast<const uint4*>(from);
    const auto* const scales = reinterpret_cast<const float*>(from + fp8_scales_at(kR));
#pragma unroll 1
    for (unsigned first = first_; first < kLatents; first += kTogether * kApart) {
      uint4 codes[kTogether];
      float scale[kTogether];
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        const unsigned i = first + j * kApart;
        if (i < kLatents) codes[j] = pieces[i], scale[j] = scales[i * 16 / kScaleGroup];
      }
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        const unsigned i = first + j * kApart;
        if (i >= kLatents) continue;
        *piece(keys, row, 2 * i) = eight(codes[j].x, codes[j].y, scale[j]);
        *piece(keys, row, 2 * i + 1) = eight(codes[j].z, codes[j].w, scale[j]);
      }
    }
  }

  // Threads that had more of the latents begin behind the others.
  __device__ __forceinline__ void copy_others(unsigned char* keys, int row, const unsigned char* from) const {
#pragma unroll
    for (unsigned i = kApart - 1 - first_; i < kOthers; i += kApart) {
      *piece(keys, row, kR / 8 + i) = reinterpret_cast<const uint4*>(from)[i];
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

  // 16 bytes of a row of keys.
  static __device__ __forceinline__ uint4* piece(unsigned char* keys, int row, unsigned i) {
    return reinterpret_cast<uint4*>(keys + i / 8 * kTileSize + wgmma::swizzled(row, i % 8));
  }

  const Params& p_;
  const int row_;         // of a part
  const unsigned first_;  // 16 bytes of it
  const unsigned char* const raw_;
  unsigned char* const stages_;
  SharedByAll& shared_;
  unsigned tiles_ = 0, parts_ = 0;  // of the block, so far
};

}  // namespace hylo::mla_absorb
