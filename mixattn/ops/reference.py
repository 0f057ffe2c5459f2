"""The truth of every op, in plain torch: slow, obvious, in float32 or float64, on any device.

Every kernel is tested against these functions, and ``backend="reference"`` runs them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixattn.ops.kv_dtypes import MIN_ROW_SCALE, QUANTIZED, Scale, v_head_dim

TREE_MASK_BITS = 64
"""Of a ``tree_mask`` word: bit d is for the key d positions before the row's own."""
INT4_ZERO = 8
"""The nibble that stands for 0."""


def visible_keys(
    q_len: int, kv_len: int, *, causal: bool, window_left: int | None, tree_mask: Tensor | None = None
) -> Tensor:
    """Which keys each row of a slice may see: [q_len, kv_len] bool.

    Row r stands at position kv_len - q_len + r (the mask is aligned bottom-right) and sees the keys
    position - window_left <= j <= position; without ``causal`` the right bound is off, without ``window_left`` the
    left one. Of the slice's own keys less than ``TREE_MASK_BITS`` before it a row with a word in ``tree_mask``
    ([q_len] int64) sees only those whose bit, position - j, is set.
    """
    position = torch.arange(kv_len - q_len, kv_len).unsqueeze(1)
    key = torch.arange(kv_len).unsqueeze(0)
    visible = torch.ones(q_len, kv_len, dtype=torch.bool)
    if causal:
        visible &= key <= position
    if window_left is not None:
        visible &= key >= position - window_left
    if tree_mask is not None:
        distance = position - key
        has_bit = (key >= kv_len - q_len) & (distance >= 0) & (distance < TREE_MASK_BITS)
        bit = tree_mask.cpu().unsqueeze(1) >> distance.clamp(0, TREE_MASK_BITS - 1) & 1
        visible &= ~has_bit | (bit == 1)
    return visible


def gather_keys(cache: Tensor, block_table_row: Tensor, kv_len: int) -> Tensor:
    """One sequence's first ``kv_len`` rows, out of pages of K, V or their scales: [kv_len, *cache.shape[2:]]."""
    num_pages_used = -(-kv_len // cache.shape[1])
    return cache[block_table_row[:num_pages_used].long()].flatten(0, 1)[:kv_len]


def dequantize_reference(stored: Tensor, scale: Scale, *, compute_dtype: torch.dtype = torch.float32) -> Tensor:
    """Real values: stored ones of any dtype that a cache may have, times their scale; in ``compute_dtype``.

    Args:
        stored: [..., num_kv_heads, head_dim]; uint8 holds int4, [..., head_dim / 2].
        scale: one for all (None: 1), [num_kv_heads], or one per head of each token, [..., num_kv_heads].
    """
    if stored.dtype == torch.uint8:
        nibbles = torch.stack((stored & 15, stored >> 4), dim=-1).flatten(-2)
        stored = nibbles.to(torch.int8) - INT4_ZERO
    real = stored.to(compute_dtype)
    if scale is None:
        return real
    if isinstance(scale, Tensor):
        return real * scale.to(compute_dtype).unsqueeze(-1)
    return real * scale


def quantize_reference(
    x: Tensor, dtype: torch.dtype, scale: float | Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """What a cache of this dtype stores for real values, and the scales of the rows if they were to be found.

    Stored is x / scale in float32, rounded to nearest (ties to even) and saturated. A scale that is found is the row's
    largest |x| / ``row_max``, at least ``MIN_ROW_SCALE``, and NaN for a row that is not finite, so that NaN comes out
    of it again. int8 and int4 store NaN as 0, float8 as 0x7f.

    Args:
        x: [num_tokens, num_kv_heads, head_dim].
        dtype: a quantised one; uint8 is int4, two elements in a byte.
        scale: one for all, or [num_kv_heads]; None finds one per row, a head of a token.
    Returns:
        [num_tokens, num_kv_heads, head_dim] of ``dtype`` (int4: head_dim / 2), and [num_tokens, num_kv_heads] float32
        or None.
    """
    quantization = QUANTIZED[dtype]
    x = x.float()
    row_scales = None
    if scale is None:
        largest = (x.abs().amax(dim=-1) / quantization.row_max).clamp(min=MIN_ROW_SCALE)
        row_scales = torch.where(x.isfinite().all(dim=-1), largest, torch.nan)
        scale = row_scales
    divisor = scale.unsqueeze(-1) if isinstance(scale, Tensor) else torch.tensor(scale, dtype=torch.float32)
    scaled = (x / divisor).clamp(quantization.low, quantization.high)
    if dtype.is_floating_point:
        return torch.where(scaled.isnan(), torch.nan, scaled).to(dtype), row_scales
    integers = scaled.round().nan_to_num(0.0).to(torch.int8)
    if dtype == torch.uint8:
        nibbles = (integers + INT4_ZERO).to(torch.uint8)
        integers = nibbles[..., 0::2] | nibbles[..., 1::2] << 4
    return integers, row_scales


def attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_left: int | None = None,
    soft_cap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    tree_mask: Tensor | None = None,
    k_scale: Scale = None,
    v_scale: Scale = None,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Attention of ``ops.attention`` computed one sequence at a time, and its log-sum-exp.

    Args: as ``ops.attention``; ``compute_dtype`` is what every intermediate is held in (float64 for truth; q's own
        dtype gives what eager torch would compute in that dtype).
    Returns:
        out [total_q, num_q_heads, v_head_dim] and lse [total_q, num_q_heads] (natural log), both in ``compute_dtype``.
        A row that sees no key has out 0, and for lse its head's sink, -inf without sinks.
    """
    total_q, num_q_heads, head_dim = q.shape
    group_size = num_q_heads // k_cache.shape[2]
    softmax_scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    out = torch.zeros(total_q, num_q_heads, v_head_dim(v_cache), dtype=compute_dtype, device=q.device)
    if sinks is None:
        sinks = torch.full((num_q_heads,), -torch.inf, device=q.device)
    sinks = sinks.to(compute_dtype)
    lse = sinks.repeat(total_q, 1)
    starts = cu_seqlens_q.tolist()
    for seq_idx, kv_len in enumerate(seq_lens.tolist()):
        rows = slice(starts[seq_idx], starts[seq_idx + 1])
        q_len = rows.stop - rows.start
        visible = visible_keys(
            q_len, kv_len, causal=causal, window_left=window_left,
            tree_mask=None if tree_mask is None else tree_mask[rows],
        ).to(q.device)  # fmt: skip
        if not visible.any():
            continue
        # A slot that no row may see can hold NaN, and 0 * NaN would carry it into the sum.
        is_seen = visible.any(dim=0)[:, None, None]
        keys, values = (
            torch.where(is_seen, _real_keys(cache, scale, block_table[seq_idx], kv_len, compute_dtype), 0.0)
            .repeat_interleave(group_size, dim=1)
            .transpose(0, 1)
            for cache, scale in ((k_cache, k_scale), (v_cache, v_scale))
        )  # [num_q_heads, kv_len, head_dim], and with v_head_dim
        queries = q[rows].to(compute_dtype).transpose(0, 1)  # [num_q_heads, q_len, head_dim]
        scores = queries @ keys.transpose(1, 2) * softmax_scale  # [num_q_heads, q_len, kv_len]
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        if alibi_slopes is not None:
            slopes = alibi_slopes.expand(len(starts) - 1, -1)[seq_idx].to(compute_dtype)
            positions = torch.arange(kv_len - q_len, kv_len, device=q.device)
            distances = (positions[:, None] - torch.arange(kv_len, device=q.device)).abs()
            scores = scores - slopes[:, None, None] * distances
        scores = scores.masked_fill(~visible, -torch.inf)
        # A sink is one more key, without a value.
        scores = torch.cat((scores, sinks[:, None, None].expand(-1, q_len, 1)), dim=-1)
        # Softmax of a row without keys and sink is NaN; masking after it makes that row 0.
        probabilities = scores.softmax(dim=-1)[..., :-1].masked_fill(~visible, 0.0)
        out[rows] = (probabilities @ values).transpose(0, 1)
        lse[rows] = scores.logsumexp(dim=-1).transpose(0, 1)
    return out, lse


def _real_keys(cache: Tensor, scale: Scale, block_table_row: Tensor, kv_len: int, compute_dtype: torch.dtype) -> Tensor:
    """The first ``kv_len`` rows of one sequence, dequantised: [kv_len, num_kv_heads, head_dim]."""
    if isinstance(scale, Tensor) and scale.dim() == 3:
        scale = gather_keys(scale, block_table_row, kv_len)
    return dequantize_reference(gather_keys(cache, block_table_row, kv_len), scale, compute_dtype=compute_dtype)


def rope_reference(
    x: Tensor,
    positions: Tensor,
    rope_cos_sin: Tensor,
    *,
    interleaved: bool = False,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``x`` with the leading ``rotary_dim`` dimensions of each head rotated, in ``compute_dtype``.

    Args:
        x: [num_tokens, num_heads, head_dim].
        positions: [num_tokens] int64, rows of the table.
        rope_cos_sin: [max_positions, rotary_dim] float32: rotary_dim / 2 cosines, then as many sines.
        interleaved: pairs are (2i, 2i + 1); else (i, i + rotary_dim / 2).
    Source: arXiv:2104.09864, equation 34.
    """
    rotary_dim = rope_cos_sin.shape[1]
    cos, sin = rope_cos_sin[positions].to(compute_dtype).unsqueeze(1).chunk(2, dim=-1)  # [num_tokens, 1, rotary_dim/2]
    result = x.to(compute_dtype, copy=True)
    rotated = result[..., :rotary_dim]
    half = rotary_dim // 2
    first, second = (
        (rotated[..., 0::2], rotated[..., 1::2]) if interleaved else (rotated[..., :half], rotated[..., half:])
    )
    turned = first * cos - second * sin, second * cos + first * sin
    first.copy_(turned[0])
    second.copy_(turned[1])
    return result


def append_kv_reference(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    q: Tensor | None = None,
    positions: Tensor | None = None,
    rope_cos_sin: Tensor | None = None,
    interleaved: bool = False,
    k_scale: Scale = None,
    v_scale: Scale = None,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor | None:
    """The rotated q in ``compute_dtype`` (None without q); k, rotated, and v are stored in their slots of the caches.

    Args: as ``ops.append_kv``; the rotation is computed in ``compute_dtype`` and rounded once.
    """
    page_size = k_cache.shape[1]
    page, offset = slot_mapping // page_size, slot_mapping % page_size
    if rope_cos_sin is not None and positions is not None:
        k = rope_reference(k, positions, rope_cos_sin, interleaved=interleaved, compute_dtype=compute_dtype)
        if q is not None:
            q = rope_reference(q, positions, rope_cos_sin, interleaved=interleaved, compute_dtype=compute_dtype)
    for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        if cache.dtype not in QUANTIZED:
            cache[page, offset] = x.to(cache.dtype)
            continue
        is_per_token = isinstance(scale, Tensor) and scale.dim() == 3
        given = None if is_per_token else 1.0 if scale is None else scale
        stored, row_scales = quantize_reference(x, cache.dtype, given)
        cache[page, offset] = stored
        if isinstance(scale, Tensor) and row_scales is not None:
            scale[page, offset] = row_scales
    return q


def merge_states_reference(
    outs: Tensor, lses: Tensor, *, compute_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint key sets, from the result over each; both in ``compute_dtype``.

    Args:
        outs: [num_states, total_q, num_q_heads, head_dim], each normalised by its own sum.
        lses: [num_states, total_q, num_q_heads], natural log; -inf marks an empty state, whose out is not read.
    Returns:
        out [total_q, num_q_heads, head_dim] and lse [total_q, num_q_heads]; 0 and -inf where all states are empty.
    Source: merge of online-softmax states, arXiv:1805.02867.
    """
    lses = lses.to(compute_dtype)
    lse = lses.logsumexp(dim=0)
    is_empty = lses == -torch.inf
    weights = (lses - lse).exp().masked_fill(is_empty, 0.0).unsqueeze(-1)
    outs = outs.to(compute_dtype).masked_fill(is_empty.unsqueeze(-1), 0.0)
    return (weights * outs).sum(dim=0), lse


def lora_reference(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scalings: Tensor,
    cu_seqlens_q: Tensor,
    adapter_ids: Tensor,
    *,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """y + scaling * (x a^T) b^T, each slice's rows with its own adapter, in ``compute_dtype``.

    Args:
        y: [total_q, out_size]; x: [total_q, in_size].
        a: [num_adapters, rank, in_size]; b: [num_adapters, out_size, rank]; scalings: [num_adapters].
        cu_seqlens_q: [num_seqs + 1]; adapter_ids: [num_seqs], below 0 where the slice has no adapter.
    Source: arXiv:2106.09685, section 4.1.
    """
    result = y.to(compute_dtype, copy=True)
    starts = cu_seqlens_q.tolist()
    for begin, end, adapter in zip(starts, starts[1:], adapter_ids.tolist(), strict=False):
        if adapter >= 0:
            low_rank = x[begin:end].to(compute_dtype) @ a[adapter].to(compute_dtype).T
            result[begin:end] += float(scalings[adapter]) * (low_rank @ b[adapter].to(compute_dtype).T)
    return result
