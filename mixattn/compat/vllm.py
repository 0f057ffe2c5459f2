"""vLLM's attention calls: flash_attn_varlen_func and unified_attention; docs/compat.md accounts for each argument.

Source: vllm/vllm_flash_attn/flash_attn_interface.py and vllm/v1/attention/ops/triton_unified_attention.py of
vllm-project/vllm (the latter as of ced6857).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mixattn.compat.arguments import accept_only, check_q_descale, kv_scale, mask_of, soft_cap_of
from mixattn.compat.varlen import varlen_attention
from mixattn.ops.attention import attention


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    max_seqlen_q: int,
    cu_seqlens_q: Tensor,
    max_seqlen_k: int,
    cu_seqlens_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    q_v: Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    return_softmax_lse: bool = False,
    out: Tensor | None = None,
    scheduler_metadata: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    num_splits: int = 0,
    output_scale: Tensor | None = None,
    fa_version: int = 2,
    s_aux: Tensor | None = None,
    cp_world_size: int = 1,
    cp_rank: int = 0,
    cp_tot_seqused_k: Tensor | None = None,
    mask_mod: Callable[..., Any] | None = None,
    block_sparse_tensors: Any | None = None,
    aux_tensors: Sequence[Tensor] | None = None,
    aux_tensor_leading_dims: Sequence[int] | None = None,
    dynamic_causal: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """out [total_q, num_q_heads, head_dim]; with ``return_softmax_lse`` also lse. max_seqlen_q is before cu_seqlens_q.

    Args:
        k, v: [num_pages, page_size, num_kv_heads, head_dim] with ``block_table``, else [total_k, ...].
        cu_seqlens_k: [num_seqs + 1] int32, for keys without pages.
        seqused_k: [num_seqs] int32, the keys of each sequence, this step's included; for pages.
        window_size: (left, right), -1 for no bound; the right one is 0 or -1. None is no window.
        alibi_slopes: [num_q_heads] or [num_seqs, num_q_heads] float32.
        s_aux: [num_q_heads], a sink per head; lse includes it.
        out: written and returned if given.
    Returns:
        lse is [num_q_heads, total_q] float32, natural log, -inf where a row has no keys.
    Raises:
        ValueError: neither or both of ``cu_seqlens_k`` and ``seqused_k``; pages without ``seqused_k``.
        NotImplementedError: naming an argument that mixattn cannot honour.
    """
    function = "flash_attn_varlen_func"
    accept_only(function, None, "the nearest is attention whose values have the keys' head_dim", q_v=q_v)
    accept_only(function, 0.0, "leave dropout to training", dropout_p=dropout_p)
    accept_only(function, False, "the nearest is return_softmax_lse", return_attn_probs=return_attn_probs)
    accept_only(function, None, "the nearest is output in q's dtype", output_scale=output_scale)
    accept_only(function, 1, "the nearest is merge_states over the ranks' results", cp_world_size=cp_world_size)
    accept_only(function, 0, "the nearest is merge_states over the ranks' results", cp_rank=cp_rank)
    accept_only(
        function,
        None,
        "the nearest is causal with window_size",
        cp_tot_seqused_k=cp_tot_seqused_k,
        mask_mod=mask_mod,
        block_sparse_tensors=block_sparse_tensors,
        aux_tensors=aux_tensors,
        aux_tensor_leading_dims=aux_tensor_leading_dims,
        dynamic_causal=dynamic_causal,
    )
    check_q_descale(function, q_descale)
    if fa_version not in (2, 3, 4):
        raise ValueError(f"{function}: fa_version must be 2, 3 or 4, got {fa_version}")
    if (cu_seqlens_k is None) == (seqused_k is None):
        raise ValueError(f"{function}: one of cu_seqlens_k and seqused_k must be given")
    if block_table is not None and seqused_k is None:
        raise ValueError(f"{function}: seqused_k must be given with block_table")
    out, lse = varlen_attention(
        function,
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_k=seqused_k,
        max_seqlen_k=max_seqlen_k,
        block_table=block_table,
        softmax_scale=softmax_scale,
        mask=mask_of(function, causal, window_size or (-1, -1)),
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=None if s_aux is None else s_aux.float(),
        k_scale=kv_scale(function, "k_descale", k, k_descale),
        v_scale=kv_scale(function, "v_descale", v, v_descale),
        out=out,
    )
    return (out, lse) if return_softmax_lse else out


def unified_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    seqused_k: Tensor,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    window_size: Sequence[int],
    block_table: Tensor,
    softcap: float,
    q_descale: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    seq_threshold_3D: int | None = None,
    num_par_softmax_segments: int | None = None,
    softmax_segm_output: Tensor | None = None,
    softmax_segm_max: Tensor | None = None,
    softmax_segm_expsum: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    output_scale: Tensor | None = None,
    qq_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    mm_prefix_range: Tensor | None = None,
    rswa_prefix_lens: Tensor | None = None,
    rswa_window: int | None = None,
    use_alibi_sqrt: bool = False,
    kv_quant_mode: int = 0,
    k_scale_cache: Tensor | None = None,
    v_scale_cache: Tensor | None = None,
    chunk_lookback: int = -1,
    use_td: bool = False,
    mm_prefix_clamp_sliding_window: bool = False,
) -> None:
    """Writes attention of every row over its pages into ``out``.

    Args:
        q, out: [total_q, num_q_heads, head_dim].
        k, v: [num_pages, page_size, num_kv_heads, head_dim].
        seqused_k: [num_seqs] int32, the keys of each sequence, this step's included.
        window_size: (left, right), -1 for no bound; the right one is 0 or -1.
        alibi_slopes, sinks: [num_q_heads].
        k_descale, v_descale: of 8-bit k and v as a whole, or per head.
        k_scale_cache, v_scale_cache: [num_pages, page_size, num_kv_heads] float32, per token and head, instead.
        kv_quant_mode: vLLM's KVQuantMode; the dtype of k and the scales say the same.
    Raises:
        NotImplementedError: naming an argument that mixattn cannot honour.
    """
    function = "unified_attention"
    check_q_descale(function, q_descale)
    accept_only(function, None, "the nearest is mixattn.attention with tree_mask", qq_bias=qq_bias)
    accept_only(function, None, "the nearest is output in q's dtype", output_scale=output_scale)
    accept_only(
        function,
        None,
        "the nearest is causal with window_size",
        mm_prefix_range=mm_prefix_range,
        rswa_prefix_lens=rswa_prefix_lens,
        rswa_window=rswa_window,
    )
    accept_only(function, False, "the nearest is a linear bias", use_alibi_sqrt=use_alibi_sqrt)
    if k.dtype == torch.uint8:
        raise NotImplementedError(
            f"{function}: kv_quant_mode = {kv_quant_mode!r} with uint8 k is not supported: vLLM packs int4 in another "
            "order; the nearest is int8"
        )
    accept_only(function, -1, "the nearest is window_size", chunk_lookback=chunk_lookback)
    accept_only(
        function,
        False,
        "the nearest is causal with window_size",
        mm_prefix_clamp_sliding_window=mm_prefix_clamp_sliding_window,
    )
    k_scale: float | Tensor | None = k_scale_cache
    v_scale: float | Tensor | None = v_scale_cache
    if k_scale_cache is None or v_scale_cache is None:
        k_scale = kv_scale(function, "k_descale", k, k_descale)
        v_scale = kv_scale(function, "v_descale", v, v_descale)
    mask = mask_of(function, causal, window_size)
    if alibi_slopes is not None and not mask.causal:
        raise NotImplementedError(
            f"{function}: alibi_slopes without causal are not supported, as vLLM then favours keys behind the row; "
            "the nearest is causal=True"
        )
    attention(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_q,
        seq_lens=seqused_k,
        block_table=block_table,
        softmax_scale=softmax_scale,
        causal=mask.causal,
        window_left=mask.window_left,
        soft_cap=soft_cap_of(softcap),
        alibi_slopes=None if alibi_slopes is None else alibi_slopes.float(),
        sinks=None if sinks is None else sinks.float(),
        k_scale=k_scale,
        v_scale=v_scale,
        out=out,
    )
