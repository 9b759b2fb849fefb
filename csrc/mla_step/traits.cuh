// How a decode step's products are spread over warps, for the host and the kernels alike.
#pragma once

#include "common/portable.h"

namespace hylo::mla_step {

constexpr int kThreads = 64;    // of a block: two warps, so that few products spread over many multiprocessors
constexpr int kTileRows = 8;    // query rows that a warp multiplies at once
constexpr int kColumns = 64;    // of the latent, that a warp has of the key up-projection
constexpr int kValues = 16;     // of a head, that a warp has of the value up-projection
constexpr int kStep = 16;       // numbers that one product sums over
constexpr int kElements = 4;    // that a thread rotates or copies
constexpr int kMaxNope = 128;   // numbers of each of its columns, whose weights a warp keeps in registers
constexpr int kManyWarps = 1056;  // eight to a multiprocessor; beyond, each has several tiles for its weights

}  // namespace hylo::mla_step
