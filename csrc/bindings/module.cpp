// module.cpp: mixattn._C, the compiled half of the package. Raw addresses in and out; no torch, no numpy.

#include <pybind11/pybind11.h>

namespace py = pybind11;

void bind_plan(py::module_& m);
void bind_cpu(py::module_& m);
void bind_linear(py::module_& m);
void bind_recording(py::module_& m);
void bind_cuda(py::module_& m);

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled half of mixattn. Addresses are integers; the doors in mixattn.ops check what is behind them.";
  bind_plan(m);
  bind_cpu(m);
  bind_linear(m);
  bind_recording(m);
  bind_cuda(m);
}
