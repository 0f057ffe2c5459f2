// cpu.cpp: the CPU operators for Python. Addresses are integers; the doors in mixattn/ops check what is behind them.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string>

#include "bindings/attention_call.h"
#include "bindings/recording.h"
#include "common/params.h"
#include "cpu/dispatch.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"

namespace py = pybind11;

namespace {

using mixattn::at;
using mixattn::dtype_named;
using mixattn::kv_dtype_named;
using mixattn::kv_scale;
using mixattn::ScaleSizes;
using mixattn::Strides2;
using mixattn::Strides3;
using mixattn::cpu::IsaKernels;

const IsaKernels& kernels_for(const std::optional<std::string>& isa) {
  return isa ? mixattn::cpu::kernels_named(*isa) : mixattn::cpu::best_kernels();
}

void attention(const mixattn::AttentionParams& p, int64_t num_threads, const std::optional<std::string>& isa) {
  const IsaKernels& kernels = kernels_for(isa);
  mixattn::run_or_record("attention", [=, &kernels] { mixattn::cpu::mixed_attention(kernels, p, num_threads); });
}

void append_kv(const std::string& dtype, const std::string& kv_dtype, uintptr_t k, uintptr_t v, uintptr_t k_cache,
               uintptr_t v_cache, uintptr_t k_scale, uintptr_t v_scale, uintptr_t slot_mapping, uintptr_t q,
               uintptr_t q_out, uintptr_t positions, uintptr_t rope_cos_sin, int64_t num_tokens, int64_t num_q_heads,
               int64_t num_kv_heads, int64_t head_dim, int64_t num_pages, int64_t page_size, int64_t max_positions,
               int64_t rotary_dim, Strides2 k_strides, Strides2 v_strides, Strides2 q_strides, Strides2 q_out_strides,
               Strides3 k_cache_strides, Strides3 v_cache_strides, const ScaleSizes& k_scale_sizes,
               const ScaleSizes& v_scale_sizes, int64_t rope_stride, bool interleaved, int64_t num_threads,
               const std::optional<std::string>& isa) {
  mixattn::AppendKvParams p;
  p.dtype = dtype_named(dtype);
  p.kv_dtype = kv_dtype_named(kv_dtype);
  p.k = at<const void>(k);
  p.v = at<const void>(v);
  p.k_cache = at<void>(k_cache);
  p.v_cache = at<void>(v_cache);
  p.k_scale = kv_scale(k_scale, k_scale_sizes);
  p.v_scale = kv_scale(v_scale, v_scale_sizes);
  p.slot_mapping = at<const int64_t>(slot_mapping);
  p.q = at<const void>(q);
  p.q_out = at<void>(q_out);
  p.positions = at<const int64_t>(positions);
  p.rope_cos_sin = at<const float>(rope_cos_sin);
  p.num_tokens = num_tokens;
  p.num_q_heads = num_q_heads;
  p.num_kv_heads = num_kv_heads;
  p.head_dim = head_dim;
  p.num_pages = num_pages;
  p.page_size = page_size;
  p.max_positions = max_positions;
  p.rotary_dim = rotary_dim;
  p.k_token_stride = k_strides[0];
  p.k_head_stride = k_strides[1];
  p.v_token_stride = v_strides[0];
  p.v_head_stride = v_strides[1];
  p.q_token_stride = q_strides[0];
  p.q_head_stride = q_strides[1];
  p.q_out_token_stride = q_out_strides[0];
  p.q_out_head_stride = q_out_strides[1];
  p.k_cache_page_stride = k_cache_strides[0];
  p.k_cache_token_stride = k_cache_strides[1];
  p.k_cache_head_stride = k_cache_strides[2];
  p.v_cache_page_stride = v_cache_strides[0];
  p.v_cache_token_stride = v_cache_strides[1];
  p.v_cache_head_stride = v_cache_strides[2];
  p.rope_stride = rope_stride;
  p.interleaved = interleaved;
  const IsaKernels& kernels = kernels_for(isa);
  mixattn::run_or_record("append_kv", [=, &kernels] { mixattn::cpu::append_kv(kernels, p, num_threads); });
}

void merge_states(const std::string& dtype, uintptr_t outs, uintptr_t lses, uintptr_t out, uintptr_t lse,
                  int64_t num_states, int64_t num_tokens, int64_t num_heads, int64_t head_dim, Strides3 outs_strides,
                  Strides2 lses_strides, int64_t num_threads, const std::optional<std::string>& isa) {
  mixattn::MergeStatesParams p;
  p.dtype = dtype_named(dtype);
  p.outs = at<const void>(outs);
  p.lses = at<const float>(lses);
  p.out = at<void>(out);
  p.lse = at<float>(lse);
  p.num_states = num_states;
  p.num_tokens = num_tokens;
  p.num_heads = num_heads;
  p.head_dim = head_dim;
  p.outs_state_stride = outs_strides[0];
  p.outs_token_stride = outs_strides[1];
  p.outs_head_stride = outs_strides[2];
  p.lses_state_stride = lses_strides[0];
  p.lses_token_stride = lses_strides[1];
  const IsaKernels& kernels = kernels_for(isa);
  mixattn::run_or_record("merge_states", [=, &kernels] { mixattn::cpu::merge_states(kernels, p, num_threads); });
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
  m.def("append_kv", &append_kv, py::kw_only(), arg("dtype"), arg("kv_dtype"), arg("k"), arg("v"), arg("k_cache"),
        arg("v_cache"), arg("k_scale"), arg("v_scale"), arg("slot_mapping"), arg("q"), arg("q_out"), arg("positions"),
        arg("rope_cos_sin"), arg("num_tokens"), arg("num_q_heads"), arg("num_kv_heads"), arg("head_dim"),
        arg("num_pages"), arg("page_size"), arg("max_positions"), arg("rotary_dim"), arg("k_strides"), arg("v_strides"),
        arg("q_strides"), arg("q_out_strides"), arg("k_cache_strides"), arg("v_cache_strides"), arg("k_scale_sizes"),
        arg("v_scale_sizes"), arg("rope_stride"), arg("interleaved"), arg("num_threads"), arg("isa") = py::none(),
        "Stores rows of K (rotated) and V in their slots, rotates q. ValueError before anything is written.");
  m.def("merge_states", &merge_states, py::kw_only(), arg("dtype"), arg("outs"), arg("lses"), arg("out"), arg("lse"),
        arg("num_states"), arg("num_tokens"), arg("num_heads"), arg("head_dim"), arg("outs_strides"),
        arg("lses_strides"), arg("num_threads"), arg("isa") = py::none(),
        "Attention over a union of disjoint key sets, from the result over each.");
  m.def("cpu_info", &cpu_info, "This CPU, the kernels that it runs, and the OpenMP runtime that they share.");
  m.def("measure_roofs", &measure_roofs, arg("num_threads"), arg("isa") = py::none(),
        "read_gb_s and fma_gflop_s of num_threads threads, measured here in about a second.");
}
