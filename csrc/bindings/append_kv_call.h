// append_kv_call.h: the arguments of append_kv as Python gives them, turned into AppendKvParams; once for all backends.
// Addresses are integers.
#pragma once

#include "bindings/attention_call.h"

namespace mixattn {

// Defines a function of m with the keyword arguments of append_kv and `Others` behind them, described by `options`; it
// calls run(AppendKvParams, others...).
template <class... Others, class Run, class... Options>
void def_append_kv(pybind11::module_& m, const char* name, Run run, const Options&... options) {
  using pybind11::arg;
  const auto call =
      [run](const std::string& dtype, const std::string& kv_dtype, uintptr_t k, uintptr_t v, uintptr_t k_cache,
            uintptr_t v_cache, uintptr_t k_scale, uintptr_t v_scale, uintptr_t slot_mapping, uintptr_t q,
            uintptr_t q_out, uintptr_t positions, uintptr_t rope_cos_sin, int64_t num_tokens, int64_t num_q_heads,
            int64_t num_kv_heads, int64_t head_dim, int64_t v_head_dim, int64_t num_pages, int64_t page_size,
            int64_t max_positions, int64_t rotary_dim, Strides2 k_strides, Strides2 v_strides, Strides2 q_strides,
            Strides2 q_out_strides, Strides3 k_cache_strides, Strides3 v_cache_strides, const ScaleSizes& k_scale_sizes,
            const ScaleSizes& v_scale_sizes, int64_t rope_stride, bool interleaved, Others... others) {
        AppendKvParams p;
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
        p.v_head_dim = v_head_dim;
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
        return run(p, others...);
      };
  m.def(name, call, pybind11::kw_only(), arg("dtype"), arg("kv_dtype"), arg("k"), arg("v"), arg("k_cache"),
        arg("v_cache"), arg("k_scale"), arg("v_scale"), arg("slot_mapping"), arg("q"), arg("q_out"), arg("positions"),
        arg("rope_cos_sin"), arg("num_tokens"), arg("num_q_heads"), arg("num_kv_heads"), arg("head_dim"),
        arg("v_head_dim"), arg("num_pages"), arg("page_size"), arg("max_positions"), arg("rotary_dim"),
        arg("k_strides"), arg("v_strides"), arg("q_strides"), arg("q_out_strides"), arg("k_cache_strides"),
        arg("v_cache_strides"), arg("k_scale_sizes"), arg("v_scale_sizes"), arg("rope_stride"), arg("interleaved"),
        options...);
}

}  // namespace mixattn
