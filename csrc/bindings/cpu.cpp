// cpu.cpp: the CPU operators for Python. Addresses are integers; the doors in mixattn/ops check what is behind them.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "bindings/append_kv_call.h"
#include "bindings/attention_call.h"
#include "bindings/merge_states_call.h"
#include "bindings/recording.h"
#include "common/params.h"
#include "cpu/dispatch.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"

namespace py = pybind11;

namespace {

using mixattn::kAnyNumSeqs;
using mixattn::StepSize;
using mixattn::cpu::IsaKernels;

const IsaKernels& kernels_for(const std::optional<std::string>& isa) {
  return isa ? mixattn::cpu::kernels_named(*isa) : mixattn::cpu::best_kernels();
}

void attention(const mixattn::AttentionParams& p, int64_t num_threads, const std::optional<std::string>& isa) {
  const IsaKernels& kernels = kernels_for(isa);
  mixattn::run_or_record("attention", {p.total_q, p.num_seqs}, [&kernels, p = p, num_threads](StepSize size) mutable {
    p.total_q = size.num_rows;
    p.num_seqs = size.num_seqs;
    mixattn::cpu::mixed_attention(kernels, p, num_threads);
  });
}

void append_kv(const mixattn::AppendKvParams& p, int64_t num_threads, const std::optional<std::string>& isa) {
  const IsaKernels& kernels = kernels_for(isa);
  mixattn::run_or_record("append_kv", {p.num_tokens, kAnyNumSeqs},
                         [&kernels, p = p, num_threads](StepSize size) mutable {
                           p.num_tokens = size.num_rows;
                           mixattn::cpu::append_kv(kernels, p, num_threads);
                         });
}

void merge_states(const mixattn::MergeStatesParams& p, int64_t num_threads, const std::optional<std::string>& isa) {
  const IsaKernels& kernels = kernels_for(isa);
  mixattn::run_or_record("merge_states", {p.num_tokens, kAnyNumSeqs},
                         [&kernels, p = p, num_threads](StepSize size) mutable {
                           p.num_tokens = size.num_rows;
                           mixattn::cpu::merge_states(kernels, p, num_threads);
                         });
}

py::object none_if_empty(const std::string& text) {
  return text.empty() ? py::object(py::none()) : py::object(py::str(text));
}

py::dict choose_isa(const std::vector<std::string>& isas, double bfloat16_s, double fma_s) {
  std::vector<const IsaKernels*> candidates;
  for (const std::string& isa : isas) candidates.push_back(&mixattn::cpu::compiled_kernels_named(isa));
  if (candidates.empty()) throw py::value_error("isas must name some");
  const mixattn::cpu::KernelChoice choice = mixattn::cpu::choose_kernels(
      candidates, [=](const IsaKernels&) { return mixattn::cpu::LoopTimes{bfloat16_s, fma_s}; });
  py::dict result;
  result["isa"] = choice.kernels->name;
  result["passed_over"] = none_if_empty(choice.passed_over);
  return result;
}

py::dict cpu_info() {
  py::list available, compiled, emulated;
  for (const IsaKernels* kernels : mixattn::cpu::compiled_kernels()) {
    compiled.append(kernels->name);
    if (mixattn::cpu::is_available(*kernels)) available.append(kernels->name);
    if (kernels->is_emulated) emulated.append(kernels->name);
  }
  const mixattn::cpu::KernelChoice& choice = mixattn::cpu::best_choice();
  const mixattn::cpu::CpuDescription cpu = mixattn::cpu::describe_cpu();
  const std::string openmp = mixattn::cpu::openmp_runtime();
  py::dict info;
  info["isa"] = choice.kernels->name;
  info["passed_over"] = none_if_empty(choice.passed_over);
  info["available"] = available;
  info["compiled"] = compiled;
  info["emulated"] = emulated;
  info["model"] = cpu.model;
  info["num_cpus"] = cpu.num_cpus;
  info["l1d_bytes"] = cpu.l1d_bytes;
  info["l2_bytes"] = cpu.l2_bytes;
  info["openmp"] = none_if_empty(openmp);
  return info;
}

py::dict measure_roofs(int64_t num_threads, const std::optional<std::string>& isa) {
  const IsaKernels& kernels = kernels_for(isa);
  mixattn::cpu::Roofs roofs;
  {
    const py::gil_scoped_release unlocked;
    roofs = mixattn::cpu::measure_roofs(kernels, num_threads);
  }
  py::dict result;
  result["read_gb_s"] = roofs.read_gb_s;
  result["fma_gflop_s"] = roofs.fma_gflop_s;
  return result;
}

}  // namespace

void bind_cpu(py::module_& m) {
  using py::arg;
  mixattn::def_attention<int64_t, const std::optional<std::string>&>(
      m, "attention", &attention, arg("num_threads"), arg("isa") = py::none(),
      "Paged attention of a batch by its plan (params.h). ValueError before anything is written.");
  mixattn::def_append_kv<int64_t, const std::optional<std::string>&>(
      m, "append_kv", &append_kv, arg("num_threads"), arg("isa") = py::none(),
      "Stores rows of K (rotated) and V in their slots, rotates q. ValueError before anything is written.");
  mixattn::def_merge_states<int64_t, const std::optional<std::string>&>(
      m, "merge_states", &merge_states, arg("num_threads"), arg("isa") = py::none(),
      "Attention over a union of disjoint key sets, from the result over each.");
  m.def("cpu_info", &cpu_info, "This CPU, the kernels that it runs, and the OpenMP runtime that they share.");
  m.def("choose_isa", &choose_isa, arg("isas"), arg("bfloat16_s"), arg("fma_s"),
        "What would be chosen of these, best first, where the loops take so long.");
  m.def("measure_roofs", &measure_roofs, arg("num_threads"), arg("isa") = py::none(),
        "read_gb_s and fma_gflop_s of num_threads threads, measured here in about a second.");
}
