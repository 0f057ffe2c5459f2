// recording.cpp: recordings for Python; see recording.h.

#include "bindings/recording.h"

#include <pybind11/stl.h>

namespace py = pybind11;

void bind_recording(py::module_& m) {
  using mixattn::Recording;
  using py::arg;
  py::class_<Recording>(m, "Recording", "Calls of the CPU operators, kept to be run again.")
      .def(py::init([](int64_t num_rows, int64_t num_seqs, int64_t num_threads) {
             return Recording({num_rows, num_seqs}, num_threads);
           }),
           arg("num_rows"), arg("num_seqs"), arg("num_threads"))
      .def("begin", [](Recording& self) { mixattn::active_recording = &self; })
      .def("end", [](Recording&) { mixattn::active_recording = nullptr; })
      .def(
          "run", [](const Recording& self, int64_t num_rows, int64_t num_seqs) { self.run({num_rows, num_seqs}); },
          arg("num_rows"), arg("num_seqs"))
      .def(
          "run_timed",
          [](const Recording& self, int64_t num_rows, int64_t num_seqs) {
            return self.run_timed({num_rows, num_seqs});
          },
          arg("num_rows"), arg("num_seqs"))
      .def("__len__", &Recording::num_calls);
}
