"""Linear maps over packed weights: float64 products of the very values that are stored, for every form and ISA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from mixattn import _C, env
from mixattn.ops.elementwise import silu_mul
from mixattn.ops.linear import (
    QUANTISED_FORMS,
    WEIGHT_FORMS,
    PackedWeight,
    gated_linear,
    linear,
    pack_weight,
    weight_rows,
)

# Depths of a quantised matrix are multiples of 32; 288 is more than one piece of a widened panel (192 or 256), and 1120
# more than one that int8 inputs pass over (640).
SHAPES = [(1, 32), (7, 64), (16, 288), (33, 96), (100, 576), (40, 1120)]
ODD_SHAPES = [(1, 1), (5, 3), (17, 31), (31, 259)]
NUM_ROWS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 13, 97]


def stored_matrix(form: str, num_cols: int, depth: int) -> tuple[Tensor, Tensor]:
    """The rows of a random matrix as a checkpoint of this form has them, and its values in float64."""
    values = torch.randn(num_cols, depth, generator=torch.Generator().manual_seed(num_cols * depth))
    if form not in QUANTISED_FORMS:
        rows = values.to(getattr(torch, form))
        return rows, rows.double()
    kind = gguf.GGMLQuantizationType[form.upper()]
    blocks = gguf.quantize(values.numpy(), kind)
    return torch.from_numpy(blocks), torch.from_numpy(gguf.dequantize(blocks, kind)).double()


def packed_matrix(form: str, num_cols: int, depth: int, isa: str) -> tuple[PackedWeight, Tensor]:
    rows, values = stored_matrix(form, num_cols, depth)
    return pack_weight(rows, form, depth, isa=isa), values


def assert_within_rounding(y: Tensor, x: Tensor, values: Tensor, added: Tensor | float = 0.0) -> None:
    """|y - truth| <= (depth + 3) u (|x| |W| + |added|), u = 2^-24: the bound of a float32 sum in any order.

    Source: Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition, equation 3.5.
    """
    truth = x.double() @ values.T + added
    magnitude = x.double().abs() @ values.abs().T + (added.abs() if isinstance(added, Tensor) else added)
    assert y.shape == truth.shape and y.dtype == torch.float32
    assert bool(((y - truth).abs() <= (x.shape[1] + 3) * 2.0**-24 * magnitude).all())


@pytest.mark.parametrize("form", WEIGHT_FORMS)
def test_linear_of_every_form_is_within_float32_rounding(form: str, isa: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for num_cols, depth in SHAPES + ([] if form in QUANTISED_FORMS else ODD_SHAPES):
        weight, values = packed_matrix(form, num_cols, depth, isa)
        for num_rows in NUM_ROWS:
            x = torch.randn(num_rows, depth, generator=generator)
            assert_within_rounding(linear(x, weight), x, values)


@pytest.mark.parametrize("num_cols", [5, 64])
@pytest.mark.parametrize("num_rows", [1, 9])
def test_linear_adds_bias_and_residual(num_cols: int, num_rows: int, isa: str) -> None:
    weight, values = packed_matrix("bfloat16", num_cols, 40, isa)
    x, bias = torch.randn(num_rows, 40), torch.randn(num_cols)
    residual = torch.randn(num_rows, 2 * num_cols)[:, num_cols:]
    assert_within_rounding(linear(x, weight, bias), x, values, bias.double().expand(num_rows, -1))
    assert_within_rounding(linear(x, weight, None, residual), x, values, residual.double())
    assert_within_rounding(linear(x, weight, bias, residual), x, values, residual.double() + bias.double())


@pytest.mark.parametrize("num_rows", [3, 10])
def test_linear_of_strided_rows_gives_the_bits_of_contiguous(num_rows: int, isa: str) -> None:
    weight, _ = packed_matrix("q4_1", 48, 64, isa)
    wide = torch.randn(num_rows, 100)
    assert torch.equal(linear(wide[:, 20:84], weight), linear(wide[:, 20:84].contiguous(), weight))


@pytest.mark.parametrize(
    ("form", "rounds_x"), [*((form, False) for form in WEIGHT_FORMS), *((form, True) for form in QUANTISED_FORMS)]
)
def test_gated_linear_has_the_bits_of_silu_mul_of_linear(form: str, rounds_x: bool, isa: str) -> None:
    panel_cols = _C.panel_cols(isa)
    for num_cols in (2 * panel_cols, 14 * panel_cols, panel_cols, 6):  # of the last two a panel has gates and others
        rows, _ = stored_matrix(form, num_cols, 288)
        weight = pack_weight(rows, form, 288, rounds_x=rounds_x, isa=isa)
        bias = torch.randn(num_cols, generator=torch.Generator().manual_seed(num_cols))
        for num_rows in NUM_ROWS:
            x = torch.randn(num_rows, 288, generator=torch.Generator().manual_seed(num_rows))
            for added in (None, bias):
                assert torch.equal(gated_linear(x, weight, added), silu_mul(linear(x, weight, added)))


def test_gated_linear_of_bad_input_names_the_bound(isa: str) -> None:
    for num_cols in (2 * _C.panel_cols(isa), 6):
        weight, _ = packed_matrix("float32", num_cols, 32, isa)
        with pytest.raises(ValueError, match=rf"bias must have the shape \[{num_cols}\], got \[5\]"):
            gated_linear(torch.zeros(2, 32), weight, torch.zeros(5))
    odd, _ = packed_matrix("float32", 5, 32, isa)
    with pytest.raises(ValueError, match="weight must have as many gates as columns that they are for, got 5 in all"):
        gated_linear(torch.zeros(2, 32), odd)


@pytest.mark.parametrize("form", WEIGHT_FORMS)
def test_linear_of_rows_that_are_not_finite_stays_in_these_rows(form: str, isa: str) -> None:
    weight, values = packed_matrix(form, 33, 64, isa)
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    x[3, 5], x[7, 9], x[11, 2], x[11, 3] = torch.inf, torch.nan, torch.inf, torch.nan
    x[20] = 0
    y = linear(x, weight)
    kept = torch.tensor([row for row in range(40) if row not in (3, 7, 11)])
    assert_within_rounding(y[kept], x[kept], values)
    assert torch.equal(y[20], torch.zeros(33))
    assert bool(y[[7, 11]].isnan().all())
    assert not bool(y[3].isfinite().any())  # parts of a weight, or its block's d and m, may differ in sign: NaN


def test_linear_of_the_smallest_and_largest_rows_is_within_float32_rounding(isa: str) -> None:
    """Of products by bfloat16 parts the third is 2^-16 of x, and counts as 0 below 2^-126; 3e38 fits in the first."""
    weight, values = packed_matrix("bfloat16", 40, 64, isa)
    for scale in (2.0**-100, 1e36):
        x = scale * torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
        assert_within_rounding(linear(x, weight), x, values)


@pytest.mark.parametrize("run", [linear, gated_linear])
def test_linear_on_several_threads_gives_the_bits_of_one(
    run: Callable[..., Tensor], isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, _ = packed_matrix("q8_0", 26 * _C.panel_cols(isa), 64, isa)
    results = []
    for num_threads in (1, 3):
        monkeypatch.setattr(env, "num_threads", lambda n=num_threads: n)
        results.append([run(torch.ones(num_rows, 64), weight) for num_rows in (1, 200)])
    for one, several in zip(*results, strict=True):
        assert torch.equal(one, several)


def test_linear_lets_nan_and_infinity_through(isa: str) -> None:
    weight, _ = packed_matrix("q4_0", 20, 32, isa)
    x = torch.ones(8, 32)
    x[1, 3], x[2, 4] = torch.nan, torch.inf
    y = linear(x, weight)
    assert bool(y[1].isnan().all()) and not bool(y[2].isfinite().any())
    assert bool(y[[0, 3, 4, 5, 6, 7]].isfinite().all())


@pytest.mark.parametrize("form", WEIGHT_FORMS)
def test_weight_rows_are_the_stored_values_exactly(form: str, isa: str) -> None:
    weight, values = packed_matrix(form, 37, 96, isa)
    ids = torch.tensor([36, 0, 5, 5, 16])
    assert torch.equal(weight_rows(weight, ids).double(), values[ids])
    assert weight_rows(weight, ids[:0]).shape == (0, 96)


@pytest.mark.parametrize("form", QUANTISED_FORMS)
def test_quantised_forms_cover_every_quant(form: str, isa: str) -> None:
    """Blocks of all bytes, not only of those that a quantiser makes: -128, and every pair of nibbles."""
    num_bytes = _C.weight_row_bytes(form, 32)
    blocks = np.zeros((16, num_bytes), np.uint8)
    num_scales = 4 if form == "q4_1" else 2
    blocks[:, :num_scales] = np.frombuffer(np.array([0.37, -1.5][: num_scales // 2], np.float16).tobytes(), np.uint8)
    num_quants = num_bytes - num_scales
    blocks[:, num_scales:] = np.arange(16 * num_quants).reshape(16, -1) % 256
    weight = pack_weight(torch.from_numpy(blocks), form, 32, isa=isa)
    expected = gguf.dequantize(blocks, gguf.GGMLQuantizationType[form.upper()])
    assert torch.equal(weight_rows(weight, torch.arange(16)), torch.from_numpy(expected))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "q2_k"}, "form must be one of float32, bfloat16, float16, q8_0, q4_0, q4_1, got 'q2_k'"),
        ({"depth": 33}, r"depth must be a positive multiple of 32 in q8_0, got 33"),
        ({"rows": torch.zeros(4, 33, dtype=torch.uint8)}, r"rows must be \[num_cols >= 1, 34\] for q8_0 of depth 32"),
        ({"rows": torch.zeros(0, 34, dtype=torch.uint8)}, r"got \[0, 34\]"),
        ({"rows": torch.zeros(4, 34)}, "rows must be torch.uint8, got torch.float32"),
        ({"rows": torch.zeros(34, 4, dtype=torch.uint8).T}, "rows must be contiguous"),
        ({"isa": "altivec"}, "isa must be one that this CPU runs"),
    ],
)
def test_pack_weight_of_bad_input_names_the_bound(changes: dict[str, Any], message: str) -> None:
    arguments = {"rows": torch.zeros(4, 34, dtype=torch.uint8), "form": "q8_0", "depth": 32, **changes}
    with pytest.raises(ValueError, match=message):
        pack_weight(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(32),), r"x must be \[num_rows, depth\], got shape \[32\]"),
        ((torch.zeros(2, 32, dtype=torch.float64),), "x must be torch.float32, got torch.float64"),
        ((torch.zeros(2, 64),), r"panels must be \d+ contiguous bytes on the CPU for 4 columns of depth 64"),
        ((torch.zeros(32, 2).T,), "the last dimension of x must be contiguous"),
        ((torch.zeros(2, 32), torch.zeros(5)), r"bias must have the shape \[4\], got \[5\]"),
        ((torch.zeros(2, 32), None, torch.zeros(3, 4)), r"residual must have the shape \[2, 4\], got \[3, 4\]"),
    ],
)
def test_linear_of_bad_input_names_the_bound(arguments: tuple[Any, ...], message: str) -> None:
    weight, _ = packed_matrix("float32", 4, 32, _C.cpu_info()["isa"])
    x, *rest = arguments
    with pytest.raises(ValueError, match=message):
        linear(x, weight, *rest)


@pytest.mark.parametrize("bad_id", [-1, 4])
def test_weight_rows_of_an_id_out_of_bounds_names_it(bad_id: int) -> None:
    weight, _ = packed_matrix("float32", 4, 8, _C.cpu_info()["isa"])
    with pytest.raises(ValueError, match=rf"ids\[1\] must be in \[0, 3\], got {bad_id}"):
        weight_rows(weight, torch.tensor([0, bad_id]))


@pytest.mark.parametrize("num_cols", [6, 128])
def test_gated_linear_compiles_without_a_graph_break(num_cols: int) -> None:
    weight, _ = packed_matrix("q4_1", num_cols, 64, _C.cpu_info()["isa"])
    x = torch.randn(3, 64)
    compiled = torch.compile(lambda x: gated_linear(x, weight), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), gated_linear(x, weight))


def test_linear_ops_pass_opcheck() -> None:
    weight, _ = packed_matrix("q4_1", 20, 64, _C.cpu_info()["isa"])
    common = (weight.panels, weight.form, weight.num_cols)
    for rest in ((None, None), (torch.randn(20), torch.randn(3, 20))):
        torch.library.opcheck(torch.ops.mixattn.linear.default, (torch.randn(3, 64), *common, weight.isa, False, *rest))
    gated, _ = packed_matrix("q4_1", 2 * _C.panel_cols(weight.isa), 64, weight.isa)
    gated_arguments = (torch.randn(3, 64), gated.panels, gated.form, gated.num_cols, gated.isa, False)
    for bias in (None, torch.randn(gated.num_cols)):
        torch.library.opcheck(torch.ops.mixattn.gated_linear.default, (*gated_arguments, bias))
    ids = torch.tensor([3, 19])
    torch.library.opcheck(torch.ops.mixattn.weight_rows.default, (*common, weight.depth, weight.isa, ids))


def rounded(x: Tensor) -> Tensor:
    """x with each 32 neighbours rounded to multiples of their largest / 127, by the kernel's own float32 formula."""
    blocks = x.unflatten(-1, (-1, 32))
    scale = blocks.abs().amax(dim=-1, keepdim=True) / 127
    return (scale.double() * (blocks * (1 / scale)).round().double()).flatten(-2)


@pytest.mark.parametrize("form", QUANTISED_FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_with_rounded_inputs_is_that_of_the_inputs_rounded_to_int8(
    shape: tuple[int, int], form: str, isa: str
) -> None:
    num_cols, depth = shape
    rows, values = stored_matrix(form, num_cols, depth)
    weight = pack_weight(rows, form, depth, rounds_x=True, isa=isa)
    for num_rows in NUM_ROWS:
        x = torch.randn(num_rows, depth, generator=torch.Generator().manual_seed(num_rows))
        x *= torch.logspace(-3, 3, depth // 32).repeat_interleave(32)  # each block needs its own scale
        y = linear(x, weight)
        assert_within_rounding(y, rounded(x), values)
        assert num_rows == 0 or not torch.equal(y, linear(x, pack_weight(rows, form, depth, isa=isa)))


@pytest.mark.parametrize("form", QUANTISED_FORMS)
def test_linear_with_rounded_inputs_by_amx_has_the_bits_of_avx512(form: str) -> None:
    """Sums of products are exact and all else is the same: it does not show which rows went by tiles."""
    isas = ("amx", "avx512_bf16")
    missing = [isa for isa in isas if isa not in _C.cpu_info()["available"]]
    if missing:
        pytest.skip(f"this CPU has no {' and no '.join(missing)}")
    depth = 1056  # three pieces of unpacked blocks
    rows, _ = stored_matrix(form, 70, depth)
    weights = [pack_weight(rows, form, depth, rounds_x=True, isa=isa) for isa in isas]
    for num_rows in (15, 16, 17, 33, 97):
        x = torch.randn(num_rows, depth, generator=torch.Generator().manual_seed(num_rows))
        assert torch.equal(*(linear(x, weight) for weight in weights))


def test_linear_with_rounded_inputs_adds_bias_and_residual_and_keeps_zeros_and_non_finite_rows(isa: str) -> None:
    rows, _ = stored_matrix("q4_1", 33, 96)
    weight = pack_weight(rows, "q4_1", 96, rounds_x=True, isa=isa)
    bias, residual = torch.randn(33), torch.randn(4, 33)
    x = torch.zeros(4, 96)
    x[1, 40], x[2, 50] = torch.inf, torch.nan
    x[3, 3] = 1e-42  # its block's scale is subnormal: the block counts as zeros
    y = linear(x, weight, bias, residual)
    assert torch.equal(y[0], bias + residual[0]) and torch.equal(y[3], bias + residual[3])
    assert bool(y[1:3].isnan().all())


def test_linear_with_rounded_inputs_sums_the_largest_products_without_overflow(isa: str) -> None:
    blocks = np.zeros((3, 34 * 4), np.uint8).reshape(3, 4, 34)
    blocks[..., :2] = np.array([1.0], np.float16).view(np.uint8)
    blocks[0, :, 2:], blocks[1, :, 2:], blocks[2, :, 2:] = 0x80, 0x7F, 0xFF  # -128, 127, -1
    weight = pack_weight(torch.from_numpy(blocks.reshape(3, -1)), "q8_0", 128, rounds_x=True, isa=isa)
    for sign in (1.0, -1.0):
        y = linear(torch.full((7, 128), 127.0 * sign), weight)
        assert torch.equal(y, sign * torch.tensor([-128.0, 127.0, -1.0]).mul(128 * 127).expand(7, 3))


@pytest.mark.parametrize(("form", "smallest", "largest"), [("q4_0", -8, 7), ("q4_1", 0, 15)])
def test_linear_with_rounded_inputs_sums_the_largest_products_of_nibbles_without_overflow(
    form: str, smallest: int, largest: int, isa: str
) -> None:
    header = 2 if form == "q4_0" else 4
    blocks = np.zeros((2, 4, header + 16), np.uint8)
    blocks[..., :2] = np.array([1.0], np.float16).view(np.uint8)
    blocks[1, :, header:] = 0xFF
    weight = pack_weight(torch.from_numpy(blocks.reshape(2, -1)), form, 128, rounds_x=True, isa=isa)
    for sign in (1.0, -1.0):
        y = linear(torch.full((7, 128), 127.0 * sign), weight)
        assert torch.equal(y, sign * torch.tensor([float(smallest), float(largest)]).mul(128 * 127).expand(7, 2))


def test_pack_weight_refuses_rounded_inputs_of_a_plain_form() -> None:
    with pytest.raises(ValueError, match="rounds_x must be False for bfloat16"):
        pack_weight(torch.zeros(4, 32, dtype=torch.bfloat16), "bfloat16", 32, rounds_x=True)
