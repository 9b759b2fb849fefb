// The CUDA driver, found at run time: this code builds and imports where there is no CUDA at all.
#pragma once

#include <cstdint>
#include <string>

#include "common/tensor_map.h"

namespace hylo {

struct Grid {
  unsigned x = 1, y = 1, z = 1;
};

// One kernel of a cubin, loaded on one device. It stays loaded until the process ends, since launches recorded in a
// CUDA graph may outlive every object on the host.
class Kernel {
 public:
  // device: the ordinal that torch uses. shared_bytes: the most that a launch will ask for, beside what the kernel
  // declares. max_cluster: the most blocks of a cluster that a launch will ask for. Throws std::runtime_error, 'no CUDA
  // driver' where there is none.
  Kernel(const std::string& cubin, const std::string& name, int device, int shared_bytes, int max_cluster = 1);

  // Asynchronous, on the caller's stream; `params` is the kernel's only argument and is copied before the return.
  void launch(const Grid& grid, unsigned threads, void* params, void* stream) const;

  // The same, but it may begin before the kernel ahead of it in the stream has ended, if that allows it; common/dependent.cuh
  // says how.
  void launch_early(const Grid& grid, unsigned threads, void* params, void* stream) const;

  // The same as `launch_early` where `cluster` neighbours along x are resident at once and reach each other's shared memory, with
  // shared_bytes of it for each block. grid.x is a multiple of `cluster`.
  void launch_clusters(const Grid& grid, unsigned cluster, unsigned threads, unsigned shared_bytes, void* params,
                       void* stream) const;

  // How many such clusters the GPU holds at once while it does nothing else.
  int resident_clusters(unsigned cluster, unsigned threads, unsigned shared_bytes) const;

  int registers() const;    // per thread
  int local_bytes() const;  // per thread: spills and stack

 private:
  int attribute(int which) const;

  void* context_ = nullptr;
  void* function_ = nullptr;
  unsigned shared_bytes_ = 0;
};

// What boxes are of, and how they lie in shared memory: numbers of two bytes, in rows of 128 bytes with their 16-byte
// pieces permuted; or of four, row by row, where a row takes a multiple of 16 bytes.
enum class Box { kHalves, kWords };

// How the copy engine reads boxes of `rows` x `columns` (the innermost dim and one of the outer ones, all others 1)
// into shared memory, zeros where the tensor ends. sizes and strides, in elements, are of the four dims from the innermost
// out; strides[0] is 1.
TensorMap box_map(std::uintptr_t tensor, const std::uint64_t (&sizes)[4], const std::int64_t (&strides)[4],
                  unsigned columns, unsigned rows, int row_dim, Box form = Box::kHalves);

}  // namespace hylo
