"""Products and roundings that mean the same compiled and interpreted.

Triton 3.9's interpreter keeps bfloat16 as its 16 bits: it multiplies them as integers in ``tl.dot`` and truncates where
hardware rounds to nearest even. Compiled, each function here is the one Triton operation that its docstring names.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mixattn import env

IS_INTERPRETED = tl.constexpr(env.triton_interpret())
"""Whether TRITON_INTERPRET=1 was set before this module was imported, as it must be before the kernels are."""


@triton.jit
def widen(x):
    """``x.to(tl.float32)``."""
    if IS_INTERPRETED and x.dtype == tl.bfloat16:
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        wide = bits.to(tl.float32, bitcast=True)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def widen_parts(parts):
    """A tuple: ``widen`` of each tile of a tuple."""
    wide = ()
    for part in tl.static_range(len(parts)):
        wide += (widen(parts[part]),)
    return wide


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """``x.to(dtype)`` of a float32 x, rounded to nearest even."""
    if IS_INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        rounded = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        rounded = x.to(dtype)
    return rounded


@triton.jit
def dot(a, b, accumulator):
    """``tl.dot``: accumulator + a @ b, float32. A float32 product is three of tf32, which loses its last bits only."""
    if IS_INTERPRETED:
        a = widen(a)
        b = widen(b)
    return tl.dot(a, b, accumulator, input_precision="tf32x3")
