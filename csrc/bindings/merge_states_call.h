// merge_states_call.h: the arguments of merge_states as Python gives them, turned into MergeStatesParams; once for all
// backends. Addresses are integers.
#pragma once

#include "bindings/attention_call.h"

namespace mixattn {

// Defines a function of m with the keyword arguments of merge_states and `Others` behind them, described by `options`;
// it calls run(MergeStatesParams, others...).
template <class... Others, class Run, class... Options>
void def_merge_states(pybind11::module_& m, const char* name, Run run, const Options&... options) {
  using pybind11::arg;
  const auto call = [run](const std::string& dtype, uintptr_t outs, uintptr_t lses, uintptr_t out, uintptr_t lse,
                          int64_t num_states, int64_t num_tokens, int64_t num_heads, int64_t head_dim,
                          Strides3 outs_strides, Strides2 lses_strides, Others... others) {
    MergeStatesParams p;
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

    return run(p, others...);
  };
  m.def(name, call, pybind11::kw_only(), arg("dtype"), arg("outs"), arg("lses"), arg("out"), arg("lse"),
        arg("num_states"), arg("num_tokens"), arg("num_heads"), arg("head_dim"), arg("outs_strides"),
        arg("lses_strides"), options...);
}

}  // namespace mixattn
