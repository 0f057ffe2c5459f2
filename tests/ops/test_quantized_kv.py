"""Quantised K and V element by element: every stored code is read as its value, and every value stored as its code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mixattn
from mixattn import _C
from mixattn.config import RopeConfig
from mixattn.ops.kv_dtypes import MIN_ROW_SCALE, QUANTIZED
from mixattn.ops.plan import WorkPlan, cpu_hardware
from mixattn.ops.reference import append_kv_reference, dequantize_reference, quantize_reference
from mixattn.ops.rope import rope_cos_sin

DTYPES = list(QUANTIZED)
NUM_PAGES, PAGE_SIZE = 3, 16
BYTE_ISAS = ("amx", "avx512_bf16", "avx512_vnni")
"""Whose products of four bytes attention uses: for few rows, and but for amx for many (attention_bytes-inl.h)."""


def one_split(seq_len: int, num_q_heads: int, num_kv_heads: int, head_dim: int, v_head_dim: int) -> WorkPlan:
    """A plan whose one sequence of one row is not split."""
    return mixattn.plan(
        torch.tensor([0, 1]).int(), torch.tensor([seq_len]).int(), num_q_heads=num_q_heads, num_kv_heads=num_kv_heads,
        head_dim=head_dim, v_head_dim=v_head_dim, hardware=cpu_hardware(1),
    )  # fmt: skip


def name_of(value: object) -> str | None:
    return QUANTIZED[value].name if isinstance(value, torch.dtype) and value in QUANTIZED else None


def all_codes(dtype: torch.dtype, head_dim: int) -> Tensor:
    """One key's rows that hold all 256 bytes: [1, 1, num_kv_heads, head_dim] (int4: head_dim / 2)."""
    width = head_dim // 2 if dtype == torch.uint8 else head_dim
    return torch.arange(256, dtype=torch.int16).to(torch.uint8).view(dtype).reshape(1, 1, -1, width)


@pytest.mark.parametrize("head_dim", [8, 32, 64, 256])
@pytest.mark.parametrize("num_rows", [1, 3, 40], ids=["direct1", "direct4", "packed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_attention_over_one_key_returns_v_of_every_code_exactly(
    dtype: torch.dtype, num_rows: int, head_dim: int, isa: str
) -> None:
    """Subnormals and signed zeros included; a softmax over one key has weight 1.

    NaN and infinity come out as either: rows that fill up a block of keys have weight 0, and 0 * inf is NaN.
    """
    v_cache = all_codes(dtype, head_dim)
    num_kv_heads = v_cache.shape[2]
    out = mixattn.attention(
        torch.ones(1, num_rows * num_kv_heads, head_dim), torch.zeros_like(v_cache), v_cache,
        cu_seqlens_q=torch.tensor([0, 1], dtype=torch.int32), seq_lens=torch.tensor([1], dtype=torch.int32),
        block_table=torch.zeros(1, 1, dtype=torch.int32), k_scale=1.0, v_scale=0.5,
    )  # fmt: skip
    expected = dequantize_reference(v_cache, 0.5).view(1, num_kv_heads, head_dim).repeat_interleave(num_rows, dim=1)
    is_finite = expected.isfinite()
    assert torch.equal(out.isfinite(), is_finite) and bool(is_finite.all()) != dtype.is_floating_point
    assert torch.equal(out[is_finite], expected[is_finite])


@pytest.mark.parametrize("num_rows", [1, 40], ids=["direct", "packed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_attention_over_one_key_scores_every_code(dtype: torch.dtype, num_rows: int, isa: str) -> None:
    """lse over one key is its score, and a one-hot q picks one element of it."""
    head_dim = 64
    k_cache = all_codes(dtype, head_dim)
    if dtype.is_floating_point:  # 0 * NaN would be NaN, and so would 0 * inf
        k_cache = torch.where(k_cache.float().isfinite(), k_cache.float(), 0.0).to(dtype)
    num_kv_heads = k_cache.shape[2]
    q = torch.eye(head_dim).repeat_interleave(num_rows, dim=0)[:, None].expand(-1, num_kv_heads, -1)
    batch = {
        "cu_seqlens_q": torch.arange(0, len(q) + 1, num_rows, dtype=torch.int32),
        "seq_lens": torch.ones(head_dim, dtype=torch.int32),
        "block_table": torch.zeros(head_dim, 1, dtype=torch.int32),
        "causal": False,
    }
    _, lse = mixattn.attention(
        q, k_cache, torch.zeros_like(k_cache), **batch, softmax_scale=0.25, k_scale=2.0, v_scale=1.0, return_lse=True
    )
    values = dequantize_reference(k_cache, 0.5).view(num_kv_heads, head_dim)
    torch.testing.assert_close(lse, values.T.repeat_interleave(num_rows, dim=0), rtol=3e-7, atol=0)


def make_rows(dtype: torch.dtype, head_dim: int) -> Tensor:
    """[num_tokens, 2, head_dim] with what rounding, saturation and scales find hard."""
    generator = torch.Generator().manual_seed(5)
    rows = 3 * torch.randn(40, 2, head_dim, generator=generator)
    rows[0] = 0.0
    rows[1, 0, ::2] = -0.0
    rows[2] *= 1e-30
    rows[3] *= 1e-42  # subnormal in float32
    rows[4] *= 1e30
    rows[5] = torch.linspace(-9.0, 9.0, head_dim).mul(8).round() / 8  # ties, at scale 1
    rows[6] = torch.linspace(-1.0, 1.0, head_dim).mul(32).round() / 2**14  # around float8's subnormals
    rows[7, 0, 3] = torch.nan
    rows[8, 1, 0] = torch.inf
    rows[9, 1, 5] = -torch.inf
    rows[10] = torch.linspace(-500.0, 500.0, head_dim)  # past e4m3's largest
    return rows.to(dtype)


def make_scale(kind: str, num_heads: int) -> Any:
    if kind == "one":
        return 0.02
    return {
        "none": None,
        "unit": 1.0,
        "head": torch.tensor([0.02, 0.5, 1.0, 0.125])[:num_heads],
        "token": torch.full((NUM_PAGES, PAGE_SIZE, num_heads), 7.0),
    }[kind]


@pytest.mark.parametrize("kind", ["none", "unit", "one", "head", "token"])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [8, 40, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_append_kv_stores_the_bits_of_the_reference(
    dtype: torch.dtype, head_dim: int, x_dtype: torch.dtype, kind: str, isa: str
) -> None:
    """No product is fused on either side, so the rotation has one result too. What is not written stays."""
    if kind == "none" and QUANTIZED[dtype].needs_scale:
        kind = "unit"
    k, v = make_rows(x_dtype, head_dim), make_rows(x_dtype, head_dim).flip(0)
    generator = torch.Generator().manual_seed(6)
    width = head_dim // 2 if dtype == torch.uint8 else head_dim
    rotation = {
        "positions": torch.randint(0, 64, (len(k),), generator=generator),
        "rope_cos_sin": rope_cos_sin(RopeConfig(rotary_dim=8), 64),
    }
    results = []
    for append in (mixattn.append_kv, append_kv_reference):
        caches = [torch.full((NUM_PAGES, PAGE_SIZE, 2, width), 0x33, dtype=torch.uint8).view(dtype) for _ in "kv"]
        scales = {"k_scale": make_scale(kind, 2), "v_scale": make_scale(kind, 2)}
        slots = torch.randperm(NUM_PAGES * PAGE_SIZE, generator=torch.Generator().manual_seed(7))[: len(k)]
        append(k, v, *caches, slots, **rotation, **scales)
        results.append((*caches, *(scale for scale in scales.values() if isinstance(scale, Tensor))))
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours.view(torch.uint8), expected.view(torch.uint8)) or (
            ours.dtype == torch.float32 and torch.equal(ours.nan_to_num(9.0), expected.nan_to_num(9.0))
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_quantize_reference_of_a_row_is_within_half_a_step(dtype: torch.dtype) -> None:
    """The scale puts the row's largest on the largest code; the rest is off by half a step of its own."""
    x = torch.randn(50, 3, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stored, scales = quantize_reference(x, dtype)
    assert scales is not None
    real = dequantize_reference(stored, scales, compute_dtype=torch.float64)
    largest = x.abs().amax(dim=-1, keepdim=True)
    # Relative: half of the last mantissa bit; absolute: half of the smallest step, in units of the scale.
    relative, smallest = {
        torch.int8: (0.0, 1.0),
        torch.uint8: (0.0, 1.0),
        torch.float8_e4m3fn: (2.0**-4, 2.0**-9),
        torch.float8_e5m2: (2.0**-3, 2.0**-16),
    }[dtype]
    step = torch.maximum(relative * x.abs(), smallest / 2 * scales.double().unsqueeze(-1))
    assert bool(((real - x).abs() <= step + 1e-6 * largest).all())
    torch.testing.assert_close(real.abs().amax(dim=-1, keepdim=True), largest, rtol=1e-6, atol=0)


def test_row_scales_of_zeros_and_of_rows_that_are_not_finite() -> None:
    x = torch.zeros(4, 1, 8)
    x[1, 0, 2], x[2, 0, 3], x[3, 0, 4] = torch.nan, torch.inf, 1e-44
    _, scales = quantize_reference(x, torch.int8)
    assert scales is not None
    assert scales[0] == scales[3] == MIN_ROW_SCALE
    assert bool(scales[1:3].isnan().all())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_attention_over_a_row_that_was_not_finite_is_nan_for_every_row_that_sees_it(
    dtype: torch.dtype, poison: float, backend: str
) -> None:
    """Scales per token keep NaN, whatever the elements can hold; rows of earlier tokens do not see it."""
    k, v = torch.ones(20, 1, 8), torch.ones(20, 1, 8)
    v[12, 0, 5] = poison
    width = 4 if dtype == torch.uint8 else 8
    caches = [torch.zeros(2, 16, 1, width, dtype=dtype) for _ in "kv"]
    scales = {"k_scale": torch.zeros(2, 16, 1), "v_scale": torch.zeros(2, 16, 1)}
    mixattn.append_kv(k, v, *caches, torch.arange(20), **scales, backend=backend)
    batch = {"block_table": torch.tensor([[0, 1]] * 2, dtype=torch.int32), "causal": True}
    out = mixattn.attention(
        torch.ones(2, 1, 8), *caches, **batch, **scales, cu_seqlens_q=torch.tensor([0, 1, 2], dtype=torch.int32),
        seq_lens=torch.tensor([12, 13], dtype=torch.int32), backend=backend,
    )  # fmt: skip
    assert bool(out[0].isfinite().all()) and bool(out[1].isnan().all())


@pytest.mark.parametrize("num_q_heads", [1, 2, 4, 20])
@pytest.mark.parametrize("position", [0, 7, 29])
def test_scales_of_int8_values_that_are_negative_or_nan_come_out(num_q_heads: int, position: int, isa: str) -> None:
    """For 16-bit queries, whose products with int8 values may be of integers: a decode's, and those of more rows."""
    generator = torch.Generator().manual_seed(0)
    k_cache, v_cache = (torch.randint(-127, 128, (2, 16, 1, 64), generator=generator, dtype=torch.int8) for _ in "kv")
    q = torch.randn(1, num_q_heads, 64, generator=generator).bfloat16()
    k_scale = torch.full((2, 16, 1), 0.01)
    v_scale = -0.02 * torch.rand(2, 16, 1, generator=generator)
    v_scale[1] *= 0.01  # the largest magnitude is a negative one's
    batch = {
        "cu_seqlens_q": torch.tensor([0, 1]).int(), "seq_lens": torch.tensor([30]).int(),
        "block_table": torch.tensor([[0, 1]]).int(), "k_scale": k_scale,
    }  # fmt: skip
    out = mixattn.attention(q, k_cache, v_cache, **batch, v_scale=v_scale)
    exact = mixattn.attention(q, k_cache, v_cache, **batch, v_scale=v_scale, backend="reference")
    torch.testing.assert_close(out, exact, rtol=2**-7, atol=2**-9 * float(exact.abs().max()))
    v_scale[position // 16, position % 16] = torch.nan
    assert bool(mixattn.attention(q, k_cache, v_cache, **batch, v_scale=v_scale).isnan().all())


@pytest.mark.parametrize("options", [{}, {"window_left": 70}, {"soft_cap": 2.0}, {"causal": False}], ids=str)
@pytest.mark.parametrize("q_lens", [(1, 1, 1), (33, 7, 150)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 72, 256])
def test_queries_that_are_rounded_beside_int8_lose_little(
    head_dim: int, q_lens: tuple[int, ...], options: dict[str, Any], isa: str
) -> None:
    """Decodes and chunks, rows and scales of very different sizes. 2^-16 of a row's largest element came to 1.4e-4 of
    the largest value in the worst of these, 2^-8 to 3.1e-2, where float32 loses 3e-6."""
    generator = torch.Generator().manual_seed(head_dim)
    num_seqs, pages = len(q_lens), 13
    shape = (num_seqs * pages, 16, 2, head_dim)
    k_cache, v_cache = (torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8) for _ in "kv")
    k_scale, v_scale = (torch.rand(shape[:-1], generator=generator) * most for most in (0.02, 3.0))
    q = torch.randn(sum(q_lens), 6, head_dim, generator=generator)
    q *= torch.logspace(-2, 0.5, len(q))[:, None, None]
    batch = {
        "cu_seqlens_q": torch.tensor([0, *q_lens]).cumsum(0).int(), "seq_lens": torch.tensor([200, 130, 177]).int(),
        "block_table": torch.randperm(shape[0], generator=generator).view(num_seqs, pages).int(),
        "k_scale": k_scale, "v_scale": v_scale, **options,
    }  # fmt: skip
    out = mixattn.attention(q, k_cache, v_cache, **batch, rounds_q=True)
    exact = mixattn.attention(q, k_cache, v_cache, **batch, backend="reference")
    has_bytes = isa in BYTE_ISAS and head_dim % 64 == 0
    torch.testing.assert_close(out, exact, rtol=0, atol=(5e-2 if has_bytes else 2e-4) * float(exact.abs().max()))
    plain = mixattn.attention(q, k_cache, v_cache, **batch)
    has_pairs = isa.startswith(("avx", "amx")) and head_dim % 32 == 0
    assert torch.equal(out, plain) != has_pairs


def to_bytes(x: Tensor) -> Tensor:
    """Rows of x as multiples of 1/127 of their largest elements."""
    unit = x.abs().amax(dim=-1, keepdim=True) / 127
    return torch.where(unit > 0, (x / unit).round() * unit, x)


@pytest.mark.parametrize("num_rows", [2, 3, 4, 7, 16, 43])
@pytest.mark.parametrize(("head_dim", "v_head_dim"), [(64, 64), (128, 128), (192, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("seq_len", [1, 63, 200, 517])
@pytest.mark.parametrize("isa", [name for name in BYTE_ISAS if name in _C.cpu_info()["available"]], indirect=True)
def test_rows_beside_int8_multiply_bytes_as_they_are_rounded(
    seq_len: int, head_dim: int, v_head_dim: int, num_rows: int, isa: str
) -> None:
    """A twin in float64 that rounds q per row, and weights times scales per row and tile of keys: tight, where the
    distance to exact attention is loose."""
    if isa == "amx" and num_rows > 16:
        pytest.skip("many rows go by tiles of bfloat16 there")
    tile = 128 if num_rows > 16 and head_dim <= 128 else 64
    generator = torch.Generator().manual_seed(seq_len * head_dim + num_rows)
    pages, num_kv_heads = -(-seq_len // 16), 2
    caches = [
        torch.randint(-128, 128, (pages, 16, num_kv_heads, dim), generator=generator, dtype=torch.int8)
        for dim in (head_dim, v_head_dim)
    ]
    k_scale, v_scale = (torch.rand(pages, 16, num_kv_heads, generator=generator) * most for most in (0.02, 3.0))
    v_scale[0, 0] *= -1
    q = torch.randn(1, num_rows * num_kv_heads, head_dim, generator=generator)
    out = mixattn.attention(
        q, *caches, k_scale=k_scale, v_scale=v_scale, cu_seqlens_q=torch.tensor([0, 1]).int(),
        seq_lens=torch.tensor([seq_len]).int(), block_table=torch.arange(pages).view(1, -1).int(), rounds_q=True,
        plan=one_split(seq_len, num_rows * num_kv_heads, num_kv_heads, head_dim, v_head_dim),
    )  # fmt: skip
    rows = to_bytes(q.double()).view(num_kv_heads, num_rows, head_dim)
    k, v = (cache.flatten(0, 1)[:seq_len].double().transpose(0, 1) for cache in caches)
    scales = [scale.flatten(0, 1)[:seq_len].double().T[:, None] for scale in (k_scale, v_scale)]
    weights = (rows @ k.transpose(1, 2) * scales[0] * head_dim**-0.5).softmax(dim=-1)
    rounded = torch.cat([to_bytes(part) for part in (weights * scales[1]).split(tile, dim=-1)], dim=-1)
    expected = (rounded @ v).view(1, -1, v_head_dim).float()
    # A float32 now and then rounds to the other side of a half than a float64: one element of q is 4e-4 of the result.
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


def test_rows_of_bytes_keep_what_is_not_finite_to_themselves(isa: str) -> None:
    generator = torch.Generator().manual_seed(1)
    caches = [torch.randint(-127, 128, (4, 16, 1, 64), generator=generator, dtype=torch.int8) for _ in "kv"]
    scales = {name: torch.full((4, 16, 1), 0.01) for name in ("k_scale", "v_scale")}
    q = torch.randn(1, 4, 64, generator=generator)

    def attend() -> Tensor:
        return mixattn.attention(
            q, *caches, **scales, rounds_q=True, cu_seqlens_q=torch.tensor([0, 1]).int(),
            seq_lens=torch.tensor([60]).int(), block_table=torch.arange(4).view(1, 4).int(),
        )  # fmt: skip

    expected = attend()
    q[0, 1, 5], q[0, 3, 0] = torch.inf, torch.nan
    scales["v_scale"][3, 12:] = torch.nan  # keys that nobody sees
    out = attend()
    assert torch.equal(out[0, ::2], expected[0, ::2]) and bool(out[0, 1::2].isnan().all())
    scales["v_scale"][2, 3] = torch.nan
    assert bool(attend().isnan().all())


@pytest.mark.parametrize("rounds_q", [False, True])
def test_a_chunk_over_int8_is_invariant_and_keeps_non_finite_rows_to_themselves(rounds_q: bool, isa: str) -> None:
    """In 16 bits or 8, whose units are of a row and a tile of keys: neither other rows nor where a chunk ends may
    show."""
    generator = torch.Generator().manual_seed(1)
    caches = [torch.randint(-127, 128, (4, 16, 1, 64), generator=generator, dtype=torch.int8) for _ in "kv"]
    scales = {"k_scale": torch.full((4, 16, 1), 0.01), "v_scale": torch.rand(4, 16, 1, generator=generator)}
    q = torch.randn(40, 1, 64, generator=generator).bfloat16()

    def attend(begin: int, end: int, **options: bool) -> Tensor:
        return mixattn.attention(
            q[begin:end], *caches, **scales, **options, rounds_q=rounds_q,
            cu_seqlens_q=torch.tensor([0, end - begin]).int(), seq_lens=torch.tensor([20 + end]).int(),
            block_table=torch.arange(4).view(1, 4).int(),
        )  # fmt: skip

    parts = [attend(begin, end, invariant=True) for begin, end in ((0, 17), (17, 18), (18, 40))]
    assert torch.equal(torch.cat(parts), attend(0, 40, invariant=True))
    q[7, 0, 3], q[20, 0, 5] = torch.inf, torch.nan
    assert attend(0, 40).isnan().all(-1)[:, 0].nonzero()[:, 0].tolist() == [7, 20]


def test_attention_and_append_kv_with_scales_of_any_strides_give_the_bits_of_contiguous(isa: str) -> None:
    """Scales head-major, and K's and V's in one tensor."""
    k, v = (torch.randn(40, 2, 64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    q = torch.randn(20, 6, 64, generator=torch.Generator().manual_seed(3))
    both = torch.full((2, NUM_PAGES, 2, PAGE_SIZE), torch.nan)
    outs = []
    for k_scale, v_scale in (
        (torch.zeros(NUM_PAGES, PAGE_SIZE, 2), torch.zeros(NUM_PAGES, PAGE_SIZE, 2)),
        (both[0].transpose(1, 2), both[1].transpose(1, 2)),
    ):
        caches = [torch.zeros(NUM_PAGES, PAGE_SIZE, 2, 64, dtype=torch.int8) for _ in "kv"]
        mixattn.append_kv(k, v, *caches, torch.arange(40), k_scale=k_scale, v_scale=v_scale)
        outs.append(
            mixattn.attention(
                q, *caches, cu_seqlens_q=torch.tensor([0, 1, 20], dtype=torch.int32),
                seq_lens=torch.tensor([40, 30], dtype=torch.int32),
                block_table=torch.tensor([[0, 1, 2]] * 2, dtype=torch.int32), k_scale=k_scale, v_scale=v_scale,
            )
        )  # fmt: skip
    assert torch.equal(*outs)
