// What the host hands to the kernels of a decode step. Plain data, the same layout on both sides.
#pragma once

#include "common/divider.h"
#include "common/scalar.h"

namespace hylo::mla_step {

// How the warps of a launch share products: each has one part of the weights and some tiles of query rows.
struct Share {
  int warps;
  int parts;             // of a head's weights
  int runs, tiles;       // runs of tiles; tiles of a run
  int rows;              // query rows of a head of the weights: sequences and the heads that share it
  int group;             // those heads
  Divider by_runs, by_parts, by_group;
};

struct QueriesParams {
  const void* q_nope;   // [B, 1, H, nope]
  const void* weights;  // [HK, nope, R]
  const void* q_rope;   // [B, 1, H, E]
  const void* kv_new;   // [B, 1, row]
  void* cache;          // [B, S, row] or [pages, page, row]
  void* latent;         // [B, 1, H, R], contiguous
  void* rotated;        // [B, 1, H, E], contiguous
  int* counted;         // [B]: lengths, but 0 where there is padding
  Integers lengths, position;  // [B]
  Integers table;              // [B, max pages]
  Scalar cos, sin;             // [B or 1, 1, E]
  // Strides in elements.
  long long q_nope_b, q_nope_h, weights_h, weights_n, q_rope_b, q_rope_h, kv_new_b, cache_page, cache_token;
  Share share;
  int heads, rank, rope, row;   // H, R, E, columns of a row of the cache
  int capacity, page;           // tokens of a sequence at most; of a page, or of a sequence without pages
  int appending, parts;         // blocks that rotate and append: all, and of a sequence
  Divider by_parts, by_rope, by_page;  // by_parts: of a sequence
};

struct ValuesParams {
  const void* latent;   // [B, 1, H, R], contiguous
  const void* weights;  // [HK, v, R]
  void* o;              // [B, 1, H, v], contiguous
  long long weights_h, weights_v;
  Share share;
  int heads, values;  // H, v
};

}  // namespace hylo::mla_step
