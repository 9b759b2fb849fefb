// Kernels by what they are compiled for.
#pragma once

#include <pybind11/pybind11.h>

#include <deque>
#include <utility>

#include "common/driver.h"

namespace hylo {

template <class Kind>
class LoadedKernels {
 public:
  struct Loaded {
    Kind kind;
    pybind11::object found;  // a Kernel, or a str: the reason why there is none
    const Kernel* kernel;    // or null
  };

  // load(kind) gives what is found; it is called once for each kind.
  template <class Load>
  const Loaded& find(const Kind& kind, const Load& load) {
    for (const Loaded& known : all_) {
      if (known.kind == kind) return known;
    }
    pybind11::object found = load(kind);
    const Kernel* kernel = pybind11::isinstance<Kernel>(found) ? found.cast<const Kernel*>() : nullptr;
    all_.push_back({kind, std::move(found), kernel});
    return all_.back();
  }

 private:
  std::deque<Loaded> all_;  // what it holds stays in place
};

}  // namespace hylo
