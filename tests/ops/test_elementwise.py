"""rms_norm and silu_mul against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixattn.ops.elementwise import add_rms_norm, rms_norm, silu_mul

SIZES = [1, 3, 8, 31, 64, 576]


def assert_relative(y: Tensor, truth: Tensor, tolerance: float) -> None:
    assert y.shape == truth.shape and y.is_contiguous()
    assert bool(((y - truth).abs() <= tolerance * truth.abs() + 1e-37).all())


@pytest.mark.parametrize("size", SIZES)
def test_rms_norm_is_within_rounding_of_float64(size: int, isa: str) -> None:
    x, weight = 3 * torch.randn(5, size), torch.randn(size)
    truth = F.rms_norm(x.double(), (size,), weight.double(), 1e-5)
    # The mean of squares has no cancellation: (size + 2) u, halved by the root; then three roundings.
    assert_relative(rms_norm(x, weight, 1e-5), truth, (size / 2 + 5) * 2.0**-24)


def test_rms_norm_of_heads_in_a_wider_row_is_that_of_each_head(isa: str) -> None:
    rows, weight = torch.randn(7, 6, 40), torch.randn(40)
    heads = rows[:, 1:4]
    assert torch.equal(rms_norm(heads, weight, 1e-6), rms_norm(heads.reshape(21, 40), weight, 1e-6).view(7, 3, 40))


def test_rms_norm_of_nothing_and_of_zeros(isa: str) -> None:
    assert rms_norm(torch.zeros(0, 8), torch.ones(8), 1e-5).shape == (0, 8)
    assert torch.equal(rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-5), torch.zeros(2, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_add_rms_norm_is_rms_norm_of_the_sum_that_residual_becomes(dtype: torch.dtype) -> None:
    x, residual, weight = torch.randn(5, 40).to(dtype), torch.randn(5, 40).to(dtype), torch.randn(40).to(dtype)
    expected_sum = x + residual
    y = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, expected_sum) and torch.equal(y, rms_norm(expected_sum, weight, 1e-5))
    torch.library.opcheck(torch.ops.mixattn.add_rms_norm, (x, residual, weight, 1e-5))
    with pytest.raises(ValueError, match=r"residual must be .* as x is, got torch.float64"):
        add_rms_norm(x, residual.double(), weight, 1e-5)
    with pytest.raises(ValueError, match=r"must be \[num_rows, size\], got shapes \[5, 40\] and \[4, 40\]"):
        add_rms_norm(x, residual[:4], weight, 1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_silu_mul_is_within_rounding_of_float64(size: int, isa: str) -> None:
    gate_up = torch.randn(5, 2 * size)
    gate_up[:, :size] *= 20
    gate, up = gate_up.double().chunk(2, dim=-1)
    # e^-|g| carries u |g| from its argument and 1.2 ulp of its own; |g| <= 87 where the result is no subnormal.
    assert_relative(silu_mul(gate_up), F.silu(gate) * up, (2 * 87 + 10) * 2.0**-24)


def test_silu_mul_at_the_ends_of_float32(isa: str) -> None:
    gate = torch.tensor([[200.0, -200.0, 3e38, -3e38, 0.0, torch.nan, torch.inf]])
    y = silu_mul(torch.cat((gate, torch.ones_like(gate)), dim=-1))[0]
    assert y[0] == 200 and y[2] == torch.tensor(3e38) and y[6] == torch.inf
    assert bool((y[[1, 3, 4]] == 0).all()) and bool(y[5].isnan())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_are_torchs_own(dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 16).to(dtype), torch.randn(16).to(dtype)
    assert torch.equal(rms_norm(x, weight, 1e-5), F.rms_norm(x, (16,), weight, 1e-5))
    assert torch.equal(silu_mul(x), F.silu(x[:, :8]) * x[:, 8:])


def test_bad_input_names_the_bound() -> None:
    with pytest.raises(ValueError, match=r"x must be \[num_rows, size\] or .* got shape \[4\]"):
        rms_norm(torch.zeros(4), torch.zeros(4), 1e-5)
    with pytest.raises(ValueError, match=r"weight must be \[4\] and contiguous, got shape \[5\]"):
        rms_norm(torch.zeros(2, 4), torch.zeros(5), 1e-5)
    with pytest.raises(ValueError, match=r"weight must be torch\.float32 on cpu as x is, got torch\.float64"):
        rms_norm(torch.zeros(2, 4), torch.zeros(4, dtype=torch.float64), 1e-5)
    with pytest.raises(ValueError, match="the last dimension of x must be contiguous"):
        rms_norm(torch.zeros(4, 2).T, torch.zeros(4), 1e-5)
    with pytest.raises(ValueError, match=r"gate_up must be \[num_rows, 2 \* size\] with size >= 1, got shape \[2, 3\]"):
        silu_mul(torch.zeros(2, 3))


def test_elementwise_ops_pass_opcheck() -> None:
    torch.library.opcheck(torch.ops.mixattn.rms_norm.default, (torch.randn(3, 2, 8), torch.randn(8), 1e-5))
    torch.library.opcheck(torch.ops.mixattn.silu_mul.default, (torch.randn(3, 8),))
