# kv_cache.py: this step's K (rotated) and V into their pages, and Q rotated, in one launch.
# Math    (a, b) -> (a cos - b sin, b cos + a sin) for each pair (a, b) of the leading rotary_dim dimensions of a head
# Method  one program per token and block of heads: the first blocks take K and V, the rest Q; float32, rounded once
# Grid    (total_q, blocks of kv heads + blocks of q heads), 4 warps; 8 heads of 128 dimensions are 16 bytes a thread
# Shapes  k, v [total_q, num_kv_heads, head_dim], q [total_q, num_q_heads, head_dim], caches [num_pages, page_size, ...]
# Memory  reads and writes each element once; no shared memory; cos and sin of a token once per block of heads
# Limits  any head_dim, page_size and strides, the last dimension contiguous; bf16, fp16, fp32
# Twins   csrc/cpu/kv_cache.cpp; truth ops/reference.py (append_kv_reference, rope_reference)
# Source  arXiv:2104.09864, equation 34
"""Storing keys and values in their pages with RoPE on the way; ``append_kv`` on GPUs."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixattn.triton_kernels._numeric import narrow, widen

MAX_BLOCK_HEADS = 8


@triton.jit
def copy_rows(source, target, is_head, FROM_DIM: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Copies the dimensions [FROM_DIM, HEAD_DIM) of the heads at source to those at target, pointers [BLOCK_HEADS]."""
    dim = tl.arange(0, BLOCK_D)
    is_value = is_head[:, None] & ((dim >= FROM_DIM) & (dim < HEAD_DIM))[None, :]
    tl.store(target[:, None] + dim[None, :], tl.load(source[:, None] + dim[None, :], mask=is_value), mask=is_value)


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
def append_kv_kernel(
    k,
    v,
    k_cache,
    v_cache,
    slot_mapping,
    q,
    q_out,
    positions,
    rope_cos_sin,
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
    stride_q_token,
    stride_q_head,
    stride_q_out_token,
    stride_q_out_head,
    stride_table,
    num_kv_heads,
    num_q_heads,
    page_size,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
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
        rotate_rows(
            k + token * stride_k_token + head * stride_k_head,
            k_cache + page * stride_k_cache_page + offset * stride_k_cache_token + head * stride_k_cache_head,
            is_head, cos_sin, HEAD_DIM, BLOCK_D, ROTARY_DIM, BLOCK_PAIRS, IS_INTERLEAVED,
        )  # fmt: skip
        copy_rows(
            v + token * stride_v_token + head * stride_v_head,
            v_cache + page * stride_v_cache_page + offset * stride_v_cache_token + head * stride_v_cache_head,
            is_head, 0, HEAD_DIM, BLOCK_D,
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
    q_out: Tensor | None = None,
) -> Tensor | None:
    """The rotated q (None without q); every row of k, rotated, and of v is stored in its slot, in one launch.

    Args: as for ``ops.append_kv``, checked there; all tensors on one device (the CPU under the interpreter).
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
    grid = (total_q, triton.cdiv(num_kv_heads, block_heads) + triton.cdiv(num_q_heads, block_heads))
    with torch.cuda.device(k.device) if k.is_cuda else contextlib.nullcontext():
        append_kv_kernel[grid](
            k,
            v,
            k_cache,
            v_cache,
            slot_mapping,
            q,
            q_out,
            positions,
            rope_cos_sin,
            *k.stride()[:2],
            *v.stride()[:2],
            *k_cache.stride()[:3],
            *v_cache.stride()[:3],
            *((0, 0) if q is None else q.stride()[:2]),
            *((0, 0) if q_out is None else q_out.stride()[:2]),
            0 if rope_cos_sin is None else rope_cos_sin.stride(0),
            num_kv_heads,
            num_q_heads,
            k_cache.shape[1],
            HEAD_DIM=head_dim,
            BLOCK_D=triton.next_power_of_2(head_dim),
            ROTARY_DIM=rotary_dim,
            BLOCK_PAIRS=triton.next_power_of_2(max(rotary_dim // 2, 1)),
            BLOCK_HEADS=block_heads,
            IS_INTERLEAVED=interleaved,
            num_warps=4,
        )
    return q_out
