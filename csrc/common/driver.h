// The CUDA driver, found at run time: this code builds and imports where there is no CUDA at all.
#pragma once

#include <string>

namespace hylo {

// One kernel of a cubin, loaded on one device. It stays loaded until the process ends, since launches recorded in a
// CUDA graph may outlive every object on the host.
class Kernel {
 public:
  // device: the ordinal that torch uses. Throws std::runtime_error, 'no CUDA driver' where there is none.
  Kernel(const std::string& cubin, const std::string& name, int device);

  // Asynchronous, on the caller's stream; `params` is the kernel's only argument and is copied before the return.
  void launch(unsigned blocks, unsigned threads, void* params, void* stream) const;

  int registers() const;    // per thread
  int local_bytes() const;  // per thread: spills and stack

 private:
  int attribute(int which) const;

  void* context_ = nullptr;
  void* function_ = nullptr;
};

}  // namespace hylo
