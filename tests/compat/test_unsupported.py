"""Every argument that a drop-in cannot honour is refused by name, and those that only steer speed are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mixattn.compat import flash_attn, flash_attn_interface, flashinfer, vllm

Q = torch.zeros(3, 4, 16)
KV = torch.zeros(7, 2, 16)
PAGES = torch.zeros(2, 8, 2, 16)
STARTS_Q = torch.tensor([0, 3], dtype=torch.int32)
STARTS_K = torch.tensor([0, 7], dtype=torch.int32)
LENS = torch.tensor([7], dtype=torch.int32)
TABLE = torch.tensor([[0, 1]], dtype=torch.int32)
SOME = torch.ones(1)
TWOS = torch.full((1, 2), 2.0)
WORKSPACE = torch.empty(16, dtype=torch.uint8)
CSR = (
    torch.tensor([0, 1], dtype=torch.int32),
    torch.tensor([1], dtype=torch.int32),
    torch.tensor([7], dtype=torch.int32),
)


def fa2_varlen(**options: Any) -> Any:
    return flash_attn.flash_attn_varlen_func(Q, KV, KV, STARTS_Q, STARTS_K, 3, 7, **options)


def fa3_varlen(**options: Any) -> Any:
    return flash_attn_interface.flash_attn_varlen_func(Q, KV, KV, STARTS_Q, STARTS_K, 3, 7, **options)


def fa2_kvcache(**options: Any) -> Any:
    return flash_attn.flash_attn_with_kvcache(Q.unsqueeze(0), PAGES, PAGES, **options)


def fa3_kvcache(**options: Any) -> Any:
    return flash_attn_interface.flash_attn_with_kvcache(Q.unsqueeze(0), PAGES, PAGES, **options)


def vllm_varlen(**options: Any) -> Any:
    return vllm.flash_attn_varlen_func(Q, KV, KV, 3, STARTS_Q, 7, **{"cu_seqlens_k": STARTS_K, **options})


def unified(**options: Any) -> Any:
    arguments = {
        "q": Q, "k": PAGES, "v": PAGES, "out": torch.empty_like(Q), "cu_seqlens_q": STARTS_Q, "max_seqlen_q": 3,
        "seqused_k": LENS, "max_seqlen_k": 7, "softmax_scale": 0.25, "causal": True, "window_size": (-1, -1),
        "block_table": TABLE, "softcap": 0.0, "q_descale": None, "k_descale": None, "v_descale": None,
    }  # fmt: skip
    return vllm.unified_attention(**{**arguments, **options})


def prefill_init(**options: Any) -> Any:
    return flashinfer.BatchPrefillWithPagedKVCacheWrapper(WORKSPACE, **options)


def decode_init(**options: Any) -> Any:
    return flashinfer.BatchDecodeWithPagedKVCacheWrapper(WORKSPACE, **options)


def prefill_plan(**options: Any) -> Any:
    wrapper = prefill_init()
    wrapper.plan(STARTS_Q, *CSR, 4, 2, 16, 8, **{"q_data_type": torch.float32, **options})
    return wrapper


def prefill_run(*args: Any, **options: Any) -> Any:
    return prefill_plan().run(Q, (PAGES, PAGES), *args, **options)


def decode_plan(**options: Any) -> Any:
    wrapper = decode_init()
    wrapper.plan(*CSR, 4, 2, 16, 8, **{"q_data_type": torch.float32, "q_len_per_req": 3, **options})
    return wrapper


def decode_run(**options: Any) -> Any:
    return decode_plan().run(Q, (PAGES, PAGES), **options)


def batch_plan(**options: Any) -> Any:
    wrapper = flashinfer.BatchAttention(device="cpu")
    arguments = {"head_dim_vo": 16, "q_data_type": torch.float32, "kv_data_type": torch.float32, **options}
    wrapper.plan(STARTS_Q, *CSR[:2], LENS, 4, 2, 16, page_size=8, **arguments)
    return wrapper


def batch_run(**options: Any) -> Any:
    return batch_plan().run(Q, (PAGES, PAGES), **options)


REFUSED: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (fa2_varlen, {"dropout_p": 0.1}),
    (fa2_varlen, {"window_size": (3, 2)}),
    (fa2_kvcache, {"cache_leftpad": LENS}),
    (fa2_kvcache, {"window_size": (-1, 1)}),
    (fa3_varlen, {"seqused_q": LENS}),
    (fa3_varlen, {"qv": Q}),
    (fa3_varlen, {"attention_chunk": 4}),
    (fa3_varlen, {"q_descale": TWOS}),
    (fa3_varlen, {"window_size": (3, 2)}),
    (fa3_kvcache, {"qv": Q}),
    (fa3_kvcache, {"cache_leftpad": LENS}),
    (fa3_kvcache, {"rotary_seqlens": LENS}),
    (fa3_kvcache, {"q_descale": TWOS}),
    (fa3_kvcache, {"attention_chunk": 4}),
    (vllm_varlen, {"q_v": Q}),
    (vllm_varlen, {"dropout_p": 0.1}),
    (vllm_varlen, {"window_size": [3, 2]}),
    (vllm_varlen, {"return_attn_probs": True}),
    (vllm_varlen, {"q_descale": TWOS}),
    (vllm_varlen, {"output_scale": SOME}),
    (vllm_varlen, {"cp_world_size": 2}),
    (vllm_varlen, {"cp_rank": 1}),
    (vllm_varlen, {"cp_tot_seqused_k": LENS}),
    (vllm_varlen, {"mask_mod": print}),
    (vllm_varlen, {"block_sparse_tensors": SOME}),
    (vllm_varlen, {"aux_tensors": [SOME]}),
    (vllm_varlen, {"aux_tensor_leading_dims": [1]}),
    (vllm_varlen, {"dynamic_causal": LENS}),
    (unified, {"causal": torch.ones(1, dtype=torch.int32)}),
    (unified, {"window_size": (3, 2), "causal": False}),
    (unified, {"q_descale": TWOS}),
    (unified, {"alibi_slopes": torch.ones(4), "causal": False}),
    (unified, {"output_scale": SOME}),
    (unified, {"qq_bias": torch.zeros(3, 3)}),
    (unified, {"mm_prefix_range": torch.zeros(1, 1, 2)}),
    (unified, {"rswa_prefix_lens": LENS}),
    (unified, {"rswa_window": 4}),
    (unified, {"use_alibi_sqrt": True}),
    (unified, {"kv_quant_mode": 4, "k": torch.zeros(2, 8, 2, 8, dtype=torch.uint8)}),
    (unified, {"chunk_lookback": 1}),
    (unified, {"mm_prefix_clamp_sliding_window": True}),
    (prefill_init, {"use_cuda_graph": True}),
    (prefill_init, {"jit_args": ["name"]}),
    (prefill_init, {"jit_kwargs": {"name": 1}}),
    (prefill_init, {"variant_owns_mask": True}),
    (prefill_init, {"max_total_num_rows": 8}),
    (decode_init, {"use_cuda_graph": True}),
    (decode_init, {"jit_args": ["name"]}),
    (decode_init, {"jit_kwargs": {"name": 1}}),
    (prefill_plan, {"custom_mask": torch.zeros(21, dtype=torch.bool)}),
    (prefill_plan, {"pos_encoding_mode": "ROPE_LLAMA"}),
    (prefill_plan, {"kv_data_type": torch.bfloat16}),
    (prefill_plan, {"o_data_type": "bfloat16"}),
    (prefill_plan, {"prefix_len_ptr": LENS}),
    (prefill_plan, {"token_pos_in_items_ptr": LENS}),
    (prefill_plan, {"token_pos_in_items_len": 3}),
    (prefill_plan, {"max_item_len_ptr": LENS}),
    (prefill_run, {"k_scale": torch.ones(2)}),
    (prefill_run, {"v_scale": torch.ones(2)}),
    (prefill_run, {"q_scale": torch.ones(2)}),
    (decode_plan, {"pos_encoding_mode": "ALIBI"}),
    (decode_plan, {"window_right": 2}),
    (decode_plan, {"kv_data_type": torch.bfloat16}),
    (decode_plan, {"o_data_type": torch.bfloat16}),
    (decode_run, {"kv_cache_sf": SOME}),
    (batch_plan, {"kv_data_type": torch.bfloat16}),
    (batch_plan, {"use_profiler": True}),
    (batch_run, {"profiler_buffer": SOME}),
    (batch_run, {"kv_cache_sf": SOME}),
]


@pytest.mark.parametrize(("call", "options"), REFUSED, ids=lambda v: v.__name__ if callable(v) else next(iter(v)))
def test_unsupported_argument_is_refused_by_name(call: Callable[..., Any], options: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedError, match=rf"\b{next(iter(options))}\b"):
        call(**options)


def test_extra_arguments_of_run_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="args"):
        prefill_run(SOME)


INERT: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (fa2_varlen, {"deterministic": True}),
    (fa2_kvcache, {"num_splits": 7}),
    (fa3_varlen, {"num_splits": 7, "pack_gqa": True, "deterministic": True, "sm_margin": 4}),
    (fa3_varlen, {"q_descale": torch.ones(1, 2), "k_descale": torch.ones(1, 2), "v_descale": torch.ones(1, 2)}),
    (fa3_kvcache, {"scheduler_metadata": LENS, "num_splits": 7, "pack_gqa": True, "sm_margin": 4, "max_seqlen_q": 3}),
    (vllm_varlen, {"deterministic": True, "scheduler_metadata": LENS, "num_splits": 7, "fa_version": 3}),
    (unified, {"softmax_segm_output": SOME, "softmax_segm_max": SOME, "softmax_segm_expsum": SOME, "use_td": True}),
    (prefill_init, {"qo_indptr_buf": SOME, "paged_kv_indptr_buf": SOME, "custom_mask_buf": SOME, "backend": "fa2"}),
    (prefill_plan, {"use_fp16_qk_reduction": True, "non_blocking": False, "block_tables": TABLE, "seq_lens_q": LENS}),
    (prefill_plan, {"max_token_per_sequence": 3, "max_sequence_kv": 7, "fixed_split_size": 1, "rope_theta": 1e4}),
    (prefill_run, {"enable_pdl": True, "skip_softmax_threshold_scale_factor": 1.0}),
    (decode_init, {"use_tensor_cores": True, "paged_kv_indptr_buffer": SOME, "backend": "trtllm-gen"}),
    (decode_plan, {"rope_scale": 1.0, "fixed_split_size": 1, "disable_split_kv": True, "block_tables": TABLE}),
    (decode_run, {"enable_pdl": False, "skip_softmax_threshold_scale_factor": 1.0}),
]  # fmt: skip


@pytest.mark.parametrize(("call", "options"), INERT, ids=lambda v: v.__name__ if callable(v) else "-".join(v))
def test_argument_that_steers_speed_alone_is_accepted(call: Callable[..., Any], options: dict[str, Any]) -> None:
    plain, result = call(), call(**options)
    if isinstance(plain, torch.Tensor):
        assert torch.equal(plain, result)


@pytest.mark.parametrize(
    ("call", "options", "message"),
    [
        (fa3_varlen, {"k_descale": TWOS}, "k_descale must be 1"),
        (vllm_varlen, {"v_descale": TWOS}, "v_descale must be 1"),
        (unified, {"k_descale": torch.tensor(2.0)}, "k_descale must be 1"),
        (vllm_varlen, {"fa_version": 5}, "fa_version must be 2, 3 or 4"),
        (vllm_varlen, {"seqused_k": LENS}, "one of cu_seqlens_k and seqused_k"),
        (vllm_varlen, {"cu_seqlens_k": None}, "one of cu_seqlens_k and seqused_k"),
        (vllm_varlen, {"cu_seqlens_k": None, "seqused_k": LENS}, "cu_seqlens_k must be given for keys without"),
        (vllm_varlen, {"block_table": TABLE}, "seqused_k must be given with block_table"),
        (fa2_kvcache, {"k": torch.zeros(1, 1, 2, 16)}, "cache_seqlens must be given with k"),
        (fa2_kvcache, {"k": torch.zeros(1, 1, 2, 16), "cache_seqlens": 3}, "k and v must be given together"),
        (fa2_kvcache, {"rotary_cos": SOME, "cache_seqlens": 3}, "rotary_cos must not be given without k"),
        (fa2_kvcache, {"cache_batch_idx": LENS, "block_table": TABLE}, "cache_batch_idx must not be given with"),
        (fa3_kvcache, {"cu_seqlens_q": STARTS_Q}, r"q must be \[total, num_heads, head_dim\]"),
        (prefill_plan, {"logits_soft_cap": -1.0}, "soft_cap must be finite and > 0"),
    ],
    ids=lambda v: v.__name__ if callable(v) else None,
)
def test_bad_argument_is_an_error_that_names_it(
    call: Callable[..., Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        result = call(**options)
        if call is prefill_plan:
            result.run(Q, (PAGES, PAGES))


def test_scales_per_sequence_are_refused() -> None:
    fp8 = KV.to(torch.float8_e4m3fn)
    starts = torch.tensor([0, 3, 7], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="k_descale per sequence"):
        flash_attn_interface.flash_attn_varlen_func(
            torch.zeros(7, 4, 16), fp8, fp8, starts, starts, 4, 4, k_descale=torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        )
