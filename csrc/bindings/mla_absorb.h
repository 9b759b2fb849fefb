// Absorbed latent attention from torch tensors to its results in one call: every microsecond on the host counts there.
#pragma once

#include <pybind11/pybind11.h>

#include <deque>
#include <map>
#include <string>

#include "bindings/loaded_kernels.h"
#include "bindings/torch_tensors.h"
#include "mla_absorb/launch.h"

namespace hylo {

class MlaAbsorb {
 public:
  // load(device, type, R, E, N, scaled, shared bytes, most blocks of a cluster): the kernel compiled for that, or a str,
  // the reason why there is none. floats(device): an fp32 tensor there. tickets(count, device): as
  // hylo_ops/mla_absorb/tickets.py has it. device_type: DLPack's number; another than CUDA's is for tests with an
  // emulated driver.
  MlaAbsorb(const pybind11::module_& torch, pybind11::object load, pybind11::object floats, pybind11::object tickets,
            int device_type);

  // Gives (o, lse), or a str: the reason why these inputs are not taken.
  // tensors: q_nope, q_rope, kv_cache, cache_seqlens, cache_starts, block_table, key_scale; the last three may be None.
  // spread: None, or blocks of a cluster, the tiles of 64 tokens up to which one cluster takes all, and those that each
  // takes at least.
  pybind11::object run(const pybind11::tuple& tensors, pybind11::handle scale, bool causal, bool fixed_split,
                       pybind11::handle spread);

  // The same of the seven tensors, scale, causal and fixed_split side by side, where TorchTensors::view finds no need of
  // torch's dispatcher.
  pybind11::object direct(PyObject* const* arguments, Py_ssize_t count);

  // That reason, or None.
  pybind11::object why_not(const pybind11::tuple& tensors);

 private:
  using Kernels = LoadedKernels<mla_absorb::Kind>;
  static constexpr int kTensors = 7;

  struct Resident {
    const Kernel* kernel;
    int cluster, clusters;
  };

  pybind11::object launch(PyObject* const* tensors, pybind11::handle scale, bool causal, bool fixed_split,
                          mla_absorb::Spread spread, bool direct);
  std::string view(PyObject* const* tensors, bool direct, mla_absorb::Inputs& inputs) const;
  const Kernels::Loaded& loaded(const mla_absorb::Kind& kind);
  int resident(const Kernel& kernel, const mla_absorb::Dims& dims, int cluster);
  pybind11::handle floats(int device);

  TorchTensors torch_;
  pybind11::object load_, make_floats_, tickets_;
  int device_type_;
  Kernels kernels_;
  std::deque<Resident> resident_;
  std::map<int, pybind11::object> floats_;
};

void define_mla_absorb(pybind11::module_& m);

}  // namespace hylo
