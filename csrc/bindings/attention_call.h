// attention_call.h: the arguments of an attention kernel as Python gives them, turned into AttentionParams; once for
// all backends. Addresses are integers.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>
#include <tuple>
#include <utility>

#include "common/params.h"

namespace mixattn {

using Strides2 = std::array<int64_t, 2>;
using Strides3 = std::array<int64_t, 3>;
using ScaleSizes = std::tuple<double, bool, Strides3>;  // value, is_per_token, strides

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline DType dtype_named(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float16") return DType::kFloat16;
  throw pybind11::value_error("dtype must be float32, bfloat16 or float16, got '" + name + "'");
}

inline KvDType kv_dtype_named(const std::string& name) {
  if (name == "float32") return KvDType::kFloat32;
  if (name == "bfloat16") return KvDType::kBFloat16;
  if (name == "float16") return KvDType::kFloat16;
  if (name == "int8") return KvDType::kInt8;
  if (name == "float8_e4m3fn") return KvDType::kFloat8E4M3;
  if (name == "float8_e5m2") return KvDType::kFloat8E5M2;
  if (name == "int4") return KvDType::kInt4;
  throw pybind11::value_error(
      "kv_dtype must be float32, bfloat16, float16, int8, float8_e4m3fn, float8_e5m2 or int4, got '" + name + "'");
}

inline KvScale kv_scale(uintptr_t data, const ScaleSizes& sizes) {
  const auto& [value, is_per_token, strides] = sizes;
  return {at<float>(data), static_cast<float>(value), is_per_token, strides[0], strides[1], strides[2]};
}

// Defines a function of m with the keyword arguments of an attention call and `Others` behind them, described by
// `options`; it calls run(AttentionParams, others...).
template <class... Others, class Run, class... Options>
void def_attention(pybind11::module_& m, const char* name, Run run, const Options&... options) {
  using pybind11::arg;
  const auto call =
      [run](const std::string& dtype, const std::string& kv_dtype, uintptr_t q, uintptr_t k_cache, uintptr_t v_cache,
            uintptr_t k_scale, uintptr_t v_scale, uintptr_t out, uintptr_t lse, uintptr_t cu_seqlens_q,
            uintptr_t seq_lens, uintptr_t block_table, uintptr_t plan, uintptr_t alibi_slopes, uintptr_t sinks,
            uintptr_t tree_mask, uintptr_t partial_out, uintptr_t partial_lse, uintptr_t tickets, int64_t total_q,
            int64_t num_seqs, int64_t num_q_heads, int64_t num_kv_heads, int64_t head_dim, int64_t v_head_dim,
            int64_t num_pages, int64_t page_size, int64_t max_pages, int64_t plan_words, int64_t num_partial_rows,
            int64_t num_tickets, Strides2 q_strides, Strides2 out_strides, Strides3 k_strides, Strides3 v_strides,
            const ScaleSizes& k_scale_sizes, const ScaleSizes& v_scale_sizes, int64_t lse_stride,
            int64_t block_table_stride, int64_t alibi_seq_stride, double softmax_scale, bool causal,
            int64_t window_left, double soft_cap, bool invariant, bool rounds_q, Others... others) {
        AttentionParams p;
        p.dtype = dtype_named(dtype);
        p.kv_dtype = kv_dtype_named(kv_dtype);
        p.q = at<const void>(q);
        p.k_cache = at<const void>(k_cache);
        p.v_cache = at<const void>(v_cache);
        p.k_scale = kv_scale(k_scale, k_scale_sizes);
        p.v_scale = kv_scale(v_scale, v_scale_sizes);
        p.out = at<void>(out);
        p.lse = at<float>(lse);
        p.cu_seqlens_q = at<const int32_t>(cu_seqlens_q);
        p.seq_lens = at<const int32_t>(seq_lens);
        p.block_table = at<const int32_t>(block_table);
        p.plan = at<const int32_t>(plan);
        p.alibi_slopes = at<const float>(alibi_slopes);
        p.sinks = at<const float>(sinks);
        p.tree_mask = at<const int64_t>(tree_mask);
        p.partial_out = at<float>(partial_out);
        p.partial_lse = at<float>(partial_lse);
        p.tickets = at<int32_t>(tickets);
        p.total_q = total_q;
        p.num_seqs = num_seqs;
        p.num_q_heads = num_q_heads;
        p.num_kv_heads = num_kv_heads;
        p.head_dim = head_dim;
        p.v_head_dim = v_head_dim;
        p.num_pages = num_pages;
        p.page_size = page_size;
        p.max_pages = max_pages;
        p.plan_words = plan_words;
        p.num_partial_rows = num_partial_rows;
        p.num_tickets = num_tickets;
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
        p.lse_token_stride = lse_stride;
        p.block_table_stride = block_table_stride;
        p.alibi_seq_stride = alibi_seq_stride;
        p.softmax_scale = static_cast<float>(softmax_scale);
        p.soft_cap = static_cast<float>(soft_cap);
        p.window_left = window_left;
        p.causal = causal;
        p.invariant = invariant;
        p.rounds_q = rounds_q;
        return run(p, others...);
      };
  m.def(name, call, pybind11::kw_only(), arg("dtype"), arg("kv_dtype"), arg("q"), arg("k_cache"), arg("v_cache"),
        arg("k_scale"), arg("v_scale"), arg("out"), arg("lse"), arg("cu_seqlens_q"), arg("seq_lens"),
        arg("block_table"), arg("plan"), arg("alibi_slopes"), arg("sinks"), arg("tree_mask"), arg("partial_out"),
        arg("partial_lse"), arg("tickets"), arg("total_q"), arg("num_seqs"), arg("num_q_heads"), arg("num_kv_heads"),
        arg("head_dim"), arg("v_head_dim"), arg("num_pages"), arg("page_size"), arg("max_pages"), arg("plan_words"),
        arg("num_partial_rows"), arg("num_tickets"), arg("q_strides"), arg("out_strides"), arg("k_strides"),
        arg("v_strides"), arg("k_scale_sizes"), arg("v_scale_sizes"), arg("lse_stride"), arg("block_table_stride"),
        arg("alibi_seq_stride"), arg("softmax_scale"), arg("causal"), arg("window_left"), arg("soft_cap"),
        arg("invariant"), arg("rounds_q"), options...);
}

}  // namespace mixattn
