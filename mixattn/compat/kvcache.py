"""What the flash_attn_with_kvcache of FlashAttention-2 and FlashAttention-3 have in common."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mixattn.compat.arguments import Mask, contiguous_rows, rows_of, slots_of, soft_cap_of
from mixattn.ops.attention import attention
from mixattn.ops.kv_cache import append_kv
from mixattn.ops.reference import rope_reference


class Ragged(NamedTuple):
    """Rows of several sequences one after another: [total, num_heads, head_dim], and where each begins."""

    rows: Tensor
    cu_seqlens: Tensor


class Rotary(NamedTuple):
    """RoPE as FlashAttention takes it."""

    cos: Tensor | None
    sin: Tensor | None
    interleaved: bool


def kvcache_attention(
    function: str,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    *,
    rotary: Rotary,
    cache_seqlens: int | Tensor | None,
    cache_batch_idx: Tensor | None,
    block_table: Tensor | None,
    softmax_scale: float | None,
    mask: Mask,
    softcap: float,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    sm_margin: int = 0,
) -> tuple[Tensor, Tensor]:
    """out shaped as q, and lse [batch, num_q_heads, q_len] ([num_q_heads, total_q] with ``cu_seqlens_q``), natural log.

    The new k and v are rotated and stored behind the first ``cache_seqlens`` keys, then read with the rest.

    Args:
        q: [batch, q_len, num_q_heads, head_dim], or [total_q, num_q_heads, head_dim] with ``cu_seqlens_q``.
        k_cache, v_cache: [num_pages, page_size, num_kv_heads, head_dim] with ``block_table``; else [cache_batch,
            capacity, num_kv_heads, head_dim]: to ``attention``, a page per sequence. Written where k is given.
        k, v: [batch, new_len, num_kv_heads, head_dim], or [total_new, ...] with ``cu_seqlens_k_new``.
        cache_seqlens: the keys in the cache before this call: [batch] int32, or one for all. None: it is full.
        cache_batch_idx: [batch] int32, which of the cache's sequences; None is the first ones.
        sm_margin: as ``mixattn.attention`` takes it.
    """
    queries = _ragged("q", q, cu_seqlens_q)
    num_seqs = len(queries.cu_seqlens) - 1
    if block_table is None:
        if cache_batch_idx is None:
            cache_batch_idx = torch.arange(num_seqs, device=q.device)
        block_table = cache_batch_idx.to(torch.int32).unsqueeze(1)
    elif cache_batch_idx is not None:
        raise ValueError(f"{function}: cache_batch_idx must not be given with block_table, which says the same")
    capacity = block_table.shape[1] * k_cache.shape[1]
    if not isinstance(cache_seqlens, Tensor):
        if cache_seqlens is None and k is not None:
            raise ValueError(f"{function}: cache_seqlens must be given with k")
        past_len = capacity if cache_seqlens is None else cache_seqlens
        cache_seqlens = torch.full((num_seqs,), past_len, dtype=torch.int32, device=q.device)
    seq_lens = cache_seqlens
    if k is not None and v is not None:
        new_k = _ragged("k", k, cu_seqlens_k_new)
        new_v = _ragged("v", v, cu_seqlens_k_new)
        seq_lens = cache_seqlens + new_k.cu_seqlens.diff()
        if seq_lens.device.type == "cpu" and bool(((cache_seqlens < 0) | (seq_lens > capacity)).any()):
            raise ValueError(
                f"{function}: cache_seqlens must be >= 0 and leave room for the new keys in {capacity} slots, got "
                f"{cache_seqlens.tolist()} before {new_k.cu_seqlens.diff().tolist()} new keys"
            )
        store = functools.partial(append_kv, new_k.rows, new_v.rows, k_cache, v_cache, k_scale=k_scale, v_scale=v_scale)
        queries = _append(store, queries, new_k, k_cache.shape[1], cache_seqlens, block_table, rotary, mask)
    elif k is not None or v is not None:
        raise ValueError(f"{function}: k and v must be given together")
    elif rotary.cos is not None:
        raise ValueError(f"{function}: rotary_cos must not be given without k: it turns new keys")
    out, lse = attention(
        queries.rows,
        k_cache,
        v_cache,
        cu_seqlens_q=queries.cu_seqlens,
        seq_lens=seq_lens,
        block_table=block_table,
        softmax_scale=softmax_scale,
        causal=mask.causal,
        window_left=mask.window_left,
        soft_cap=soft_cap_of(softcap),
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        k_scale=k_scale,
        v_scale=v_scale,
        sm_margin=sm_margin,
        return_lse=True,
    )
    if cu_seqlens_q is not None:
        return out, lse.transpose(0, 1).contiguous()
    return out.view(q.shape), lse.view(*q.shape[:2], -1).transpose(1, 2).contiguous()


def _ragged(name: str, x: Tensor, cu_seqlens: Tensor | None) -> Ragged:
    """``x`` with its first two dimensions as one, unless it comes with ``cu_seqlens`` and has but one."""
    num_dims = 4 if cu_seqlens is None else 3
    if x.dim() != num_dims:
        names = "[batch, len, num_heads, head_dim]" if cu_seqlens is None else "[total, num_heads, head_dim]"
        raise ValueError(f"{name} must be {names}, got shape {list(x.shape)}")
    x = contiguous_rows(x)
    if cu_seqlens is not None:
        return Ragged(x, cu_seqlens)
    batch, length = x.shape[:2]
    starts = torch.arange(batch + 1, dtype=torch.int32, device=x.device) * length
    return Ragged(x.flatten(0, 1), starts)


def _append(
    store: Callable[..., object],
    queries: Ragged,
    new_k: Ragged,
    page_size: int,
    past_lens: Tensor,
    block_table: Tensor,
    rotary: Rotary,
    mask: Mask,
) -> Ragged:
    """The queries, rotated if there is a rotation; ``store`` gets the slots of the new keys, and their rotation."""
    new_rows = rows_of(new_k.cu_seqlens, past_lens, len(new_k.rows))
    slots = slots_of(new_rows, block_table, page_size)
    if rotary.cos is None or rotary.sin is None:
        store(slots)
        return queries
    table = torch.cat((rotary.cos, rotary.sin), dim=-1).float()
    store(slots, positions=new_rows.positions, rope_cos_sin=table, interleaved=rotary.interleaved)
    query_rows = rows_of(queries.cu_seqlens, past_lens, len(queries.rows))
    # Where every row sees every key, rows have no order: FlashAttention turns all of them by the first one's position.
    has_order = mask.causal or mask.window_left is not None
    positions = query_rows.positions if has_order else past_lens.long()[query_rows.seq_idx]
    rotated = rope_reference(queries.rows, positions, table, interleaved=rotary.interleaved)
    return Ragged(rotated.to(queries.rows.dtype), queries.cu_seqlens)
