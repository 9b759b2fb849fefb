// The launchers around the attention of a decode step, that the bindings expose.
#pragma once

#include <string>

#include "common/driver.h"
#include "common/tensor.h"

namespace hylo::mla_step {

struct Inputs {
  Tensor q_nope, q_rope;    // [B, 1, H, nope], [B, 1, H, E]
  Tensor kv_new;            // [B, 1, row]
  Tensor w_uk, w_uv;        // [HK, nope, R], [HK, v, R]
  Tensor cache;             // [B, S, row], or [pages, page, row] with a table
  Tensor lengths, position; // [B]
  Tensor cos, sin;          // [B or 1, 1, E]
  Tensor starts;            // [B]
  Tensor table;             // [B, max pages]
  std::int64_t key_scales = 0;  // columns of a row, behind the rope
  bool has_starts = false, paged = false;
};

// What a kernel is compiled for.
struct Kind {
  int device;
  ElementType type;
  int nope, R;
  bool values;  // of the two, the one behind the attention

  bool operator==(const Kind& other) const {
    return device == other.device && type == other.type && nope == other.nope && R == other.R &&
           values == other.values;
  }
};

// Where what the launches hand on lies in one allocation, in numbers of 16 bits from its start: queries and results of
// the attention, [B, 1, H, R] each, rotated queries [B, 1, H, E] and tokens to be counted [B] int32; all contiguous.
struct Workspace {
  std::int64_t latent, rotated, results, counted, size;
};

// The reason why no kernel takes these inputs on devices of a type, or an empty string. Looks at all that the op asks
// of shapes and types, but for what mla_absorb::why_not looks at.
std::string why_not(const Inputs& inputs, int device_type);

// The following are of inputs that both let pass, with at least one query row.
Kind kind_of(const Inputs& inputs, bool values);
Workspace workspace_of(const Inputs& inputs);

// Writes all of the workspace but the results, and the cache's new rows.
void launch_queries(const Kernel& kernel, const Inputs& inputs, const Workspace& at, void* workspace, void* stream);

// From the results to o [B, 1, H, v], contiguous. Nothing but the attention may have been launched between the two.
void launch_values(const Kernel& kernel, const Inputs& inputs, const Workspace& at, const void* workspace, void* o,
                   void* stream);

}  // namespace hylo::mla_step
