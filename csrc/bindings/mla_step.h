// A decode step of latent attention, from torch tensors to its result in one call of three launches: every microsecond
// on the host counts there.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "bindings/loaded_kernels.h"
#include "bindings/mla_absorb.h"
#include "bindings/torch_tensors.h"
#include "mla_step/launch.h"

namespace hylo {

class MlaStep {
 public:
  // load(device, type, nope, R, values): the kernel before the attention or the one behind it, compiled for that, or
  // a str, the reason why there is none. attention: an MlaAbsorb. device_type: DLPack's number; another than CUDA's is
  // for tests with an emulated driver.
  MlaStep(const pybind11::module_& torch, pybind11::object load, pybind11::object attention, int device_type);

  // Gives o, or a str: the reason why these inputs are not taken. The cache is updated in place.
  // tensors: q_nope, q_rope, kv_new, w_uk, w_uv, kv_cache, cache_seqlens, position, cos, sin, cache_starts,
  // block_table; the last two may be None. key_scale: None or a number of columns.
  pybind11::object run(const pybind11::tuple& tensors, pybind11::handle scale, pybind11::handle key_scale);

  // The same of the twelve tensors, scale and key_scale side by side, where TorchTensors::view finds no need of torch's
  // dispatcher.
  pybind11::object direct(PyObject* const* arguments, Py_ssize_t count);

  // That reason, or None.
  pybind11::object why_not(const pybind11::tuple& tensors, pybind11::handle key_scale);

 private:
  using Kernels = LoadedKernels<mla_step::Kind>;
  static constexpr int kTensors = 12;

  struct Found {
    const Kernel *queries, *attention, *values;
  };

  pybind11::object launch(PyObject* const* tensors, pybind11::handle scale, pybind11::handle key_scale, bool direct);
  std::string view(PyObject* const* tensors, pybind11::handle key_scale, bool direct, mla_step::Inputs& inputs) const;
  // Fills in the kernels, where there is a query row; a reason, or None. attention: its inputs.
  pybind11::object find(const mla_step::Inputs& inputs, const mla_absorb::Inputs& attention, Found& found);
  const Kernels::Loaded& loaded(const mla_step::Kind& kind);

  TorchTensors torch_;
  pybind11::object load_, held_attention_;
  MlaAbsorb& attention_;
  int device_type_;
  Kernels kernels_;
};

void define_mla_step(pybind11::module_& m);

}  // namespace hylo
