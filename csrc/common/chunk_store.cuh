// Sends a tile of a chunk's tokens from shared memory to its place in a [B, T, H, V] tensor, contiguous in H and V.
#pragma once

#include "common/chunks.cuh"
#include "common/copy_engine.cuh"
#include "common/wgmma.cuh"

namespace hylo {

// The tile has 64 tokens x 64 columns from `column` on of a head of `width` columns, tokens are `stride` elements apart; of
// kThreads threads that call, the first one's copies are under way on return. The copy engine leaves out what is past the tensor's end; past the end of
// a packed sequence lies its neighbour, and the threads copy row by row.
template <class T, int kThreads>
__device__ __forceinline__ void store_tokens(const TensorMap& map, void* tensor, bool packed, const Chunk& chunk,
                                             long long stride, int head, int width, int column,
                                             const unsigned char* tile, int thread) {
  if (!packed || chunk.tokens == kChunk) {
    if (thread == 0) {
      copy_box_out(map, tile, column, head, chunk.begin, chunk.batch);
      commit_copies_out();
    }
    return;
  }
  const int piece = thread % 8;
  if (column + 8 * piece >= width) return;
  T* out = static_cast<T*>(tensor) + (static_cast<long long>(head) * width + column + 8 * piece);
#pragma unroll 1
  for (int row = thread / 8; row < chunk.tokens; row += kThreads / 8) {
    *reinterpret_cast<uint4*>(out + (chunk.begin + row) * stride) =
        *reinterpret_cast<const uint4*>(tile + wgmma::swizzled(row, piece));
  }
}

// From a token to the next one where nothing lies between.
template <class Params>
__device__ __forceinline__ long long contiguous_stride(const Params& p) {
  return static_cast<long long>(p.heads) * p.values;
}

// The rows after a sequence's end belong to its neighbour: no number of theirs may enter a product with zero. Calls
// clear(where 16 bytes of such a row are in a tile) for a thread's share of them.
template <class F>
__device__ __forceinline__ void each_row_from(int first, int thread, int threads, const F& clear) {
#pragma unroll 1
  for (int i = thread; i < (kChunk - first) * 8; i += threads) clear(wgmma::swizzled(first + i / 8, i % 8));
}
__device__ __forceinline__ void clear_words(unsigned char* at) { *reinterpret_cast<uint4*>(at) = make_uint4(0, 0, 0, 0); }

}  // namespace hylo
