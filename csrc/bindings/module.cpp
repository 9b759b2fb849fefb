// hylo_ops._C: one line a launcher. Pointers and streams come as integers; no torch, no CUDA headers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/gated_delta_rule_step.h"
#include "bindings/mla_absorb.h"
#include "bindings/mla_step.h"
#include "bindings/skinny_linear.h"
#include "bindings/ssd_step.h"
#include "common/driver.h"
#include "gated_delta_rule/launch_chunk.h"
#include "gated_delta_rule/launch_fp32.h"
#include "gated_rms_norm/launch.h"
#include "ssd/launch.h"
#include "ssd/launch_plain.h"

namespace py = pybind11;
using no_gil = py::call_guard<py::gil_scoped_release>;

PYBIND11_MODULE(_C, m) {
  py::class_<hylo::Kernel>(m, "Kernel")
      .def(py::init<const std::string&, const std::string&, int, int, int>(), py::arg("cubin"), py::arg("name"),
           py::arg("device"), py::arg("shared_bytes") = 0, py::arg("max_cluster") = 1, no_gil())
      .def_property_readonly("registers", &hylo::Kernel::registers)
      .def_property_readonly("local_bytes", &hylo::Kernel::local_bytes);

  using hylo::gated_delta_rule::ChunkCall;
  using hylo::gated_delta_rule::Share;
  using hylo::gated_delta_rule::Strides;
  m.attr("GATED_DELTA_RULE_RECORD_BYTES") = hylo::gated_delta_rule::kRecordSize;
  m.def("gated_delta_rule_chunk_shared_bytes", &hylo::gated_delta_rule::chunk_shared_bytes);
  m.def("gated_delta_rule_can_solve", &hylo::gated_delta_rule::can_solve);
  m.def("gated_delta_rule_gradients_parts", &hylo::gated_delta_rule::chunk_gradients_parts);
  py::class_<Share>(m, "GatedDeltaRuleShare")
      .def(py::init<bool, const std::string&, int, int>())
      .def_readonly("solving", &Share::solving)
      .def_readonly("pieces", &Share::pieces)
      .def_readonly("makers", &Share::makers);
  py::class_<ChunkCall>(m, "GatedDeltaRuleChunkCall")
      .def(py::init<std::uintptr_t, std::uintptr_t, std::uintptr_t, std::uintptr_t, std::uintptr_t, std::uintptr_t,
                    std::uintptr_t, std::uintptr_t, const std::array<std::int64_t, 7>&, const Strides&, const Strides&,
                    int, int, int, float, float, std::uintptr_t>())
      .def("cuts", &ChunkCall::cuts, no_gil())
      .def("inverse", &ChunkCall::inverse, no_gil())
      .def("outputs", &ChunkCall::outputs, no_gil())
      .def("states", &ChunkCall::states, no_gil())
      .def("dstates", &ChunkCall::dstates, no_gil())
      .def("gradients", &ChunkCall::gradients, no_gil());
  using hylo::gated_delta_rule::Fp32Call;
  m.def("gated_delta_rule_fp32_shared_bytes", &hylo::gated_delta_rule::fp32_shared_bytes);
  py::class_<Fp32Call>(m, "GatedDeltaRuleFp32Call")
      .def(py::init<const std::array<std::uintptr_t, 3>&, std::uintptr_t, std::uintptr_t, std::uintptr_t,
                    std::uintptr_t, const std::array<std::int64_t, 7>&, const std::array<Strides, 3>&, int, float,
                    std::uintptr_t>())
      .def("inverse", &Fp32Call::inverse, no_gil())
      .def("outputs", &Fp32Call::outputs, no_gil())
      .def("share", &Fp32Call::share)
      .def("states", &Fp32Call::states, no_gil())
      .def("dstates", &Fp32Call::dstates, no_gil())
      .def("dscores", &Fp32Call::dscores, no_gil())
      .def("dqk", &Fp32Call::dqk, no_gil());
  hylo::define_gated_delta_rule_step(m);
  hylo::define_mla_absorb(m);
  hylo::define_mla_step(m);
  hylo::define_skinny_linear(m);
  hylo::define_ssd_steps(m);
  using hylo::gated_rms_norm::BackwardGrid;
  m.def("gated_rms_norm_forward", &hylo::gated_rms_norm::forward, no_gil());
  py::class_<BackwardGrid>(m, "GatedRmsNormGrid")
      .def_readonly("blocks", &BackwardGrid::blocks)
      .def_readonly("rows", &BackwardGrid::rows);
  m.def("gated_rms_norm_backward_grid", &hylo::gated_rms_norm::backward_grid);
  m.def("gated_rms_norm_backward", &hylo::gated_rms_norm::backward, no_gil());

  using SsdCall = hylo::ssd::ChunkCall;
  m.def("ssd_chains", &hylo::ssd::chains);
  m.def("ssd_most_windows", &hylo::ssd::most_windows);
  m.def("ssd_chunk_shared_bytes", &hylo::ssd::chunk_shared_bytes);
  m.def("ssd_gradients_shared_bytes", &hylo::ssd::gradients_shared_bytes);
  using hylo::ssd::Mixed;
  py::class_<Mixed>(m, "SsdMixed")
      .def(py::init([](std::uintptr_t raw, std::uintptr_t mixed, std::uintptr_t last_inputs, std::int64_t stride_b,
                       std::int64_t stride_t, std::int64_t channels, const hylo::ssd::ScalarView& weight,
                       const hylo::ssd::ScalarView& bias, int taps) {
        return Mixed{raw, mixed, last_inputs, stride_b, stride_t, channels, weight, bias, taps};
      }));
  py::class_<SsdCall>(m, "SsdChunkCall")
      .def(py::init<const std::array<std::uintptr_t, 3>&, const std::array<hylo::ssd::Strides, 3>&,
                    const hylo::ssd::ScalarView&, const hylo::ssd::ScalarView&, const hylo::ssd::ScalarView&,
                    const hylo::ssd::ScalarView&, std::uintptr_t, std::uintptr_t, const hylo::ssd::Shape&, int, int,
                    int, int, const std::array<std::uintptr_t, 2>&, const std::array<std::uintptr_t, 2>&, bool, float,
                    float, std::uintptr_t>())
      .def("set_gradients", &SsdCall::set_gradients)
      .def("begin", &SsdCall::begin, no_gil())
      .def("mix", &SsdCall::mix, no_gil())
      .def("begin_mixed", &SsdCall::begin_mixed, no_gil())
      .def("outputs", &SsdCall::outputs, no_gil())
      .def("window_heads", &SsdCall::window_heads)
      .def("owed_rows", &SsdCall::owed_rows)
      .def("states", &SsdCall::states, no_gil())
      .def("gradients", &SsdCall::gradients, no_gil())
      .def("vectors", &SsdCall::vectors, no_gil());
  using SsdPlainCall = hylo::ssd::plain::Call;
  m.def("ssd_plain_shared_bytes", &hylo::ssd::plain::shared_bytes);
  m.def("ssd_plain_factors_length", &hylo::ssd::plain::factors_length);
  m.def("ssd_plain_sums_length", &hylo::ssd::plain::sums_length);
  py::class_<SsdPlainCall>(m, "SsdPlainCall")
      .def(py::init<const std::array<std::uintptr_t, 3>&, const std::array<hylo::ssd::Strides, 3>&,
                    const hylo::ssd::ScalarView&, const hylo::ssd::ScalarView&, const hylo::ssd::ScalarView&,
                    const hylo::ssd::ScalarView&, std::uintptr_t, const hylo::ssd::Shape&, int, std::uintptr_t, bool,
                    float, float, std::uintptr_t>())
      .def("factors", &SsdPlainCall::factors, no_gil())
      .def("set_states", &SsdPlainCall::set_states)
      .def("set_gradient", &SsdPlainCall::set_gradient)
      .def("states", &SsdPlainCall::states, no_gil())
      .def("outputs", &SsdPlainCall::outputs, no_gil())
      .def("gradients", &SsdPlainCall::gradients, no_gil())
      .def("ddt", &SsdPlainCall::ddt, no_gil())
      .def("vectors", &SsdPlainCall::vectors, no_gil());
}
