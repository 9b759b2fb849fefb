// The launcher of the decode kernel, that the bindings expose.
#pragma once

#include <string>

#include "common/driver.h"
#include "common/tensor.h"
#include "mla_absorb/work.cuh"

namespace hylo::mla_absorb {

struct Inputs {
  Tensor q_nope, q_rope;  // [B, T, H, R], [B, T, H, E]
  Tensor cache;           // [B, S, row], or [pages, page, row] with a table; of bytes: rows in fp8
  Tensor lengths, starts; // [B]
  Tensor table;           // [B, max pages]
  Tensor scales;          // [B, S, HK] or [pages, page, HK]
  bool has_starts = false, paged = false, scaled = false;
  bool fixed = false;     // whether a sequence is cut by its own length alone, so that no other batch changes its bits
};

struct Options {
  float scale;
  bool causal;
};

// What a kernel is compiled for.
struct Kind {
  int device;
  ElementType type;
  Dims dims;

  bool operator==(const Kind& other) const {
    return device == other.device && type == other.type && dims.R == other.dims.R && dims.E == other.dims.E &&
           dims.N == other.dims.N && dims.scaled == other.dims.scaled && dims.fp8 == other.dims.fp8;
  }
};

// How a launch is spread over the GPU. Blocks of a cluster merge what they have through shared memory; clusters,
// through global memory, and only where a sequence is cut between them.
struct Spread {
  int cluster = 0;  // blocks
  int least = 0;    // tiles of 64 tokens that each cluster takes; where it is 0, each takes whole sequences
};

// The same with what depends on the GPU, and the workspace that it takes.
struct Plan {
  Spread spread;
  Cut cut;
  int row_tiles, clusters;
  long long slots;
  long long tickets, numbers;  // int32, fp32; 0 where no sequence can be cut
};

// The reason why no kernel takes these inputs on devices of a type, or an empty string. Looks at all that the op asks
// of shapes and types.
std::string why_not(const Inputs& inputs, int device_type);

// The following are of inputs that why_not lets pass.
Kind kind_of(const Inputs& inputs);

// One that suits them.
Spread spread_of(const Inputs& inputs);

// The clusters that it needs at once, where each takes whole sequences.
std::int64_t clusters_for(const Inputs& inputs, const Spread& spread);

// resident: clusters of that spread that the GPU holds at once.
Plan plan_of(const Inputs& inputs, const Spread& spread, int resident);

// o [B, T, H, R] and lse [B, T, H], or null, are contiguous, of the queries' type and fp32. There is at least one query
// row.
void launch(const Kernel& kernel, const Inputs& inputs, const Options& options, const Plan& plan, void* o, void* lse,
            void* partial, void* tickets, void* stream);

}  // namespace hylo::mla_absorb
