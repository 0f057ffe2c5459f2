"""What the flash_attn_varlen_func of FlashAttention-2, FlashAttention-3 and vLLM have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from mixattn.compat.arguments import Mask, contiguous_rows, soft_cap_of, token_table
from mixattn.ops.attention import attention


def varlen_attention(
    function: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    seqused_k: Tensor | None,
    max_seqlen_k: int,
    block_table: Tensor | None,
    softmax_scale: float | None,
    mask: Mask,
    softcap: float,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    sm_margin: int = 0,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out [total_q, num_q_heads, head_dim] and lse [num_q_heads, total_q] float32, natural log.

    K and V without a block table are read where they lie, as pages of one token.

    Args:
        k, v: [num_pages, page_size, num_kv_heads, head_dim] with ``block_table``; else [total_k, num_kv_heads,
            head_dim], the sequences one after another.
        cu_seqlens_k: [num_seqs + 1] int32, the lengths of the keys, and where they start without ``block_table``.
        seqused_k: [num_seqs] int32, how many keys to read where that is not what ``cu_seqlens_k`` says.
        max_seqlen_k: the longest of them, or more.
        k_scale, v_scale, sm_margin: as ``mixattn.attention`` takes them.
    """
    q, k, v = (contiguous_rows(x) for x in (q, k, v))
    if seqused_k is not None:
        seq_lens = seqused_k
    elif cu_seqlens_k is not None:
        seq_lens = cu_seqlens_k.diff()
    else:
        raise ValueError(f"{function}: cu_seqlens_k or seqused_k must be given")
    if block_table is None:
        if cu_seqlens_k is None:
            raise ValueError(f"{function}: cu_seqlens_k must be given for keys without block_table")
        block_table = token_table(cu_seqlens_k[:-1], max_seqlen_k)
        k, v = k.unsqueeze(1), v.unsqueeze(1)
    out, lse = attention(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_q,
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
        out=out,
        return_lse=True,
    )
    return out, lse.transpose(0, 1).contiguous()


def no_probabilities(q: Tensor) -> Tensor:
    """What FlashAttention-2 returns for the dropout mask when there is no dropout: [0] of q's dtype."""
    return torch.empty(0, dtype=q.dtype, device=q.device)
