// recording.cpp: recordings for Python; see recording.h.

#include "bindings/recording.h"

#include <pybind11/stl.h>

namespace py = pybind11;

void bind_recording(py::module_& m) {
  using mixattn::Recording;
  py::class_<Recording>(m, "Recording", "Calls of the CPU operators, kept to be run again.")
      .def(py::init<>())
      .def("begin", [](Recording& self) { mixattn::active_recording = &self; })
      .def("end", [](Recording&) { mixattn::active_recording = nullptr; })
      .def("run", &Recording::run)
      .def("run_timed", &Recording::run_timed)
      .def("__len__", &Recording::size);
}
