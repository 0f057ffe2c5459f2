// emulated.cpp: the CUDA attention kernels for Python, run by the emulation.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <string>
#include <vector>

#include "cuda/sm80/mixed_attention.cuh"
#include "emu/emu.h"

namespace py = pybind11;

namespace {

using mixattn::AttentionParams;
using mixattn::DType;
using mixattn::cuda::LaunchParams;
using Kernel = void (*)(const LaunchParams);

// Sizes as mixattn.ops.attention_call.native_sizes gives them for the CPU kernel, addresses by name.
AttentionParams attention_params(const py::dict& addresses, const py::dict& sizes) {
  const auto at = [&](const char* name) { return addresses[name].cast<uintptr_t>(); };
  const auto size = [&](const char* name) { return sizes[name].cast<int64_t>(); };
  AttentionParams p = {};
  const std::string dtype = sizes["dtype"].cast<std::string>();
  p.dtype = dtype == "bfloat16" ? DType::kBFloat16 : dtype == "float16" ? DType::kFloat16 : DType::kFloat32;
  p.q = reinterpret_cast<const void*>(at("q"));
  p.k_cache = reinterpret_cast<const void*>(at("k_cache"));
  p.v_cache = reinterpret_cast<const void*>(at("v_cache"));
  p.out = reinterpret_cast<void*>(at("out"));
  p.lse = reinterpret_cast<float*>(at("lse"));
  p.cu_seqlens_q = reinterpret_cast<const int32_t*>(at("cu_seqlens_q"));
  p.seq_lens = reinterpret_cast<const int32_t*>(at("seq_lens"));
  p.block_table = reinterpret_cast<const int32_t*>(at("block_table"));
  p.alibi_slopes = reinterpret_cast<const float*>(at("alibi_slopes"));
  p.sinks = reinterpret_cast<const float*>(at("sinks"));
  p.tree_mask = reinterpret_cast<const int64_t*>(at("tree_mask"));
  p.plan = reinterpret_cast<const int32_t*>(at("plan"));
  p.partial_out = reinterpret_cast<float*>(at("partial_out"));
  p.partial_lse = reinterpret_cast<float*>(at("partial_lse"));
  p.tickets = reinterpret_cast<int32_t*>(at("tickets"));
  p.total_q = size("total_q");
  p.num_seqs = size("num_seqs");
  p.num_q_heads = size("num_q_heads");
  p.num_kv_heads = size("num_kv_heads");
  p.head_dim = size("head_dim");
  p.num_pages = size("num_pages");
  p.page_size = size("page_size");
  p.max_pages = size("max_pages");
  p.plan_words = size("plan_words");
  p.num_partial_rows = size("num_partial_rows");
  p.num_tickets = size("num_tickets");
  const auto q_strides = sizes["q_strides"].cast<std::array<int64_t, 2>>();
  const auto out_strides = sizes["out_strides"].cast<std::array<int64_t, 2>>();
  const auto k_strides = sizes["k_strides"].cast<std::array<int64_t, 3>>();
  const auto v_strides = sizes["v_strides"].cast<std::array<int64_t, 3>>();
  p.q_token_stride = q_strides[0];
  p.q_head_stride = q_strides[1];
  p.out_token_stride = out_strides[0];
  p.out_head_stride = out_strides[1];
  p.k_page_stride = k_strides[0];
  p.k_token_stride = k_strides[1];
  p.k_head_stride = k_strides[2];
  p.v_page_stride = v_strides[0];
  p.v_token_stride = v_strides[1];
  p.v_head_stride = v_strides[2];
  p.lse_token_stride = size("lse_stride");
  p.block_table_stride = size("block_table_stride");
  p.softmax_scale = sizes["softmax_scale"].cast<float>();
  p.soft_cap = sizes["soft_cap"].cast<float>();
  p.window_left = size("window_left");
  p.causal = sizes["causal"].cast<bool>();
  p.invariant = sizes["invariant"].cast<bool>();
  return p;
}

template <class T, int kHeadDim>
Kernel kernel_of(bool has_soft_cap) {
  using namespace mixattn::cuda::sm80;
  return has_soft_cap ? Kernel(mixed_attention_kernel<T, kHeadDim, true>)
                      : Kernel(mixed_attention_kernel<T, kHeadDim, false>);
}

// regions: name -> (address, bytes) of the tensors that the kernel may touch. Returns what emu::Stats counts.
py::dict attention(const py::dict& addresses, const py::dict& sizes,
                   const std::map<std::string, std::pair<uintptr_t, size_t>>& regions, int num_blocks, uint64_t seed,
                   int fault) {
  const AttentionParams p = attention_params(addresses, sizes);
  mixattn::cuda::check_call(p);
  const LaunchParams launch = mixattn::cuda::make_launch_params(p);
  const bool has_soft_cap = p.soft_cap > 0;
  Kernel kernel;
  uint32_t shared_bytes;
  if (p.head_dim == 64) {
    kernel = p.dtype == DType::kBFloat16 ? kernel_of<mx::bf16, 64>(has_soft_cap) : kernel_of<mx::f16, 64>(has_soft_cap);
    shared_bytes = mixattn::cuda::sm80::shared_bytes<64>();
  } else {
    kernel =
        p.dtype == DType::kBFloat16 ? kernel_of<mx::bf16, 128>(has_soft_cap) : kernel_of<mx::f16, 128>(has_soft_cap);
    shared_bytes = mixattn::cuda::sm80::shared_bytes<128>();
  }
  std::vector<emu::Region> allowed;
  for (const auto& [name, place] : regions) {
    allowed.push_back({name.c_str(), reinterpret_cast<const void*>(place.first), place.second});
  }
  emu::active_fault = fault;
  const emu::Stats stats = emu::launch(emu::config_of_seed(seed), num_blocks, mixattn::cuda::kNumThreads, shared_bytes,
                                       allowed, [&] { kernel(launch); });
  py::dict result;
  result["num_switches"] = stats.num_switches;
  result["num_mmas"] = stats.num_mmas;
  result["num_copies"] = stats.num_copies;
  result["num_wavefronts"] = stats.num_wavefronts;
  result["conflicts"] = stats.conflicts;
  return result;
}

}  // namespace

PYBIND11_MODULE(MODULE_NAME, m) {
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const std::domain_error& error) {
      PyErr_SetString(PyExc_NotImplementedError, error.what());
    }
  });
  m.def("attention", &attention);
  m.attr("SHARED_BYTES") = py::dict();
  m.attr("SHARED_BYTES")[py::int_(64)] = mixattn::cuda::sm80::shared_bytes<64>();
  m.attr("SHARED_BYTES")[py::int_(128)] = mixattn::cuda::sm80::shared_bytes<128>();
}
