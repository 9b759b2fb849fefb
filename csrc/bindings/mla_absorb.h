// Absorbed latent attention from torch tensors to its results in one call: every microsecond on the host counts there.
#pragma once

#include <pybind11/pybind11.h>

#include <deque>
#include <string>

#include "bindings/loaded_kernels.h"
#include "bindings/torch_tensors.h"
#include "mla_absorb/launch.h"

namespace hylo {

class MlaAbsorb {
 public:
  // load(device, type, R, E, N, scaled, fp8, shared bytes, most blocks of a cluster): the kernel compiled for that, or a
  // str, the reason why there is none. tickets(count, device): as hylo_ops/mla_absorb/tickets.py has it. capturing():
  // whether launches become part of a graph. device_type: DLPack's number; another than CUDA's is for tests with an
  // emulated driver.
  MlaAbsorb(const pybind11::module_& torch, pybind11::object load, pybind11::object tickets, pybind11::object capturing,
            int device_type);

  // Gives (o, lse), or a str: the reason why these inputs are not taken.
  // tensors: q_nope, q_rope, kv_cache, cache_seqlens, cache_starts, block_table, key_scale; the last three may be None.
  // spread: None, or blocks of a cluster, the tiles of 64 tokens up to which one cluster takes all, and those that each
  // takes at least.
  pybind11::object run(const pybind11::tuple& tensors, pybind11::handle scale, bool causal, bool fixed_split,
                       pybind11::handle spread);

  // The same of the seven tensors, scale, causal, fixed_split and return_lse side by side, where TorchTensors::view
  // finds no need of torch's dispatcher. Without return_lse it gives o alone.
  pybind11::object direct(PyObject* const* arguments, Py_ssize_t count);

  // That reason, or None.
  pybind11::object why_not(const pybind11::tuple& tensors, bool fixed_split);

  // The rest is for other bindings, of tensors that they hold themselves.

  // What a call asks for, beside its inputs: `like` is any tensor of its device, `others` how many fp32 numbers the
  // caller wants for itself.
  struct Request {
    pybind11::handle like;
    void* stream;
    mla_absorb::Spread spread;  // of no blocks: what suits the inputs
    long long others;
  };

  // What a launch has to itself while it runs, as all launches of one stream do in turn: the caller's numbers at the
  // start, partial results behind them, tickets.
  struct Workspace {
    int device = -1;
    void* stream = nullptr;
    long long numbers = 0, count = 0;  // fp32, tickets
    pybind11::object held_numbers{}, held_tickets{};
    void *start = nullptr, *tickets = nullptr;
    bool seen = true;  // false where torch's memory cannot be
  };

  struct Ready {
    mla_absorb::Plan plan;
    Workspace workspace;
    void* partial;
  };

  // Fills in the kernel; or gives the reason why there is none, or None. Memory that the inputs name is not looked at.
  pybind11::object find(const mla_absorb::Inputs& inputs, const Kernel*& kernel);

  // Of inputs that have a kernel. What it gives is to be used before Python runs again.
  Ready prepare(const Kernel& kernel, const mla_absorb::Inputs& inputs, const Request& request);

 private:
  using Kernels = LoadedKernels<mla_absorb::Kind>;
  static constexpr int kTensors = 7;

  struct Resident {
    const Kernel* kernel;
    int cluster, clusters;
  };

  struct Call {
    pybind11::handle scale;
    bool causal, fixed_split, with_lse, direct;
    mla_absorb::Spread spread;
  };

  pybind11::object launch(PyObject* const* tensors, const Call& call);
  mla_absorb::Plan planned(const Kernel& kernel, const mla_absorb::Inputs& inputs, mla_absorb::Spread spread);
  bool is_capturing() const;
  Workspace workspace(long long numbers, long long count, const mla_absorb::Inputs& inputs, const Request& request);
  Workspace& of_stream(int device, void* stream);
  Workspace allocated(Workspace sizes, const Tensor& near, pybind11::handle like);
  std::string view(PyObject* const* tensors, bool direct, mla_absorb::Inputs& inputs) const;
  const Kernels::Loaded& loaded(const mla_absorb::Kind& kind);
  int resident(const Kernel& kernel, const mla_absorb::Dims& dims, int cluster);

  TorchTensors torch_;
  pybind11::object load_, tickets_, capturing_;
  int device_type_;
  Kernels kernels_;
  std::deque<Resident> resident_;
  std::deque<Workspace> workspaces_;  // of streams
  bool captured_ = false;             // whether the last launch was: tickets are to be refilled
};

void define_mla_absorb(pybind11::module_& m);

}  // namespace hylo
