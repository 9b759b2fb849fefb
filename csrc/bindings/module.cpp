// hylo_ops._C: one line a launcher. Pointers and streams come as integers; no torch, no CUDA headers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/driver.h"
#include "gated_delta_rule/launch.h"
#include "gated_rms_norm/launch.h"

namespace py = pybind11;
using no_gil = py::call_guard<py::gil_scoped_release>;

PYBIND11_MODULE(_C, m) {
  py::class_<hylo::Kernel>(m, "Kernel")
      .def(py::init<const std::string&, const std::string&, int, int>(), py::arg("cubin"), py::arg("name"),
           py::arg("device"), py::arg("shared_bytes") = 0, no_gil())
      .def_property_readonly("registers", &hylo::Kernel::registers)
      .def_property_readonly("local_bytes", &hylo::Kernel::local_bytes);

  m.def("gated_delta_rule_record_size", [] { return hylo::gated_delta_rule::kRecordSize; });
  m.def("gated_delta_rule_shared_bytes", &hylo::gated_delta_rule::shared_bytes);
  m.def("gated_delta_rule_forward", &hylo::gated_delta_rule::forward, no_gil());
  m.def("gated_delta_rule_step", &hylo::gated_delta_rule::step, no_gil());
  m.def("gated_rms_norm_forward", &hylo::gated_rms_norm::forward, no_gil());
}
