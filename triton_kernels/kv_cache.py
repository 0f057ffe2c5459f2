# kv_cache.py: this step's K (rotated) and V into their pages, and Q rotated, in one launch.
# Math    (a, b) -> (a cos - b sin, b cos + a sin) for each pair (a, b) of the leading rotary_dim dimensions of a head
#         Quantised: round(x / scale), scale given or a head's largest |x| / the largest code
# Method  one program per token and block of heads: the first blocks take K and V, the rest Q; float32, rounded once,
#         no product fused: what is stored are the bits of the reference
# Grid    (total_q, blocks of kv heads + blocks of q heads), 4 warps; 8 heads of 128 dimensions are 16 bytes a thread
# Shapes  k [total_q, num_kv_heads, head_dim], v [total_q, num_kv_heads, v_head_dim], q [total_q, num_q_heads,
#         head_dim], caches [num_pages, page_size, ...]
# Memory  reads and writes each element once; no shared memory; cos and sin of a token once per block of heads
# Limits  any head_dim, v_head_dim, page_size and strides, the last dimension contiguous; bf16, fp16, fp32, and caches
#         of int8, float8 and int4, too
# Twins   csrc/cpu/kv_cache-inl.h, csrc/cuda/append_kv.cuh
#         truth ops/reference.py (append_kv_reference, rope_reference, quantize_reference)
# Source  arXiv:2104.09864, equation 34
"""Storing keys and values in their pages with RoPE on the way; ``append_kv`` on GPUs."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixattn.triton_kernels._launch import launch
from mixattn.triton_kernels._numeric import narrow, widen
from mixattn.triton_kernels._quantized import code_of, row_scales

MAX_BLOCK_HEADS = 8


@triton.jit
def copy_rows(source, target, is_head, FROM_DIM: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Copies the dimensions [FROM_DIM, HEAD_DIM) of the heads at source to those at target, pointers [BLOCK_HEADS]."""
    dim = tl.arange(0, BLOCK_D)
    is_value = is_head[:, None] & ((dim >= FROM_DIM) & (dim < HEAD_DIM))[None, :]
    rows = tl.load(source[:, None] + dim[None, :], mask=is_value)
    dtype: tl.constexpr = target.dtype.element_ty
    if rows.dtype != dtype:
        rows = narrow(widen(rows), dtype)
    tl.store(target[:, None] + dim[None, :], rows, mask=is_value)


@triton.jit
def rotate_rows(
    source,
    target,
    is_head,
    cos_sin,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
):
    """The heads at source, rotated by one row of the table, to target; pointers [BLOCK_HEADS]. May be in place."""
    if ROTARY_DIM > 0:
        pair = tl.arange(0, BLOCK_PAIRS)
        is_pair = pair < ROTARY_DIM // 2
        first = pair * 2 if IS_INTERLEAVED else pair
        second = first + (1 if IS_INTERLEAVED else ROTARY_DIM // 2)
        cos = tl.load(cos_sin + pair, mask=is_pair, other=0.0)[None, :]
        sin = tl.load(cos_sin + ROTARY_DIM // 2 + pair, mask=is_pair, other=0.0)[None, :]
        is_value = is_head[:, None] & is_pair[None, :]
        a = widen(tl.load(source[:, None] + first[None, :], mask=is_value, other=0.0))  # (BLOCK_HEADS, BLOCK_PAIRS)
        b = widen(tl.load(source[:, None] + second[None, :], mask=is_value, other=0.0))
        dtype: tl.constexpr = target.dtype.element_ty
        tl.store(target[:, None] + first[None, :], narrow(a * cos - b * sin, dtype), mask=is_value)
        tl.store(target[:, None] + second[None, :], narrow(b * cos + a * sin, dtype), mask=is_value)
    if ROTARY_DIM < HEAD_DIM:
        copy_rows(source, target, is_head, ROTARY_DIM, HEAD_DIM, BLOCK_D)


@triton.jit
def load_rotated(
    source,
    is_head,
    dim,
    cos_sin,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
):
    """[BLOCK_HEADS, len(dim)] float32: the dimensions dim of the heads at source, rotated; 0 outside of the head."""
    is_value = is_head[:, None] & (dim < HEAD_DIM)[None, :]
    x = widen(tl.load(source[:, None] + dim[None, :], mask=is_value, other=0.0))
    if ROTARY_DIM > 0:
        HALF: tl.constexpr = ROTARY_DIM // 2
        pair = dim // 2 if IS_INTERLEAVED else dim % HALF
        is_first = dim % 2 == 0 if IS_INTERLEAVED else dim < HALF
        DISTANCE: tl.constexpr = 1 if IS_INTERLEAVED else HALF
        partner = tl.where(is_first, dim + DISTANCE, dim - DISTANCE)
        is_turned = dim < ROTARY_DIM
        y = widen(tl.load(source[:, None] + partner[None, :], mask=is_value & is_turned[None, :], other=0.0))
        cos = tl.load(cos_sin + pair, mask=is_turned, other=1.0)
        sin = tl.load(cos_sin + HALF + pair, mask=is_turned, other=0.0)
        turned = x * cos[None, :] + y * tl.where(is_first, -sin, sin)[None, :]
        x = tl.where(is_turned[None, :], turned, x)
    return x


@triton.jit
def quantize_rows(
    source,
    target,
    is_head,
    scale,
    scale_value,
    cos_sin,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    KV_FORMAT: tl.constexpr,
    WRITES_SCALE: tl.constexpr,
):
    """The heads at source, rotated, to target, pointers [BLOCK_HEADS], as codes of KV_FORMAT.

    scale, pointers [BLOCK_HEADS], takes the rows' scales with WRITES_SCALE, else gives them; None: scale_value.
    """
    PACKED: tl.constexpr = 2 if KV_FORMAT == "int4" else 1
    byte = tl.arange(0, BLOCK_D // PACKED)
    x = load_rotated(source, is_head, byte * PACKED, cos_sin, HEAD_DIM, ROTARY_DIM, IS_INTERLEAVED)
    odd = x
    if PACKED == 2:
        odd = load_rotated(source, is_head, byte * PACKED + 1, cos_sin, HEAD_DIM, ROTARY_DIM, IS_INTERLEAVED)
    if WRITES_SCALE:
        largest = tl.max(tl.maximum(tl.abs(x), tl.abs(odd)), 1)
        is_finite = (tl.abs(x) < float("inf")) & (tl.abs(odd) < float("inf"))  # false of NaN
        divisor = row_scales(largest, tl.min(is_finite.to(tl.int32), 1) == 1, KV_FORMAT)
        tl.store(scale, divisor, mask=is_head)
    elif scale is not None:
        divisor = tl.load(scale, mask=is_head, other=1.0)
    else:
        divisor = tl.zeros([is_head.shape[0]], tl.float32) + scale_value
    divisors = tl.broadcast_to(divisor[:, None], x.shape)
    code = code_of(tl.math.div_rn(x, divisors), KV_FORMAT)
    if PACKED == 2:
        code = code | code_of(tl.math.div_rn(odd, divisors), KV_FORMAT) << 4
    is_byte = is_head[:, None] & (byte * PACKED < HEAD_DIM)[None, :]
    tl.store(target[:, None] + byte[None, :], (code & 0xFF).to(tl.uint8), mask=is_byte)


@triton.jit
def append_kv_kernel(
    k,
    v,
    k_cache,
    v_cache,
    k_scale,
    v_scale,
    slot_mapping,
    q,
    q_out,
    positions,
    rope_cos_sin,
    k_scale_value,
    v_scale_value,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    stride_k_cache_page,
    stride_k_cache_token,
    stride_k_cache_head,
    stride_v_cache_page,
    stride_v_cache_token,
    stride_v_cache_head,
    stride_k_scale_page,
    stride_k_scale_token,
    stride_k_scale_head,
    stride_v_scale_page,
    stride_v_scale_token,
    stride_v_scale_head,
    stride_q_token,
    stride_q_head,
    stride_q_out_token,
    stride_q_out_head,
    stride_table,
    num_kv_heads,
    num_q_heads,
    page_size,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    KV_FORMAT: tl.constexpr,
    WRITES_K_SCALE: tl.constexpr,
    WRITES_V_SCALE: tl.constexpr,
):
    """One token, one block of heads: of K and V, or, past those, of Q."""
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    num_kv_blocks = tl.cdiv(num_kv_heads, BLOCK_HEADS)
    cos_sin = rope_cos_sin
    if ROTARY_DIM > 0:
        cos_sin += tl.load(positions + token) * stride_table
    if block < num_kv_blocks:
        head = (block * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)).to(tl.int64)
        is_head = head < num_kv_heads
        slot = tl.load(slot_mapping + token)  # int64, and so are the offsets made from it
        page = slot // page_size
        offset = slot % page_size
        k_rows = k + token * stride_k_token + head * stride_k_head
        v_rows = v + token * stride_v_token + head * stride_v_head
        k_slots = k_cache + page * stride_k_cache_page + offset * stride_k_cache_token + head * stride_k_cache_head
        v_slots = v_cache + page * stride_v_cache_page + offset * stride_v_cache_token + head * stride_v_cache_head
        if KV_FORMAT is None:
            rotate_rows(k_rows, k_slots, is_head, cos_sin, HEAD_DIM, BLOCK_D, ROTARY_DIM, BLOCK_PAIRS, IS_INTERLEAVED)
            copy_rows(v_rows, v_slots, is_head, 0, V_HEAD_DIM, BLOCK_DV)
        else:
            k_slot_scale = k_scale
            if k_scale is not None:
                k_slot_scale += page * stride_k_scale_page + offset * stride_k_scale_token + head * stride_k_scale_head
            v_slot_scale = v_scale
            if v_scale is not None:
                v_slot_scale += page * stride_v_scale_page + offset * stride_v_scale_token + head * stride_v_scale_head
            quantize_rows(
                k_rows, k_slots, is_head, k_slot_scale, k_scale_value, cos_sin, HEAD_DIM, BLOCK_D, ROTARY_DIM,
                IS_INTERLEAVED, KV_FORMAT, WRITES_K_SCALE,
            )  # fmt: skip
            quantize_rows(
                v_rows, v_slots, is_head, v_slot_scale, v_scale_value, cos_sin, V_HEAD_DIM, BLOCK_DV, 0,
                IS_INTERLEAVED, KV_FORMAT, WRITES_V_SCALE,
            )  # fmt: skip
    elif q is not None:
        head = ((block - num_kv_blocks) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)).to(tl.int64)
        rotate_rows(
            q + token * stride_q_token + head * stride_q_head,
            q_out + token * stride_q_out_token + head * stride_q_out_head,
            head < num_q_heads, cos_sin, HEAD_DIM, BLOCK_D, ROTARY_DIM, BLOCK_PAIRS, IS_INTERLEAVED,
        )  # fmt: skip


def append_kv(
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
    kv_format: str | None = None,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    q_out: Tensor | None = None,
) -> Tensor | None:
    """The rotated q (None without q); every row of k, rotated, and of v is stored in its slot, in one launch.

    Args: as for ``ops.append_kv``, checked there; all tensors on one device (the CPU under the interpreter).
        kv_format: int8, float8_e4m3fn, float8_e5m2 or int4, what the caches are quantised to; None for float.
        q_out: as q in shape and dtype, written and returned, q itself included; None allocates.
    """
    total_q, num_kv_heads, head_dim = k.shape
    if q is not None and q_out is None:
        q_out = q.new_empty(q.shape)
    if total_q == 0:
        return q_out
    num_q_heads = 0 if q is None else q.shape[1]
    rotary_dim = 0 if rope_cos_sin is None else rope_cos_sin.shape[1]
    block_heads = min(triton.next_power_of_2(max(num_kv_heads, num_q_heads)), MAX_BLOCK_HEADS)
    if kv_format is not None:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    k_scales, k_scale_value, k_scale_strides = _scale_arguments(k_scale)
    v_scales, v_scale_value, v_scale_strides = _scale_arguments(v_scale)
    grid = (total_q, triton.cdiv(num_kv_heads, block_heads) + triton.cdiv(num_q_heads, block_heads))
    with torch.cuda.device(k.device) if k.is_cuda else contextlib.nullcontext():
        launch(append_kv_kernel, grid)(
            k,
            v,
            k_cache,
            v_cache,
            k_scales,
            v_scales,
            slot_mapping,
            q,
            q_out,
            positions,
            rope_cos_sin,
            k_scale_value,
            v_scale_value,
            *k.stride()[:2],
            *v.stride()[:2],
            *k_cache.stride()[:3],
            *v_cache.stride()[:3],
            *k_scale_strides,
            *v_scale_strides,
            *((0, 0) if q is None else q.stride()[:2]),
            *((0, 0) if q_out is None else q_out.stride()[:2]),
            0 if rope_cos_sin is None else rope_cos_sin.stride(0),
            num_kv_heads,
            num_q_heads,
            k_cache.shape[1],
            HEAD_DIM=head_dim,
            V_HEAD_DIM=v.shape[2],
            BLOCK_D=triton.next_power_of_2(head_dim),
            BLOCK_DV=triton.next_power_of_2(v.shape[2]),
            ROTARY_DIM=rotary_dim,
            BLOCK_PAIRS=triton.next_power_of_2(max(rotary_dim // 2, 1)),
            BLOCK_HEADS=block_heads,
            IS_INTERLEAVED=interleaved,
            KV_FORMAT=kv_format,
            WRITES_K_SCALE=k_scales is not None and k_scales.dim() == 3,
            WRITES_V_SCALE=v_scales is not None and v_scales.dim() == 3,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return q_out


def _scale_arguments(scale: float | Tensor | None) -> tuple[Tensor | None, float, tuple[int, int, int]]:
    """(the tensor or None, the value for all, the strides of pages, tokens and heads)."""
    if not isinstance(scale, Tensor):
        return None, 1.0 if scale is None else float(scale), (0, 0, 0)
    if scale.dim() == 1:
        return scale, 1.0, (0, 0, scale.stride(0))
    return scale, 1.0, (scale.stride(0), scale.stride(1), scale.stride(2))
