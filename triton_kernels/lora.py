# lora.py: low-rank additions of many adapters to the rows of a mixed batch; SGMV.
# Math    y_i += scaling[l] (x_i a[l]^T) b[l]^T, l the adapter of row i's slice; slices without one are left as they are
# Method  shrink: h = x a^T in float32; expand: y += scaling h b^T. A tile holds rows of one slice, so that chunks and
#         decodes go in one launch each; a program finds its slice by bisection over cu_seqlens_q
# Grid    row tiles (at most total_q / 16 + num_seqs, whatever the lengths) x blocks of rank or of out_size; 4 warps
# Shapes  x [total_q, in_size], y [total_q, out_size], a [num_adapters, rank, in_size], b [num_adapters, out_size, rank]
#         of one dtype: bf16, fp16 or fp32; h [total_q, rank] fp32
# Memory  a tile of 16 rows reads rank in_size elements of a, or out_size rank of b
# Limits  any sizes; contiguous a, b and h, the last dimension of x and y contiguous
# Twins   ops/reference.py (lora_reference)
# Source  SGMV, Punica, arXiv:2310.18547, section 4
"""Adding adapters' low-rank products to the output of a linear map; ``add_lora`` on GPUs."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixattn.triton_kernels._launch import launch
from mixattn.triton_kernels._numeric import dot, narrow, widen

BLOCK_M = 16
"""Rows of a tile, those of an mma.sync: decodes have one."""
MAX_BLOCK_RANK = 64
BLOCK_OUT = 64
BLOCK_IN = 64


@triton.jit
def find_slice(cu_seqlens_q, num_seqs, tile, BLOCK_M: tl.constexpr):
    """The slice that tile falls to: the last s with cu_seqlens_q[s] // BLOCK_M + s <= tile.

    A slice that begins at row c has its first tile at c // BLOCK_M + s, and no more tiles than up to the next one's.
    """
    low = tile * 0
    high = num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(cu_seqlens_q + middle) // BLOCK_M + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def shrink_kernel(
    x, a, cu_seqlens_q, adapter_ids, h, stride_x_row, num_seqs, in_size, rank,
    BLOCK_M: tl.constexpr, BLOCK_RANK: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """h = x a^T for one tile of rows and one block of the rank."""
    seq_idx = find_slice(cu_seqlens_q, num_seqs, tl.program_id(0), BLOCK_M)
    slice_begin = tl.load(cu_seqlens_q + seq_idx)
    slice_end = tl.load(cu_seqlens_q + seq_idx + 1)
    row = slice_begin + (tl.program_id(0) - slice_begin // BLOCK_M - seq_idx) * BLOCK_M + tl.arange(0, BLOCK_M)
    adapter = tl.load(adapter_ids + seq_idx).to(tl.int64)
    if (adapter >= 0) & (tl.min(row, 0) < slice_end):
        is_row = (row < slice_end)[:, None]
        r = tl.program_id(1) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
        total = tl.zeros([BLOCK_M, BLOCK_RANK], tl.float32)
        for begin in tl.range(0, in_size, BLOCK_IN):
            i = begin + tl.arange(0, BLOCK_IN)
            is_in = (i < in_size)[None, :]
            rows = tl.load(x + row.to(tl.int64)[:, None] * stride_x_row + i[None, :], mask=is_row & is_in, other=0.0)
            weights = tl.load(
                a + (adapter * rank + r)[:, None] * in_size + i[None, :], mask=(r < rank)[:, None] & is_in, other=0.0
            )
            total = dot(rows, tl.trans(weights), total)  # (BLOCK_M, BLOCK_RANK)
        tl.store(h + row.to(tl.int64)[:, None] * rank + r[None, :], total, mask=is_row & (r < rank)[None, :])


@triton.jit
def expand_kernel(
    h, b, scalings, cu_seqlens_q, adapter_ids, y, stride_y_row, num_seqs, out_size, rank,
    BLOCK_M: tl.constexpr, BLOCK_RANK: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """y += scaling h b^T for one tile of rows and one block of columns."""
    seq_idx = find_slice(cu_seqlens_q, num_seqs, tl.program_id(0), BLOCK_M)
    slice_begin = tl.load(cu_seqlens_q + seq_idx)
    slice_end = tl.load(cu_seqlens_q + seq_idx + 1)
    row = slice_begin + (tl.program_id(0) - slice_begin // BLOCK_M - seq_idx) * BLOCK_M + tl.arange(0, BLOCK_M)
    adapter = tl.load(adapter_ids + seq_idx).to(tl.int64)
    if (adapter >= 0) & (tl.min(row, 0) < slice_end):
        is_row = (row < slice_end)[:, None]
        column = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        total = tl.zeros([BLOCK_M, BLOCK_OUT], tl.float32)
        for begin in tl.range(0, rank, BLOCK_RANK):
            r = begin + tl.arange(0, BLOCK_RANK)
            is_rank = (r < rank)[None, :]
            rows = tl.load(h + row.to(tl.int64)[:, None] * rank + r[None, :], mask=is_row & is_rank, other=0.0)
            weights = tl.load(
                b + (adapter * out_size + column)[:, None] * rank + r[None, :],
                mask=(column < out_size)[:, None] & is_rank,
                other=0.0,
            )
            # h stays in float32: rounded to the dtype of b it would cost as much as a rounding of y.
            total = dot(rows, tl.trans(widen(weights)), total)  # (BLOCK_M, BLOCK_OUT)
        target = y + row.to(tl.int64)[:, None] * stride_y_row + column[None, :]
        is_value = is_row & (column < out_size)[None, :]
        total = total * tl.load(scalings + adapter) + widen(tl.load(target, mask=is_value, other=0.0))
        tl.store(target, narrow(total, y.dtype.element_ty), mask=is_value)


def add_lora(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scalings: Tensor, cu_seqlens_q: Tensor, adapter_ids: Tensor
) -> None:
    """Adds to each row of y the low-rank product of its slice's adapter with the row of x.

    Args:
        y: [total_q, out_size], written; x: [total_q, in_size]; a: [num_adapters, rank, in_size] and
            b: [num_adapters, out_size, rank], contiguous; of one float dtype.
        scalings: [num_adapters] float32.
        cu_seqlens_q: [num_seqs + 1] int32; adapter_ids: [num_seqs] int32, below 0 where the slice has no adapter.
    """
    total_q, num_seqs = x.shape[0], adapter_ids.shape[0]
    if total_q == 0:
        return
    _, rank, in_size = a.shape
    out_size = b.shape[1]
    h = torch.empty(total_q, rank, dtype=torch.float32, device=x.device)
    block_rank = min(max(triton.next_power_of_2(rank), 16), MAX_BLOCK_RANK)
    num_tiles = total_q // BLOCK_M + num_seqs
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        launch(shrink_kernel, (num_tiles, triton.cdiv(rank, block_rank)))(
            x, a, cu_seqlens_q, adapter_ids, h, x.stride(0), num_seqs, in_size, rank,
            BLOCK_M=BLOCK_M, BLOCK_RANK=block_rank, BLOCK_IN=BLOCK_IN, num_warps=4,
        )  # fmt: skip
        launch(expand_kernel, (num_tiles, triton.cdiv(out_size, BLOCK_OUT)))(
            h, b, scalings, cu_seqlens_q, adapter_ids, y, y.stride(0), num_seqs, out_size, rank,
            BLOCK_M=BLOCK_M, BLOCK_RANK=block_rank, BLOCK_OUT=BLOCK_OUT, num_warps=4,
        )  # fmt: skip
