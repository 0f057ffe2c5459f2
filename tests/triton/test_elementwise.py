"""rms_norm and silu_mul in Triton against float64: one rounding to the dtype, strides, and the ends of float32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixattn.triton_kernels.elementwise import rms_norm, silu_mul
from tests.triton.test_mixed_attention import strided

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 31, 576, 5000]


def assert_rounded_once(y: Tensor, truth: Tensor, tolerance: float) -> None:
    """Within half a unit in the last place of the dtype, and what float32 may lose before."""
    half_ulp = torch.finfo(y.dtype).eps / 2 if y.dtype != torch.float32 else 0.0
    smallest = torch.finfo(y.dtype).smallest_normal * torch.finfo(y.dtype).eps
    assert y.shape == truth.shape and y.is_contiguous()
    assert bool(((y.cpu().double() - truth).abs() <= (half_ulp + tolerance) * truth.abs() + smallest).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_rms_norm_is_within_rounding_of_float64(size: int, dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(size)
    x, weight = 3 * torch.randn(3, size, generator=generator), torch.randn(size, generator=generator)
    x, weight = x.to(dtype), weight.to(dtype)
    truth = F.rms_norm(x.double(), (size,), weight.double(), 1e-5)
    assert_rounded_once(rms_norm(x.to(device), weight.to(device), 1e-5), truth, (min(size, 64) / 2 + 8) * 2.0**-24)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [31, 5000])
def test_rms_norm_with_residual_is_that_of_the_rounded_sum(size: int, dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(size)
    x, residual, weight = (torch.randn(n, size, generator=generator).to(dtype).to(device) for n in (3, 3, 1))
    expected_sum = x + residual
    expected = rms_norm(expected_sum, weight[0], 1e-6)
    wide = strided(residual)
    assert torch.equal(rms_norm(strided(x), weight[0], 1e-6, wide), expected)
    assert torch.equal(wide, expected_sum)


def test_rms_norm_of_heads_in_a_wider_row_is_that_of_each_head(device: torch.device) -> None:
    rows, weight = torch.randn(4, 6, 40, device=device), torch.randn(40, device=device)
    heads = rows[:, 1:4]
    assert torch.equal(rms_norm(heads, weight, 1e-6), rms_norm(heads.reshape(12, 40), weight, 1e-6).view(4, 3, 40))


def test_elementwise_of_nothing_and_of_zeros(device: torch.device) -> None:
    ones = torch.ones(8, device=device)
    assert rms_norm(torch.zeros(0, 8, device=device), ones, 1e-5).shape == (0, 8)
    assert torch.equal(rms_norm(torch.zeros(2, 8, device=device), ones, 1e-5).cpu(), torch.zeros(2, 8))
    assert silu_mul(torch.zeros(0, 8, device=device)).shape == (0, 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_silu_mul_is_within_rounding_of_float64(size: int, dtype: torch.dtype, device: torch.device) -> None:
    gate_up = torch.randn(3, 2 * size, generator=torch.Generator().manual_seed(size))
    gate_up[:, :size] *= 5
    gate_up = gate_up.to(dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    y = silu_mul(strided(gate_up.to(device)))
    # e^-|g| carries u |g| from its argument and 2 ulp of its own.
    assert_rounded_once(y, F.silu(gate) * up, (2 * float(gate.abs().max()) + 10) * 2.0**-24)


def test_silu_mul_at_the_ends_of_float32(device: torch.device) -> None:
    gate = torch.tensor([[200.0, -200.0, 3e38, -3e38, 0.0, torch.nan, torch.inf]], device=device)
    y = silu_mul(torch.cat((gate, torch.ones_like(gate)), dim=-1))[0].cpu()
    assert y[0] == 200 and y[2] == torch.tensor(3e38) and y[6] == torch.inf
    assert bool((y[[1, 3, 4]] == 0).all()) and bool(y[5].isnan())
