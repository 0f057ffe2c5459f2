// cpu.cpp: the CPU operators for Python. Addresses are integers; the doors in mixattn/ops check what is behind them.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string>

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

py::dict cpu_info() {
  py::list available, compiled, emulated;
  for (const IsaKernels* kernels : mixattn::cpu::compiled_kernels()) {
    compiled.append(kernels->name);
    if (mixattn::cpu::is_available(*kernels)) available.append(kernels->name);
    if (kernels->is_emulated) emulated.append(kernels->name);
  }
  const mixattn::cpu::CpuDescription cpu = mixattn::cpu::describe_cpu();
  const std::string openmp = mixattn::cpu::openmp_runtime();
  py::dict info;
  info["isa"] = mixattn::cpu::best_kernels().name;
  info["available"] = available;
  info["compiled"] = compiled;
  info["emulated"] = emulated;
  info["model"] = cpu.model;
  info["num_cpus"] = cpu.num_cpus;
  info["l1d_bytes"] = cpu.l1d_bytes;
  info["l2_bytes"] = cpu.l2_bytes;
  info["openmp"] = openmp.empty() ? py::object(py::none()) : py::object(py::str(openmp));
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
  m.def("measure_roofs", &measure_roofs, arg("num_threads"), arg("isa") = py::none(),
        "read_gb_s and fma_gflop_s of num_threads threads, measured here in about a second.");
}
