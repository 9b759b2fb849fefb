#include "bindings/mla_absorb.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "bindings/positional.h"

namespace py = pybind11;

namespace hylo {
namespace {

using mla_absorb::Dims;
using mla_absorb::Inputs;
using mla_absorb::Kind;
using mla_absorb::Plan;
using mla_absorb::Spread;

Spread read_spread(py::handle from) {
  if (from.is_none()) return {};
  const auto [cluster, least] = from.cast<std::tuple<int, int>>();
  const bool power = cluster > 0 && (cluster & (cluster - 1)) == 0;
  if (!power || cluster > mla_absorb::kMaxCluster || least < 0) {
    throw py::value_error("spread must be a power of two up to 16, and a number of tiles");
  }
  return {cluster, least};
}

}  // namespace

MlaAbsorb::MlaAbsorb(const py::module_& torch, py::object load, py::object tickets, py::object capturing,
                     int device_type)
    : torch_(torch, device_type),
      load_(std::move(load)),
      tickets_(std::move(tickets)),
      capturing_(std::move(capturing)),
      device_type_(device_type) {}

py::object MlaAbsorb::run(const py::tuple& tensors, py::handle scale, bool causal, bool fixed_split,
                          py::handle spread) {
  return launch(TorchTensors::items<kTensors>(tensors),
                {scale, causal, fixed_split, true, false, read_spread(spread)});
}

py::object MlaAbsorb::direct(PyObject* const* arguments, Py_ssize_t count) {
  if (count != kTensors + 4) throw py::type_error("eleven arguments are expected");
  PyObject* const* const options = arguments + kTensors;
  for (int i = 1; i < 4; ++i) {
    if (!PyBool_Check(options[i])) return py::str("causal, fixed_split or return_lse is no bool");
  }
  return launch(arguments,
                {options[0], options[1] == Py_True, options[2] == Py_True, options[3] == Py_True, true, {}});
}

py::object MlaAbsorb::launch(PyObject* const* tensors, const Call& call) {
  Inputs inputs{};
  inputs.fixed = call.fixed_split;
  mla_absorb::Options options{0.0f, call.causal};
  const std::string reason = view(tensors, call.direct, inputs);
  if (!reason.empty()) return py::str(reason);
  if (!read_number(call.scale, options.scale)) return py::str("scale is no number");
  const Kernels::Loaded& found = loaded(kind_of(inputs));
  if (found.kernel == nullptr) return found.found;

  const Tensor& q = inputs.q_nope;
  Tensor seen_o, seen_lse{};
  py::object o = torch_.empty_like(tensors[0], q), lse;
  bool seen = torch_.view(o, seen_o);
  if (call.with_lse) {
    lse = torch_.empty(tensors[0], q, kFp32, {q.shape[0], q.shape[1], q.shape[2]});
    seen = seen && torch_.view(lse, seen_lse);
  }
  if (q.shape[0] > 0 && q.shape[1] > 0 && q.shape[2] > 0) {
    void* const stream = torch_.stream(q);
    const Ready ready = prepare(*found.kernel, inputs, {tensors[0], stream, call.spread, 0});
    if (!seen || !ready.workspace.seen) return py::str(TorchTensors::kNotAllocated);
    mla_absorb::launch(*found.kernel, inputs, options, ready.plan, seen_o.data, seen_lse.data, ready.partial,
                       ready.workspace.tickets, stream);
  }
  return call.with_lse ? py::make_tuple(std::move(o), std::move(lse)) : o;
}

Plan MlaAbsorb::planned(const Kernel& kernel, const Inputs& inputs, Spread spread) {
  const Dims dims = kind_of(inputs).dims;
  const bool chosen = spread.cluster == 0;
  if (chosen) spread = spread_of(inputs);
  const std::int64_t least = chosen ? clusters_for(inputs, spread) : 1;
  int clusters = resident(kernel, dims, spread.cluster);
  // The GPU may have no group of multiprocessors that large, or too few of them.
  for (; clusters < least && spread.cluster > 1; clusters = resident(kernel, dims, spread.cluster)) spread.cluster /= 2;
  return plan_of(inputs, spread, clusters);
}

bool MlaAbsorb::is_capturing() const {
  const auto answer = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(capturing_.ptr()));
  if (!answer) throw py::error_already_set();
  return answer.ptr() == Py_True;
}

MlaAbsorb::Ready MlaAbsorb::prepare(const Kernel& kernel, const Inputs& inputs, const Request& request) {
  constexpr long long kUnit = 64;  // numbers of 256 bytes
  const Plan plan = planned(kernel, inputs, request.spread);
  const long long others = (request.others + kUnit - 1) / kUnit * kUnit, numbers = others + plan.numbers;
  if (numbers == 0) return {plan, {}, nullptr};
  Workspace used = workspace(numbers, plan.tickets, inputs, request);
  float* const partial = static_cast<float*>(used.start) + others;
  return {plan, std::move(used), partial};
}

// The stream's, if it is worth keeping and no graph will own it. No other thread comes between this and the launch.
MlaAbsorb::Workspace MlaAbsorb::workspace(long long numbers, long long count, const Inputs& inputs,
                                          const Request& request) {
  constexpr long long kKept = 8 << 20;  // numbers
  const Tensor& q = inputs.q_nope;
  const Workspace sizes{q.device, request.stream, numbers, count};
  const bool of_graph = is_capturing(), refill = captured_;
  captured_ = of_graph;
  if (of_graph || numbers > kKept) return allocated(sizes, q, request.like);
  Workspace& known = of_stream(q.device, request.stream);
  if (known.numbers >= numbers && known.count >= count && !refill) return known;
  // One call's needs do not take from what another's were.
  const Workspace made = allocated(
      {q.device, request.stream, std::max(known.numbers, numbers), std::max(known.count, count)}, q, request.like);
  if (made.seen) known = made;
  return made;
}

// Stays in place.
MlaAbsorb::Workspace& MlaAbsorb::of_stream(int device, void* stream) {
  for (Workspace& known : workspaces_) {
    if (known.device == device && known.stream == stream) return known;
  }
  return workspaces_.emplace_back(Workspace{device, stream});
}

MlaAbsorb::Workspace MlaAbsorb::allocated(Workspace sizes, const Tensor& near, py::handle like) {
  Tensor numbers{}, tickets{};
  sizes.held_numbers = torch_.empty(like, near, kFp32, {sizes.numbers});
  sizes.seen = torch_.view(sizes.held_numbers, numbers);
  if (sizes.count > 0) {
    sizes.held_tickets = tickets_(sizes.count, sizes.device);
    sizes.seen = sizes.seen && torch_.view(sizes.held_tickets, tickets);
  }
  sizes.start = numbers.data;
  sizes.tickets = tickets.data;
  return sizes;
}

py::object MlaAbsorb::why_not(const py::tuple& tensors, bool fixed_split) {
  Inputs inputs{};
  inputs.fixed = fixed_split;
  const std::string reason = view(TorchTensors::items<kTensors>(tensors), false, inputs);
  const Kernel* kernel = nullptr;
  return reason.empty() ? find(inputs, kernel) : py::str(reason);
}

py::object MlaAbsorb::find(const Inputs& inputs, const Kernel*& kernel) {
  const std::string reason = mla_absorb::why_not(inputs, device_type_);
  if (!reason.empty()) return py::str(reason);
  const Kernels::Loaded& found = loaded(kind_of(inputs));
  kernel = found.kernel;
  return kernel == nullptr ? found.found : py::none();
}

std::string MlaAbsorb::view(PyObject* const* tensors, bool direct, Inputs& x) const {
  Tensor* const views[] = {&x.q_nope, &x.q_rope, &x.cache, &x.lengths, &x.starts, &x.table, &x.scales};
  constexpr int kAlways = 4;
  bool there[kTensors];
  if (!torch_.view(tensors, direct, kAlways, views, there)) return TorchTensors::kUnseen;
  x.has_starts = there[4];
  x.paged = there[5];
  x.scaled = there[6];
  return mla_absorb::why_not(x, device_type_);
}

const MlaAbsorb::Kernels::Loaded& MlaAbsorb::loaded(const Kind& kind) {
  return kernels_.find(kind, [this](const Kind& of) {
    const Dims& d = of.dims;
    return load_(of.device, build_name(of.type), d.R, d.E, d.N, d.scaled, d.fp8, shared_size(d), mla_absorb::kMaxCluster);
  });
}

int MlaAbsorb::resident(const Kernel& kernel, const Dims& dims, int cluster) {
  for (const Resident& known : resident_) {
    if (known.kernel == &kernel && known.cluster == cluster) return known.clusters;
  }
  const auto shared = static_cast<unsigned>(shared_size(dims));
  const int clusters = kernel.resident_clusters(static_cast<unsigned>(cluster), mla_absorb::threads_of(dims.fp8), shared);
  resident_.push_back({&kernel, cluster, clusters});
  return clusters;
}

void define_mla_absorb(py::module_& m) {
  py::class_<MlaAbsorb>(m, "MlaAbsorb")
      .def(py::init<const py::module_&, py::object, py::object, py::object, int>(), py::arg("torch"), py::arg("load"),
           py::arg("tickets"), py::arg("capturing"), py::arg("device_type") = kCuda)
      .def("run", &MlaAbsorb::run)
      .def_property_readonly("direct", &positional_function<MlaAbsorb, &MlaAbsorb::direct>)
      .def("why_not", &MlaAbsorb::why_not);
}

}  // namespace hylo
