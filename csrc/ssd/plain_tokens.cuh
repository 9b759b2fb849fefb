// Where the tokens of a chunk and their states are, and how they come to shared memory.
#pragma once

#include "common/chunks.cuh"
#include "common/fp32_product.cuh"
#include "ssd/plain_params.h"
#include "ssd/plain_traits.cuh"

namespace hylo::ssd::plain {

using Square = Part<kChunk, kSlice>;
using SquareTile = Tile<kSlice>;

// kSlice columns from `first` on of `columns`, of a chunk's tokens and one of the tensor's own heads.
template <class T>
__device__ __forceinline__ void copy_tokens(const SquareTile& to, const Rows& rows, const Chunk& chunk, int own_head,
                                            int first, int columns) {
  const T* from = static_cast<const T*>(rows.data) + chunk.batch * rows.strides[0] + chunk.begin * rows.strides[1] +
                  own_head * rows.strides[2];
  copy_rows<kChunk, kSlice>(to, from + first, rows.strides[1], chunk.tokens, columns - first);
}

// Where the state of a chunk and head begins.
__device__ __forceinline__ long long state_at(const Params& p, int chunk, int head) {
  return (static_cast<long long>(chunk) * p.heads + head) * p.values * p.width;
}

}  // namespace hylo::ssd::plain
