// What the host hands to the decode kernel. Plain data, the same layout on both sides.
#pragma once

#include "common/divider.h"
#include "common/scalar.h"
#include "common/tensor_map.h"
#include "mla_absorb/work.cuh"

namespace hylo::mla_absorb {

// [B, T, H, width], widths contiguous. Strides in elements.
struct Queries {
  const void* data;
  long long stride_b, stride_t, stride_h;
};

struct Params {
  TensorMap cache;  // columns, tokens of a page (or of a sequence), pages (or sequences)
  Queries latent, rope;
  Integers lengths, starts;  // [B]
  Integers table;            // [B, max pages]; stride is of its rows
  void* o;                   // [B, T, H, R], contiguous
  float* lse;                // [B, T, H], contiguous; null where nobody asks for it
  float* partial;            // of pieces of sequences, partial_size each; null where nothing is cut
  int* tickets;              // of every tile of rows, slot and block of a cluster: who has come where it is merged; zeros
  int batch, heads, tokens;  // B, H, T
  int capacity;              // cached tokens that a sequence has room for
  int page;                  // tokens of it
  int box_shift;             // log2 of the rows that one copy brings
  int clusters;              // that share the work of a tile of rows
  int cluster_shift;         // log2 of their blocks
  int least;                 // tiles of tokens that a cluster takes at least, where these are units
  int slots;                 // partial results of a tile of rows
  Cut cut;
  int causal;
  float scale;  // of scores in base 2
  Divider by_heads, by_page, by_group;  // by_group: heads that share a key scale
};

}  // namespace hylo::mla_absorb
