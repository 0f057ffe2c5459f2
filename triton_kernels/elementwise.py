# elementwise.py: what a decoder layer does between its matrix products.
# Math    rms_norm: y = x / sqrt(mean(x^2) + eps) * weight; with a residual: r <- x + r, then y of r
#         silu_mul: y = g / (1 + e^-g) * u
# Method  rms_norm: one program per row (a head of a token), over its elements twice: squares, then products; the second
#         time they are in a cache. silu_mul: one program per row and block. float32, rounded once
# Grid    rms_norm (num_rows * num_groups), silu_mul (num_rows, blocks of the row); 4 warps
# Shapes  x [num_rows, num_groups, size], weight [size], gate_up [num_rows, 2 size]; bf16, fp16 or fp32
# Memory  rms_norm reads x (and r) and writes y (and r) once; silu_mul reads 2 and writes 1
# Limits  any size and strides, the last dimension contiguous
# Twins   csrc/cpu/elementwise-inl.h; truth torch in float64
# Source  arXiv:1910.07467, equation 4; arXiv:2002.05202
"""``rms_norm``, with and without a residual, and ``silu_mul`` on GPUs."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixattn.triton_kernels._launch import launch
from mixattn.triton_kernels._numeric import narrow, widen

MAX_BLOCK = 4096
"""Elements of a row at once: 32 float32 for each of 128 threads."""


@triton.jit
def rms_norm_kernel(
    x,
    residual,
    weight,
    y,
    stride_x_row,
    stride_x_group,
    stride_residual_row,
    num_groups,
    size,
    eps,
    BLOCK: tl.constexpr,
):
    """One row. With a residual [num_rows, size], which becomes x + residual, rounded, y is that of the sum."""
    program = tl.program_id(0).to(tl.int64)
    row = program // num_groups
    source = x + row * stride_x_row + program % num_groups * stride_x_group
    if residual is not None:
        residual += row * stride_residual_row
    squares = tl.zeros([BLOCK], tl.float32)
    for begin in tl.range(0, size, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        is_column = column < size
        values = widen(tl.load(source + column, mask=is_column, other=0.0))
        if residual is not None:
            values += widen(tl.load(residual + column, mask=is_column, other=0.0))
            rounded = narrow(values, residual.dtype.element_ty)
            tl.store(residual + column, rounded, mask=is_column)
            values = widen(rounded)
        squares += values * values
    factor = 1.0 / tl.sqrt_rn(tl.sum(squares, 0) / size + eps)
    if residual is not None:
        source = residual  # each thread reads what it wrote itself
    for begin in tl.range(0, size, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        is_column = column < size
        values = widen(tl.load(source + column, mask=is_column, other=0.0)) * factor
        values *= widen(tl.load(weight + column, mask=is_column, other=0.0))
        tl.store(y + program * size + column, narrow(values, y.dtype.element_ty), mask=is_column)


@triton.jit
def silu_mul_kernel(gate_up, y, stride_gate_up_row, size, BLOCK: tl.constexpr):
    """One block of a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = column < size
    gates = gate_up + row * stride_gate_up_row + column
    gate = widen(tl.load(gates, mask=is_column, other=0.0))
    up = widen(tl.load(gates + size, mask=is_column, other=0.0))
    # e^-g = inf gives g / inf = -0, as it should be far to the left.
    silu = tl.math.div_rn(gate, 1.0 + tl.exp(-gate))
    tl.store(y + row * size + column, narrow(silu * up, y.dtype.element_ty), mask=is_column)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, as x in shape and dtype, contiguous.

    Args:
        x: [num_rows, size] or [num_rows, num_heads, size], the last dimension contiguous; weight: [size], contiguous.
        residual: [num_rows, size] in x's dtype, with an x of two dimensions: x is added to it, rounded, in place, and
            the sum is normalised instead of x.
    """
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel() == 0:
        return y
    size = x.shape[-1]
    num_groups = 1 if x.dim() == 2 else x.shape[1]
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        launch(rms_norm_kernel, (x.shape[0] * num_groups,))(
            x,
            residual,
            weight,
            y,
            x.stride(0),
            0 if x.dim() == 2 else x.stride(1),
            0 if residual is None else residual.stride(0),
            num_groups,
            size,
            eps,
            BLOCK=min(triton.next_power_of_2(size), MAX_BLOCK),
            num_warps=4,
        )
    return y


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of gate_up [num_rows, 2 * size], the last dimension contiguous: [num_rows, size]."""
    size = gate_up.shape[1] // 2
    y = gate_up.new_empty(gate_up.shape[0], size)
    if y.numel() == 0:
        return y
    block = min(triton.next_power_of_2(size), MAX_BLOCK // 4)
    with torch.cuda.device(gate_up.device) if gate_up.is_cuda else contextlib.nullcontext():
        launch(silu_mul_kernel, (gate_up.shape[0], triton.cdiv(size, block)))(
            gate_up, y, gate_up.stride(0), size, BLOCK=block, num_warps=4
        )
    return y
