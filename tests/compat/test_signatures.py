"""Names, order and defaults of every parameter are those of the originals."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mixattn.compat import flash_attn, flash_attn_interface, flashinfer, vllm

FA2 = "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
VARLEN_WINDOW = (-1, -1)

# Ours, where the original is, the commit that was read, required parameters, optional ones with defaults. A star before
# a name tells that it is keyword-only.
ORIGINALS: dict[str, tuple[Callable[..., Any], str, str, str, dict[str, Any]]] = {
    "fa2-varlen": (
        flash_attn.flash_attn_varlen_func,
        "flash_attn.flash_attn_varlen_func",
        "Dao-AILab/flash-attention 0053002",
        FA2,
        {
            "dropout_p": 0.0, "softmax_scale": None, "causal": False, "window_size": VARLEN_WINDOW, "softcap": 0.0,
            "alibi_slopes": None, "deterministic": False, "return_attn_probs": False, "block_table": None,
        },
    ),
    "fa2-kvcache": (
        flash_attn.flash_attn_with_kvcache,
        "flash_attn.flash_attn_with_kvcache",
        "Dao-AILab/flash-attention 0053002",
        "q k_cache v_cache",
        {
            "k": None, "v": None, "rotary_cos": None, "rotary_sin": None, "cache_seqlens": None,
            "cache_batch_idx": None, "cache_leftpad": None, "block_table": None, "softmax_scale": None,
            "causal": False, "window_size": VARLEN_WINDOW, "softcap": 0.0, "rotary_interleaved": True,
            "alibi_slopes": None, "num_splits": 0, "return_softmax_lse": False,
        },
    ),
    "fa3-varlen": (
        flash_attn_interface.flash_attn_varlen_func,
        "flash_attn_interface.flash_attn_varlen_func",
        "Dao-AILab/flash-attention 01afd16",
        FA2,
        {
            "seqused_q": None, "seqused_k": None, "softmax_scale": None, "causal": False, "qv": None,
            "q_descale": None, "k_descale": None, "v_descale": None, "window_size": VARLEN_WINDOW,
            "attention_chunk": 0, "softcap": 0.0, "num_splits": 1, "pack_gqa": None, "deterministic": False,
            "sm_margin": 0, "return_attn_probs": False,
        },
    ),
    "fa3-kvcache": (
        flash_attn_interface.flash_attn_with_kvcache,
        "flash_attn_interface.flash_attn_with_kvcache",
        "Dao-AILab/flash-attention 01afd16",
        "q k_cache v_cache",
        {
            "k": None, "v": None, "qv": None, "rotary_cos": None, "rotary_sin": None, "cache_seqlens": None,
            "cache_batch_idx": None, "cache_leftpad": None, "page_table": None, "cu_seqlens_q": None,
            "cu_seqlens_k_new": None, "max_seqlen_q": None, "rotary_seqlens": None, "q_descale": None,
            "k_descale": None, "v_descale": None, "softmax_scale": None, "causal": False,
            "window_size": VARLEN_WINDOW, "attention_chunk": 0, "softcap": 0.0, "rotary_interleaved": True,
            "scheduler_metadata": None, "num_splits": 0, "pack_gqa": None, "sm_margin": 0,
            "return_softmax_lse": False,
        },
    ),
    "vllm-varlen": (
        vllm.flash_attn_varlen_func,
        "vllm.vllm_flash_attn.flash_attn_varlen_func",
        "vllm-project/vllm, as of ced6857",
        "q k v max_seqlen_q cu_seqlens_q max_seqlen_k",
        {
            "cu_seqlens_k": None, "seqused_k": None, "q_v": None, "dropout_p": 0.0, "softmax_scale": None,
            "causal": False, "window_size": None, "softcap": 0.0, "alibi_slopes": None, "deterministic": False,
            "return_attn_probs": False, "block_table": None, "return_softmax_lse": False, "out": None,
            "scheduler_metadata": None, "q_descale": None, "k_descale": None, "v_descale": None, "num_splits": 0,
            "output_scale": None, "fa_version": 2, "s_aux": None, "cp_world_size": 1, "cp_rank": 0,
            "cp_tot_seqused_k": None, "mask_mod": None, "block_sparse_tensors": None, "aux_tensors": None,
            "aux_tensor_leading_dims": None, "dynamic_causal": None,
        },
    ),
    "vllm-unified": (
        vllm.unified_attention,
        "vllm.v1.attention.ops.triton_unified_attention.unified_attention",
        "vllm-project/vllm ced6857",
        "q k v out cu_seqlens_q max_seqlen_q seqused_k max_seqlen_k softmax_scale causal window_size block_table "
        "softcap q_descale k_descale v_descale",
        {
            "seq_threshold_3D": None, "num_par_softmax_segments": None, "softmax_segm_output": None,
            "softmax_segm_max": None, "softmax_segm_expsum": None, "alibi_slopes": None, "output_scale": None,
            "qq_bias": None, "sinks": None, "mm_prefix_range": None, "rswa_prefix_lens": None, "rswa_window": None,
            "use_alibi_sqrt": False, "kv_quant_mode": 0, "k_scale_cache": None, "v_scale_cache": None,
            "chunk_lookback": -1, "use_td": False, "mm_prefix_clamp_sliding_window": False,
        },
    ),
    "flashinfer-prefill-init": (
        flashinfer.BatchPrefillWithPagedKVCacheWrapper.__init__,
        "flashinfer.BatchPrefillWithPagedKVCacheWrapper.__init__",
        "flashinfer-python 0.7.4",
        "self float_workspace_buffer",
        {
            "kv_layout": "NHD", "use_cuda_graph": False, "qo_indptr_buf": None, "paged_kv_indptr_buf": None,
            "paged_kv_indices_buf": None, "paged_kv_last_page_len_buf": None, "custom_mask_buf": None,
            "mask_indptr_buf": None, "backend": "auto", "jit_args": None, "jit_kwargs": None,
            "variant_owns_mask": False, "max_total_num_rows": None,
        },
    ),
    "flashinfer-prefill-plan": (
        flashinfer.BatchPrefillWithPagedKVCacheWrapper.plan,
        "flashinfer.BatchPrefillWithPagedKVCacheWrapper.plan",
        "flashinfer-python 0.7.4",
        "self qo_indptr paged_kv_indptr paged_kv_indices paged_kv_last_page_len num_qo_heads num_kv_heads head_dim_qk "
        "page_size",
        {
            "head_dim_vo": None, "custom_mask": None, "packed_custom_mask": None, "causal": False,
            "pos_encoding_mode": "NONE", "use_fp16_qk_reduction": False, "sm_scale": None, "window_left": -1,
            "logits_soft_cap": None, "rope_scale": None, "rope_theta": None, "q_data_type": "float16",
            "kv_data_type": None, "o_data_type": None, "non_blocking": True, "prefix_len_ptr": None,
            "token_pos_in_items_ptr": None, "token_pos_in_items_len": 0, "max_item_len_ptr": None,
            "seq_lens": None, "seq_lens_q": None, "block_tables": None, "max_token_per_sequence": None,
            "max_sequence_kv": None, "fixed_split_size": None, "disable_split_kv": False, "uniform_q_len": None,
            "use_token_head_sf": False,
        },
    ),
    "flashinfer-prefill-run": (
        flashinfer.BatchPrefillWithPagedKVCacheWrapper.run,
        "flashinfer.BatchPrefillWithPagedKVCacheWrapper.run",
        "flashinfer-python 0.7.4",
        "self q paged_kv_cache *args",
        {
            "*q_scale": None, "*k_scale": None, "*v_scale": None, "*out": None, "*lse": None, "*return_lse": False,
            "*lse_base": "log2", "*lse_layout": "NH", "*enable_pdl": None, "*window_left": None, "*sinks": None,
            "*kv_cache_sf": None, "*skip_softmax_threshold_scale_factor": None, "*use_fp16_softmax": None,
            "*uses_spcompress": None,
        },
    ),
    "flashinfer-prefill-forward": (
        flashinfer.BatchPrefillWithPagedKVCacheWrapper.forward,
        "flashinfer.BatchPrefillWithPagedKVCacheWrapper.forward",
        "flashinfer-python 0.7.4",
        "self q paged_kv_cache",
        {
            "causal": False, "pos_encoding_mode": "NONE", "use_fp16_qk_reduction": False, "k_scale": None,
            "v_scale": None, "window_left": -1, "logits_soft_cap": None, "sm_scale": None, "rope_scale": None,
            "rope_theta": None,
        },
    ),
    "flashinfer-decode-init": (
        flashinfer.BatchDecodeWithPagedKVCacheWrapper.__init__,
        "flashinfer.BatchDecodeWithPagedKVCacheWrapper.__init__",
        "flashinfer-python 0.7.4",
        "self float_workspace_buffer",
        {
            "kv_layout": "NHD", "use_cuda_graph": False, "use_tensor_cores": False, "paged_kv_indptr_buffer": None,
            "paged_kv_indices_buffer": None, "paged_kv_last_page_len_buffer": None, "backend": "auto",
            "jit_args": None, "jit_kwargs": None,
        },
    ),
    # The original takes those after page_size as *args and **kwargs, in this order.
    "flashinfer-decode-plan": (
        flashinfer.BatchDecodeWithPagedKVCacheWrapper.plan,
        "",
        "flashinfer-python 0.7.4, _plan_impl and _BATCH_DECODE_PLAN_LEGACY_POS_ARGS",
        "self indptr indices last_page_len num_qo_heads num_kv_heads head_dim page_size",
        {
            "pos_encoding_mode": "NONE", "window_left": -1, "logits_soft_cap": None, "q_data_type": "float16",
            "kv_data_type": None, "o_data_type": None, "data_type": None, "sm_scale": None, "rope_scale": None,
            "rope_theta": None, "non_blocking": True, "block_tables": None, "seq_lens": None,
            "fixed_split_size": None, "disable_split_kv": False, "q_len_per_req": 1, "*window_right": 0,
        },
    ),
    "flashinfer-decode-run": (
        flashinfer.BatchDecodeWithPagedKVCacheWrapper.run,
        "flashinfer.BatchDecodeWithPagedKVCacheWrapper.run",
        "flashinfer-python 0.7.4",
        "self q paged_kv_cache *args",
        {
            "*q_scale": None, "*k_scale": None, "*v_scale": None, "*out": None, "*lse": None, "*return_lse": False,
            "*enable_pdl": None, "*window_left": None, "*sinks": None, "*q_len_per_req": None,
            "*skip_softmax_threshold_scale_factor": None, "*kv_cache_sf": None,
        },
    ),
    "flashinfer-decode-forward": (
        flashinfer.BatchDecodeWithPagedKVCacheWrapper.forward,
        "flashinfer.BatchDecodeWithPagedKVCacheWrapper.forward",
        "flashinfer-python 0.7.4",
        "self q paged_kv_cache",
        {
            "pos_encoding_mode": "NONE", "q_scale": None, "k_scale": None, "v_scale": None, "window_left": -1,
            "logits_soft_cap": None, "sm_scale": None, "rope_scale": None, "rope_theta": None,
        },
    ),
    "flashinfer-batch-init": (
        flashinfer.BatchAttention.__init__,
        "flashinfer.BatchAttention.__init__",
        "flashinfer-python 0.7.4",
        "self",
        {"kv_layout": "NHD", "device": "cuda"},
    ),
    "flashinfer-batch-plan": (
        flashinfer.BatchAttention.plan,
        "flashinfer.BatchAttention.plan",
        "flashinfer-python 0.7.4",
        "self qo_indptr kv_indptr kv_indices kv_len_arr num_qo_heads num_kv_heads head_dim_qk head_dim_vo page_size",
        {
            "causal": False, "sm_scale": None, "logits_soft_cap": None, "q_data_type": torch.bfloat16,
            "kv_data_type": torch.bfloat16, "use_profiler": False,
        },
    ),
    "flashinfer-batch-run": (
        flashinfer.BatchAttention.run,
        "flashinfer.BatchAttention.run",
        "flashinfer-python 0.7.4",
        "self q kv_cache",
        {
            "out": None, "lse": None, "k_scale": None, "v_scale": None, "logits_soft_cap": 0.0,
            "profiler_buffer": None, "kv_cache_sf": None,
        },
    ),
    "flashinfer-merge-state": (
        flashinfer.merge_state, "flashinfer.merge_state", "flashinfer-python 0.7.4", "v_a s_a v_b s_b", {},
    ),
    "flashinfer-merge-states": (
        flashinfer.merge_states, "flashinfer.merge_states", "flashinfer-python 0.7.4", "v s", {},
    ),
    "flashinfer-merge-in-place": (
        flashinfer.merge_state_in_place,
        "flashinfer.merge_state_in_place",
        "flashinfer-python 0.7.4",
        "v s v_other s_other",
        {"mask": None},
    ),
    "flashinfer-append": (
        flashinfer.append_paged_kv_cache,
        "flashinfer.append_paged_kv_cache",
        "flashinfer-python 0.7.4",
        "append_key append_value batch_indices positions paged_kv_cache kv_indices kv_indptr kv_last_page_len",
        {"kv_layout": "NHD"},
    ),
    "flashinfer-batch-indices": (
        flashinfer.get_batch_indices_positions,
        "flashinfer.get_batch_indices_positions",
        "flashinfer-python 0.7.4",
        "append_indptr seq_lens nnz",
        {"batch_indices": None, "positions": None},
    ),
    "flashinfer-seq-lens": (
        flashinfer.get_seq_lens,
        "flashinfer.get_seq_lens",
        "flashinfer-python 0.7.4",
        "kv_indptr kv_last_page_len page_size",
        {},
    ),
}  # fmt: skip


def spelled(function: Callable[..., Any]) -> list[tuple[str, Any]]:
    """(name, default) in order; a star before the names of *args and of keyword-only parameters."""
    stars = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.KEYWORD_ONLY}
    return [
        ("*" * (parameter.kind in stars) + name, parameter.default)
        for name, parameter in inspect.signature(function).parameters.items()
    ]


@pytest.mark.parametrize("name", ORIGINALS)
def test_signature_is_the_originals(name: str) -> None:
    ours, _, _, required, optional = ORIGINALS[name]
    expected = [(parameter, inspect.Parameter.empty) for parameter in required.split()]
    assert spelled(ours) == expected + list(optional.items())


def written(path: str) -> list[tuple[str, Any]] | None:
    """``spelled`` of an installed package's function by its source: most of them cannot be imported without a GPU.

    None if the package is not installed, a LookupError if nothing in it has this name. A default that is no literal is
    its text.
    """
    package, *names = path.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    place = Path(spec.origin).parent
    while (place / names[0]).is_dir():
        place /= names.pop(0)
    is_module = (place / f"{names[0]}.py").exists()
    files = [place / f"{names.pop(0)}.py"] if is_module else sorted(place.rglob("*.py"))
    for file in files:
        text = file.read_text()
        if f"class {names[0]}" not in text and f"def {names[0]}(" not in text:
            continue
        module = ast.parse(text).body
        body = module
        for name in names[:-1]:
            body = next((node.body for node in body if isinstance(node, ast.ClassDef) and node.name == name), [])
        found = [node for node in body if isinstance(node, ast.FunctionDef) and node.name == names[-1]]
        if found:
            return written_parameters(found[-1].args, constants(module))  # behind its overloads
    raise LookupError(f"{place} has no {'.'.join(names)}")


ENUM_VALUES: dict[Any, Any] = {"KVQuantMode.NONE": 0}
"""Defaults that are members of the package's own IntEnums."""


def constants(module: list[ast.stmt]) -> dict[str, Any]:
    """What the module's names are set to, where that is a literal."""
    return {
        target.id: node.value.value
        for node in module
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def written_parameters(arguments: ast.arguments, names: dict[str, Any]) -> list[tuple[str, Any]]:
    def value(default: ast.expr | None) -> Any:
        if default is None:
            return inspect.Parameter.empty
        if isinstance(default, ast.Name) and default.id in names:
            return names[default.id]
        try:
            return ast.literal_eval(default)
        except ValueError:
            return ast.unparse(default)

    positional = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
    parameters = [(name, value(default)) for name, default in zip(positional, defaults, strict=True)]
    if arguments.vararg is not None:
        parameters.append((f"*{arguments.vararg.arg}", inspect.Parameter.empty))
    keywords = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    return parameters + [(f"*{argument.arg}", value(default)) for argument, default in keywords]


@pytest.mark.parametrize("name", [name for name, original in ORIGINALS.items() if original[1]])
def test_signature_is_the_installed_packages(name: str) -> None:
    ours, path, *_ = ORIGINALS[name]
    original = written(path)
    if original is None:
        pytest.skip(f"{path.split('.')[0]} is not installed here")
    as_written = [
        (name, str(default) if isinstance(default, torch.dtype) else default) for name, default in spelled(ours)
    ]
    assert as_written == [(name, ENUM_VALUES.get(default, default)) for name, default in original]


@pytest.mark.parametrize("wrapper", ["BatchPrefillWithPagedKVCacheWrapper", "BatchDecodeWithPagedKVCacheWrapper"])
def test_deprecated_names_of_the_wrappers_exist(wrapper: str) -> None:
    ours = getattr(flashinfer, wrapper)
    assert ours.begin_forward is ours.plan
    for name in ("forward", "forward_return_lse", "run_return_lse", "end_forward", "reset_workspace_buffer"):
        assert callable(getattr(ours, name))
