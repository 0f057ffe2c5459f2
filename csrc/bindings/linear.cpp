// linear.cpp: packed weights, linear maps and the operations around them, for Python. Addresses are integers; the doors
// in mixattn/ops check what is behind them.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string>

#include "bindings/recording.h"
#include "cpu/dispatch.h"
#include "cpu/ops.h"

namespace py = pybind11;

namespace {

using mixattn::kAnyNumSeqs;
using mixattn::StepSize;
using mixattn::WeightForm;
using mixattn::cpu::IsaKernels;
using Isa = std::optional<std::string>;

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

const IsaKernels& kernels_for(const Isa& isa) {
  return isa ? mixattn::cpu::kernels_named(*isa) : mixattn::cpu::best_kernels();
}

WeightForm form_named(const std::string& name) {
  if (name == "float32") return WeightForm::kFloat32;
  if (name == "bfloat16") return WeightForm::kBFloat16;
  if (name == "float16") return WeightForm::kFloat16;
  if (name == "q8_0") return WeightForm::kQ8_0;
  if (name == "q4_0") return WeightForm::kQ4_0;
  if (name == "q4_1") return WeightForm::kQ4_1;
  throw py::value_error("form must be float32, bfloat16, float16, q8_0, q4_0 or q4_1, got '" + name + "'");
}

int64_t weight_row_bytes(const std::string& form, int64_t depth) {
  return mixattn::cpu::weight_row_bytes(form_named(form), depth);
}

int64_t weight_panel_bytes(const std::string& form, int64_t depth, const Isa& isa) {
  return mixattn::cpu::weight_panel_bytes(kernels_for(isa), form_named(form), depth);
}

int64_t panel_cols(const Isa& isa) {
  return kernels_for(isa).panel_cols;
}

void pack_weight(const std::string& form, uintptr_t rows, int64_t num_rows, int64_t depth, uintptr_t panels,
                 int64_t num_threads, const Isa& isa) {
  const IsaKernels& kernels = kernels_for(isa);
  const WeightForm weight_form = form_named(form);
  const py::gil_scoped_release unlocked;
  mixattn::cpu::pack_weight(kernels, weight_form, at<const void>(rows), num_rows, depth, at<void>(panels), num_threads);
}

void unpack_weight_rows(const std::string& form, uintptr_t panels, int64_t num_rows, int64_t depth, uintptr_t ids,
                        int64_t num_ids, uintptr_t out, int64_t num_threads, const Isa& isa) {
  const IsaKernels& kernels = kernels_for(isa);
  const WeightForm weight_form = form_named(form);
  mixattn::run_or_record("weight_rows", {num_ids, kAnyNumSeqs}, [=, &kernels](StepSize size) {
    mixattn::cpu::unpack_weight_rows(kernels, weight_form, at<const void>(panels), num_rows, depth,
                                     at<const int64_t>(ids), size.num_rows, at<float>(out), num_threads);
  });
}

void linear(const std::string& form, uintptr_t panels, uintptr_t x, uintptr_t bias, uintptr_t residual, uintptr_t y,
            int64_t num_rows, int64_t num_cols, int64_t depth, int64_t x_stride, int64_t residual_stride,
            int64_t y_stride, bool is_gated, bool rounds_x, int64_t num_threads, const Isa& isa) {
  const IsaKernels& kernels = kernels_for(isa);
  mixattn::LinearParams p;
  p.form = form_named(form);
  p.panels = at<const void>(panels);
  p.x = at<const float>(x);
  p.bias = at<const float>(bias);
  p.residual = at<const float>(residual);
  p.y = at<float>(y);
  p.num_rows = num_rows;
  p.num_cols = num_cols;
  p.depth = depth;
  p.panel_bytes = mixattn::cpu::weight_panel_bytes(kernels, p.form, depth);
  p.x_stride = x_stride;
  p.residual_stride = residual_stride;
  p.y_stride = y_stride;
  p.is_gated = is_gated;
  mixattn::run_or_record(is_gated ? "gated_linear" : "linear", {num_rows, kAnyNumSeqs},
                         [=, &kernels](StepSize size) mutable {
                           p.num_rows = size.num_rows;
                           mixattn::cpu::linear(kernels, p, rounds_x, num_threads);
                         });
}

void rms_norm(uintptr_t x, uintptr_t weight, uintptr_t y, int64_t num_rows, int64_t num_groups, int64_t size,
              int64_t x_row_stride, int64_t x_group_stride, double eps, int64_t num_threads, const Isa& isa) {
  mixattn::RmsNormParams p;
  p.x = at<const float>(x);
  p.weight = at<const float>(weight);
  p.y = at<float>(y);
  p.num_rows = num_rows;
  p.num_groups = num_groups;
  p.size = size;
  p.x_row_stride = x_row_stride;
  p.x_group_stride = x_group_stride;
  p.y_row_stride = num_groups * size;
  p.y_group_stride = size;
  p.eps = static_cast<float>(eps);
  const IsaKernels& kernels = kernels_for(isa);
  mixattn::run_or_record("rms_norm", {num_rows, kAnyNumSeqs}, [=, &kernels](StepSize size) mutable {
    p.num_rows = size.num_rows;
    mixattn::cpu::rms_norm(kernels, p, num_threads);
  });
}

void silu_mul(uintptr_t gate_up, uintptr_t y, int64_t num_rows, int64_t size, int64_t gate_up_stride,
              int64_t num_threads, const Isa& isa) {
  mixattn::SiluMulParams p;
  p.gate_up = at<const float>(gate_up);
  p.y = at<float>(y);
  p.num_rows = num_rows;
  p.size = size;
  p.gate_up_stride = gate_up_stride;
  p.y_stride = size;
  const IsaKernels& kernels = kernels_for(isa);
  mixattn::run_or_record("silu_mul", {num_rows, kAnyNumSeqs}, [=, &kernels](StepSize size) mutable {
    p.num_rows = size.num_rows;
    mixattn::cpu::silu_mul(kernels, p, num_threads);
  });
}

}  // namespace

void bind_linear(py::module_& m) {
  using py::arg;
  m.def("weight_row_bytes", &weight_row_bytes, arg("form"), arg("depth"));
  m.def("weight_panel_bytes", &weight_panel_bytes, arg("form"), arg("depth"), arg("isa") = py::none());
  m.def("panel_cols", &panel_cols, arg("isa") = py::none(), "Rows of a matrix in one panel.");
  m.def("pack_weight", &pack_weight, py::kw_only(), arg("form"), arg("rows"), arg("num_rows"), arg("depth"),
        arg("panels"), arg("num_threads"), arg("isa") = py::none(), "A matrix as stored, into panels.");
  m.def("unpack_weight_rows", &unpack_weight_rows, py::kw_only(), arg("form"), arg("panels"), arg("num_rows"),
        arg("depth"), arg("ids"), arg("num_ids"), arg("out"), arg("num_threads"), arg("isa") = py::none(),
        "Rows of a matrix in panels, as float32.");
  m.def("linear", &linear, py::kw_only(), arg("form"), arg("panels"), arg("x"), arg("bias"), arg("residual"), arg("y"),
        arg("num_rows"), arg("num_cols"), arg("depth"), arg("x_stride"), arg("residual_stride"), arg("y_stride"),
        arg("is_gated"), arg("rounds_x"), arg("num_threads"), arg("isa") = py::none(),
        "y = x W^T + bias + residual over panels of W; if is_gated silu(g) * u of its columns, first all g.");
  m.def("rms_norm", &rms_norm, py::kw_only(), arg("x"), arg("weight"), arg("y"), arg("num_rows"), arg("num_groups"),
        arg("size"), arg("x_row_stride"), arg("x_group_stride"), arg("eps"), arg("num_threads"),
        arg("isa") = py::none());
  m.def("silu_mul", &silu_mul, py::kw_only(), arg("gate_up"), arg("y"), arg("num_rows"), arg("size"),
        arg("gate_up_stride"), arg("num_threads"), arg("isa") = py::none());
}
