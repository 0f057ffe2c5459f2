"""Stored elements of a byte or less to float16 and back, as ops/reference.py dequantises and quantises them.

float16 holds every one of them exactly: int8 and int4 have at most 8 significant bits, float8_e5m2 is the upper byte of
a float16, and float8_e4m3fn has 4 significant bits between 2^-9 and 448. Tiles come as bytes; scales are the caller's.
A tile of int4 has its even elements before its odd ones (``element_dims``): a sum over head_dim does not mind, and
nothing has to be interleaved.

The assembly works on four bytes at once and is executed by tests/triton/ptx.py on every code, because the interpreter
runs the other branch.
Source: float8, arXiv:2209.05433; integers as the mantissa of 1024 + n, arXiv:2211.10017, section 3.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mixattn.triton_kernels._numeric import widen_parts

INT4_ZERO = tl.constexpr(8)
"""The nibble that stands for 0."""
MIN_ROW_SCALE = tl.constexpr(2.0**-126)
"""The least scale of a row, the smallest normal float32."""
MAX_ROW_EXPONENT = tl.constexpr(2.0**126)
"""The largest power of two whose inverse is normal."""

# A byte n behind 0x64 is the float16 1024 + n, from which the zero point is taken off with the 1024.
INT8_ASM = tl.constexpr(
    """{
    .reg .b32 offset, zero;
    xor.b32 offset, $2, 0x80808080;
    mov.b32 zero, 0x64806480;
    prmt.b32 $0, offset, 0x64646464, 0x4140;
    prmt.b32 $1, offset, 0x64646464, 0x4342;
    sub.f16x2 $0, $0, zero;
    sub.f16x2 $1, $1, zero;
    }"""
)
INT4_ASM = tl.constexpr(
    """{
    .reg .b32 nibbles, zero;
    mov.b32 zero, 0x64086408;
    and.b32 nibbles, $4, 0x0f0f0f0f;
    prmt.b32 $0, nibbles, 0x64646464, 0x4140;
    prmt.b32 $1, nibbles, 0x64646464, 0x4342;
    shr.b32 nibbles, $4, 4;
    and.b32 nibbles, nibbles, 0x0f0f0f0f;
    prmt.b32 $2, nibbles, 0x64646464, 0x4140;
    prmt.b32 $3, nibbles, 0x64646464, 0x4342;
    sub.f16x2 $0, $0, zero;
    sub.f16x2 $1, $1, zero;
    sub.f16x2 $2, $2, zero;
    sub.f16x2 $3, $3, zero;
    }"""
)
# Before sm_89, which has an instruction for it: as the bits of a float16 that is 2^-8 of it. Adding one in the last
# place reaches bit 14 from NaN's code alone, and there makes the exponent that of NaN.
E4M3_ASM = tl.constexpr(
    """{
    .reg .b32 low, high, magnitude, carry, scale;
    mov.b32 scale, 0x5c005c00;
    prmt.b32 low, $2, 0, 0x1404;
    prmt.b32 high, $2, 0, 0x3424;
    shr.b32 magnitude, low, 1;
    and.b32 magnitude, magnitude, 0x3f803f80;
    add.u32 carry, magnitude, 0x00800080;
    and.b32 carry, carry, 0x40004000;
    or.b32 magnitude, magnitude, carry;
    and.b32 low, low, 0x80008000;
    or.b32 low, low, magnitude;
    mul.f16x2 $0, low, scale;
    shr.b32 magnitude, high, 1;
    and.b32 magnitude, magnitude, 0x3f803f80;
    add.u32 carry, magnitude, 0x00800080;
    and.b32 carry, carry, 0x40004000;
    or.b32 magnitude, magnitude, carry;
    and.b32 high, high, 0x80008000;
    or.b32 high, high, magnitude;
    mul.f16x2 $1, high, scale;
    }"""
)


@triton.jit
def concat_columns(left, right):
    """[rows, 2 * columns]: the columns of left, then those of right."""
    joined = tl.permute(tl.join(left, right), (0, 2, 1))
    return tl.reshape(joined, [left.shape[0], 2 * left.shape[1]])


@triton.jit
def half_of_int8(codes, CAPABILITY: tl.constexpr):
    """float16 of bytes that hold int8."""
    if CAPABILITY > 0:
        values = tl.inline_asm_elementwise(INT8_ASM, "=r,=r,r", [codes], tl.float16, is_pure=True, pack=4)
    else:
        values = codes.to(tl.int8, bitcast=True).to(tl.float16)
    return values


@triton.jit
def halves_of_int4(codes, CAPABILITY: tl.constexpr):
    """(float16 of the low nibbles, of the high ones)."""
    if CAPABILITY > 0:
        low, high = tl.inline_asm_elementwise(
            INT4_ASM, "=r,=r,=r,=r,r", [codes], (tl.float16, tl.float16), is_pure=True, pack=4
        )
    else:
        low = ((codes & 15).to(tl.int8, bitcast=True) - INT4_ZERO).to(tl.float16)
        high = ((codes >> 4).to(tl.int8, bitcast=True) - INT4_ZERO).to(tl.float16)
    return low, high


@triton.jit
def half_of_e4m3(codes, CAPABILITY: tl.constexpr):
    """float16 of bytes that hold float8_e4m3fn."""
    if CAPABILITY >= 89:
        values = codes.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    elif CAPABILITY > 0:
        values = tl.inline_asm_elementwise(E4M3_ASM, "=r,=r,r", [codes], tl.float16, is_pure=True, pack=4)
    else:
        wide = codes.to(tl.uint16)
        magnitude = (wide & 0x7F) << 7
        magnitude = magnitude | ((magnitude + 0x80) & 0x4000)  # as in E4M3_ASM
        values = (magnitude | (wide & 0x80) << 8).to(tl.float16, bitcast=True) * tl.full([1, 1], 256.0, tl.float16)
    return values


@triton.jit
def half_of_e5m2(codes, CAPABILITY: tl.constexpr):
    """float16 of bytes that hold float8_e5m2."""
    if CAPABILITY > 0:
        values = codes.to(tl.float8e5, bitcast=True).to(tl.float16)
    else:
        values = (codes.to(tl.uint16) << 8).to(tl.float16, bitcast=True)
    return values


@triton.jit
def read_codes(codes, FORMAT: tl.constexpr, CAPABILITY: tl.constexpr):
    """[rows, elements] float16: what bytes [rows, bytes of a row] stand for; of int4 in the order of ``element_dims``.

    CAPABILITY is NVIDIA's, 90 for 9.0; with 0, the interpreter's, there is no assembly.
    """
    if FORMAT == "int4":
        low, high = halves_of_int4(codes, CAPABILITY)
        values = concat_columns(low, high)
    elif FORMAT == "int8":
        values = half_of_int8(codes, CAPABILITY)
    elif FORMAT == "float8_e4m3fn":
        values = half_of_e4m3(codes, CAPABILITY)
    else:
        tl.static_assert(FORMAT == "float8_e5m2")
        values = half_of_e5m2(codes, CAPABILITY)
    return values


@triton.jit
def pin_layout(x, CAPABILITY: tl.constexpr):
    """x, float16, computed in the layout that it was loaded in.

    Triton takes the change to the layout of a product's operand back through operations without side effects, up to the
    load: mma.sync would then have single bytes read out of shared memory. Not past this one: what is widened goes back
    to shared memory, 16 bits each, which ldmatrix reads and transposes. wgmma's operands go there anyway.
    """
    if CAPABILITY > 0:
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], tl.float16, is_pure=False, pack=2)
    return x


@triton.jit
def element_dims(BLOCK_D: tl.constexpr, FORMAT: tl.constexpr):
    """[BLOCK_D]: which dimension of a head each column of a tile holds."""
    dim = tl.arange(0, BLOCK_D)
    if FORMAT == "int4":
        HALF: tl.constexpr = BLOCK_D // 2
        dim = dim % HALF * 2 + dim // HALF
    return dim


@triton.jit
def fit_half(parts):
    """(a tuple of float16 [rows, columns], [rows] float32): parts of rows, and powers of two, whose products they are.

    A row's largest lands in [1, 4). What is more than 2^13 times smaller than it may lose bits, by 2^-25 of it.
    """
    wide = widen_parts(parts)
    largest = tl.max(tl.abs(wide[0]), 1)
    for part in tl.static_range(1, len(wide)):
        largest = tl.maximum(largest, tl.max(tl.abs(wide[part]), 1))
    largest = tl.minimum(tl.maximum(largest, MIN_ROW_SCALE), MAX_ROW_EXPONENT)
    exponent = largest.to(tl.int32, bitcast=True) & 0x7F800000
    inverse = ((254 << 23) - exponent).to(tl.float32, bitcast=True)[:, None]
    halves = ()
    for part in tl.static_range(len(wide)):
        halves += ((wide[part] * inverse).to(tl.float16),)
    return halves, exponent.to(tl.float32, bitcast=True)


@triton.jit
def round_to_int(x):
    """int32 of |x| < 2^22, to nearest even."""
    SHIFT: tl.constexpr = 1.5 * 2**23  # float32 has no bits below the one here, and a sum is rounded to nearest even
    shifted = x + SHIFT
    return shifted.to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def code_of_float8(x, MANTISSA_BITS: tl.constexpr, BIAS: tl.constexpr):
    """int32 codes of float32 x, saturated before, rounded to nearest even; NaN becomes 0x7f."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude_bits = bits & 0x7FFFFFFF
    DROPPED: tl.constexpr = 23 - MANTISSA_BITS
    rounded = magnitude_bits + ((1 << (DROPPED - 1)) - 1) + (magnitude_bits >> DROPPED & 1)
    normal = (rounded >> DROPPED) - ((127 - BIAS) << MANTISSA_BITS)
    # The step of the subnormals, and 2^23 of it: in that sum float32's last bit is one step.
    SHIFT: tl.constexpr = 2.0 ** (1 - BIAS - MANTISSA_BITS + 23)
    shifted = magnitude_bits.to(tl.float32, bitcast=True) + SHIFT
    subnormal = shifted.to(tl.int32, bitcast=True) & 0x7FFFFF
    code = tl.where(magnitude_bits < ((128 - BIAS) << 23), subnormal, normal) | (bits >> 24 & 0x80)
    return tl.where(magnitude_bits > 0x7F800000, 0x7F, code)


@triton.jit
def code_of(scaled, FORMAT: tl.constexpr):
    """int32 codes of float32 values in units of their scale: saturated, rounded to nearest even; of int4 nibbles."""
    if FORMAT == "float8_e4m3fn":
        code = code_of_float8(clamp(scaled, -448.0, 448.0), 3, 7)
    elif FORMAT == "float8_e5m2":
        code = code_of_float8(clamp(scaled, -57344.0, 57344.0), 2, 15)
    else:
        finite = tl.where(scaled == scaled, scaled, 0.0)  # integers have no NaN
        if FORMAT == "int8":
            code = round_to_int(clamp(finite, -128.0, 127.0))
        else:
            tl.static_assert(FORMAT == "int4")
            code = round_to_int(clamp(finite, -8.0, 7.0)) + INT4_ZERO
    return code


@triton.jit
def clamp(x, low, high):
    """x between the bounds; NaN stays."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def row_scales(largest, is_finite, FORMAT: tl.constexpr):
    """[rows] float32 scales that put the rows' largest magnitudes on the largest code; NaN where not is_finite."""
    if FORMAT == "int8":
        top = 127.0
    elif FORMAT == "int4":
        top = 7.0
    elif FORMAT == "float8_e4m3fn":
        top = 448.0
    else:
        top = 57344.0
    scale = tl.maximum(tl.math.div_rn(largest, tl.full(largest.shape, top, tl.float32)), MIN_ROW_SCALE)
    return tl.where(is_finite, scale, float("nan"))
