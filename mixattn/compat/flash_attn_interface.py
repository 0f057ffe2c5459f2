"""The calls of flash_attn_interface (FlashAttention-3) that inference makes; docs/compat.md accounts for each argument.

Source: hopper/flash_attn_interface.py of Dao-AILab/flash-attention at 01afd16.
"""

from __future__ import annotations

from torch import Tensor

from mixattn.compat.arguments import accept_only, check_q_descale, kv_scale, mask_of
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
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """out [total_q, num_q_heads, head_dim]; with ``return_attn_probs`` also lse.

    Args:
        q: [total_q, num_q_heads, head_dim].
        k, v: [total_k, num_kv_heads, head_dim].
        cu_seqlens_q, cu_seqlens_k: [num_seqs + 1] int32.
        seqused_k: [num_seqs] int32, how many of its keys each sequence reads; None for all.
        window_size: (left, right), -1 for no bound; the right one is 0 or -1.
        sm_margin: SMs of a GPU that the launch leaves free; a CPU has none, and ignores it.
    Returns:
        lse is [num_q_heads, total_q] float32, natural log, -inf where a row has no keys.
    Raises:
        NotImplementedError: naming an argument that mixattn cannot honour.
    """
    function = "flash_attn_varlen_func"
    accept_only(function, None, "the nearest is slices as long as cu_seqlens_q says", seqused_q=seqused_q)
    accept_only(function, None, "the nearest is attention whose values have the keys' head_dim", qv=qv)
    accept_only(function, 0, "the nearest is window_size", attention_chunk=attention_chunk)
    check_q_descale(function, q_descale)
    out, lse = varlen_attention(
        function,
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_k=seqused_k,
        max_seqlen_k=max_seqlen_k,
        block_table=None,
        softmax_scale=softmax_scale,
        mask=mask_of(function, causal, window_size),
        softcap=softcap,
        k_scale=kv_scale(function, "k_descale", k, k_descale),
        v_scale=kv_scale(function, "v_descale", v, v_descale),
        sm_margin=sm_margin,
    )
    return (out, lse) if return_attn_probs else out


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor, Tensor]:
    """out shaped as q; with ``return_softmax_lse`` also lse and two empty tensors (FlashAttention-3's split results).

    Args: as ``kvcache.kvcache_attention``, with ``page_table`` for ``block_table``; ``cache_seqlens`` does not count
        the new k and v, which are stored in place.
        rotary_cos, rotary_sin: [max_positions, rotary_dim / 2].
        sm_margin: SMs of a GPU that attention leaves free (not the storing of k and v, which is short); a CPU has none.
    Returns:
        lse is [batch, num_q_heads, q_len], or [num_q_heads, total_q] with ``cu_seqlens_q``; float32, natural log.
    Raises:
        NotImplementedError: naming an argument that mixattn cannot honour.
    """
    function = "flash_attn_with_kvcache"
    accept_only(function, None, "the nearest is attention whose values have the keys' head_dim", qv=qv)
    accept_only(function, None, "the nearest is a cache that begins at its first slot", cache_leftpad=cache_leftpad)
    accept_only(function, None, "the nearest is rotation by cache_seqlens", rotary_seqlens=rotary_seqlens)
    accept_only(function, 0, "the nearest is window_size", attention_chunk=attention_chunk)
    check_q_descale(function, q_descale)
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
        block_table=page_table,
        softmax_scale=softmax_scale,
        mask=mask_of(function, causal, window_size),
        softcap=softcap,
        k_scale=kv_scale(function, "k_descale", k_cache, k_descale),
        v_scale=kv_scale(function, "v_descale", v_cache, v_descale),
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k_new=cu_seqlens_k_new,
        sm_margin=sm_margin,
    )
    return (out, lse, no_probabilities(q), no_probabilities(q)) if return_softmax_lse else out
