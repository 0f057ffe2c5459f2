"""The calls of flash_attn (FlashAttention-2) that inference makes; each argument is accounted for in docs/compat.md.

Source: flash_attn/flash_attn_interface.py of Dao-AILab/flash-attention at 0053002.
"""

from __future__ import annotations

from torch import Tensor

from mixattn.compat.arguments import accept_only, mask_of
from mixattn.compat.kvcache import Rotary, kvcache_attention
from mixattn.compat.varlen import no_probabilities, varlen_attention


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """out [total_q, num_q_heads, head_dim]; with ``return_attn_probs`` also lse and an empty tensor.

    Args:
        q: [total_q, num_q_heads, head_dim].
        k, v: [total_k, num_kv_heads, head_dim], or pages [num_pages, page_size, num_kv_heads, head_dim].
        cu_seqlens_q, cu_seqlens_k: [num_seqs + 1] int32.
        window_size: (left, right), -1 for no bound; the right one is 0 or -1.
        alibi_slopes: [num_q_heads] or [num_seqs, num_q_heads] float32.
        block_table: [num_seqs, max_pages] int32.
    Returns:
        lse is [num_q_heads, total_q] float32, natural log, -inf (FlashAttention-2: inf) where a row has no keys.
    Raises:
        NotImplementedError: naming an argument that mixattn cannot honour.
    """
    function = "flash_attn_varlen_func"
    accept_only(function, 0.0, "leave dropout to training", dropout_p=dropout_p)
    out, lse = varlen_attention(
        function,
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_k=None,
        max_seqlen_k=max_seqlen_k,
        block_table=block_table,
        softmax_scale=softmax_scale,
        mask=mask_of(function, causal, window_size),
        softcap=softcap,
        alibi_slopes=alibi_slopes,
    )
    return (out, lse, no_probabilities(q)) if return_attn_probs else out


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """out [batch, q_len, num_q_heads, head_dim]; with ``return_softmax_lse`` also lse [batch, num_q_heads, q_len].

    Args: as ``kvcache.kvcache_attention``; ``cache_seqlens`` does not count the new k and v, which are stored in place.
        rotary_cos, rotary_sin: [max_positions, rotary_dim / 2].
    Raises:
        NotImplementedError: naming an argument that mixattn cannot honour.
    """
    function = "flash_attn_with_kvcache"
    accept_only(function, None, "the nearest is a cache that begins at its first slot", cache_leftpad=cache_leftpad)
    out, lse = kvcache_attention(
        function,
        q,
        k_cache,
        v_cache,
        k,
        v,
        rotary=Rotary(rotary_cos, rotary_sin, rotary_interleaved),
        cache_seqlens=cache_seqlens,
        cache_batch_idx=cache_batch_idx,
        block_table=block_table,
        softmax_scale=softmax_scale,
        mask=mask_of(function, causal, window_size),
        softcap=softcap,
        alibi_slopes=alibi_slopes,
    )
    return (out, lse) if return_softmax_lse else out
