"""append_kv: every row lands in its slot, rotated as the reference rotates, and nothing else is touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mixattn
from mixattn.config import RopeConfig
from mixattn.ops.reference import append_kv_reference, rope_reference
from mixattn.ops.rope import rope_cos_sin

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["cpu", "reference"]
MAX_POSITIONS = 64


def make_inputs(
    dtype: torch.dtype,
    *,
    num_tokens: int = 13,
    head_dim: int = 64,
    page_size: int = 16,
    rotary_dim: int | None = None,
    v_head_dim: int | None = None,
) -> dict[str, Any]:
    """Tensors of one call; the caches hold NaN, so that a slot that should not be written shows when it is."""
    generator = torch.Generator().manual_seed(1)
    num_pages = 2 * -(-num_tokens // page_size) + 1
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    return {
        "k": torch.randn(num_tokens, 2, head_dim, generator=generator).to(dtype),
        "v": torch.randn(num_tokens, 2, v_head_dim or head_dim, generator=generator).to(dtype),
        "k_cache": torch.full((num_pages, page_size, 2, head_dim), torch.nan, dtype=dtype),
        "v_cache": torch.full((num_pages, page_size, 2, v_head_dim or head_dim), torch.nan, dtype=dtype),
        "slot_mapping": torch.randperm(num_pages * page_size, generator=generator)[:num_tokens],
        "q": torch.randn(num_tokens, 6, head_dim, generator=generator).to(dtype),
        "positions": torch.randint(0, MAX_POSITIONS, (num_tokens,), generator=generator),
        "rope_cos_sin": rope_cos_sin(RopeConfig(rotary_dim=rotary_dim), MAX_POSITIONS),
    }


def clone(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}


def assert_one_rounding(result: Tensor, truth: Tensor) -> None:
    """``result`` is ``truth`` (float64) computed in float32 and rounded once; NaN where it has NaN."""
    assert torch.equal(result.isnan(), truth.isnan())
    eps = torch.finfo(result.dtype).eps
    error = (result.double() - truth).nan_to_num().abs()
    # Half an eps from the rounding; 4 float32 eps of the operands (below 8) from products and their sum.
    assert bool((error <= 0.51 * eps * truth.nan_to_num().abs() + 32 * torch.finfo(torch.float32).eps).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"num_tokens": 1},
        {"num_tokens": 200, "page_size": 7},
        {"head_dim": 8, "page_size": 1},
        {"head_dim": 40, "rotary_dim": 24},
        {"head_dim": 96, "rotary_dim": 2},
        {"head_dim": 256, "rotary_dim": 64},
        {"head_dim": 192, "v_head_dim": 128, "rotary_dim": 64},
        {"head_dim": 24, "v_head_dim": 136, "page_size": 7},
    ],
    ids=str,
)
def test_append_kv_with_rope_matches_reference(
    backend: str, dtype: torch.dtype, interleaved: bool, shape: dict[str, int]
) -> None:
    inputs = make_inputs(dtype, **shape)
    truth = clone(inputs)
    for cache in ("k_cache", "v_cache"):
        truth[cache] = truth[cache].double()
    true_q = append_kv_reference(**truth, interleaved=interleaved, compute_dtype=torch.float64)
    q_before = inputs["q"].clone()
    q = mixattn.append_kv(**inputs, interleaved=interleaved, backend=backend)
    assert q is not None and true_q is not None
    assert torch.equal(inputs["q"], q_before)
    assert_one_rounding(q, true_q)
    assert_one_rounding(inputs["k_cache"], truth["k_cache"])
    assert torch.equal(inputs["v_cache"].nan_to_num(7.0).double(), truth["v_cache"].nan_to_num(7.0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_append_kv_without_rope_stores_every_bit(backend: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(dtype)
    for name in ("q", "positions", "rope_cos_sin"):
        inputs.pop(name)
    truth = clone(inputs)
    append_kv_reference(**truth)
    assert mixattn.append_kv(**inputs, backend=backend) is None
    for name in ("k_cache", "v_cache"):
        assert torch.equal(inputs[name].nan_to_num(7.0), truth[name].nan_to_num(7.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_append_kv_without_q_rotates_k(backend: str) -> None:
    inputs = make_inputs(torch.float32)
    del inputs["q"]
    assert mixattn.append_kv(**inputs, backend=backend) is None
    slots = inputs["slot_mapping"]
    stored = inputs["k_cache"].flatten(0, 1)[slots]
    expected = rope_reference(inputs["k"], inputs["positions"], inputs["rope_cos_sin"])
    torch.testing.assert_close(stored, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_append_kv_of_no_rows_writes_nothing(backend: str) -> None:
    inputs = make_inputs(torch.float32, num_tokens=0)
    q = mixattn.append_kv(**inputs, backend=backend)
    assert q is not None and q.shape == (0, 6, 64)
    assert bool(inputs["k_cache"].isnan().all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_append_kv_of_strided_views_matches_contiguous(backend: str, dtype: torch.dtype) -> None:
    """k, q and v as views of one fused projection, caches as halves of one pool, pages head-major."""
    plain = make_inputs(dtype)
    fused = torch.cat((plain["q"], plain["k"], plain["v"]), dim=1)
    pool = torch.full((plain["k_cache"].shape[0], 2, 2, 16, 64), torch.nan, dtype=dtype)
    views = {
        **plain,
        "q": fused[:, :6],
        "k": fused[:, 6:8],
        "v": fused[:, 8:],
        "k_cache": pool[:, 0].transpose(1, 2),
        "v_cache": pool[:, 1].transpose(1, 2),
    }
    q = mixattn.append_kv(**plain, backend=backend)
    q_of_views = mixattn.append_kv(**views, backend=backend)
    assert q is not None and q_of_views is not None
    assert torch.equal(q, q_of_views)
    for name in ("k_cache", "v_cache"):
        assert torch.equal(plain[name].nan_to_num(7.0), views[name].nan_to_num(7.0))


def test_rope_cos_sin_follows_its_formula() -> None:
    factors = tuple(1.0 + i for i in range(8))
    table = rope_cos_sin(
        RopeConfig(theta=500.0, rotary_dim=16, frequency_factors=factors, attention_factor=1.5), MAX_POSITIONS
    )
    assert table.shape == (MAX_POSITIONS, 16) and table.dtype == torch.float32
    pair = torch.arange(8, dtype=torch.float64)
    angles = torch.arange(MAX_POSITIONS).double()[:, None] * 500.0 ** (-2 * pair / 16) / torch.tensor(factors).double()
    expected = 1.5 * torch.cat((angles.cos(), angles.sin()), dim=-1)
    torch.testing.assert_close(table.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("config", "max_positions", "message"),
    [
        (RopeConfig(rotary_dim=0), 8, "rotary_dim must be > 0"),
        (RopeConfig(rotary_dim=8), 0, "max_positions must be >= 1, got 0"),
        (RopeConfig(rotary_dim=8, frequency_factors=(1.0,)), 8, r"one divisor per rotated pair \(4\), got 1"),
    ],
)
def test_rope_cos_sin_of_bad_config_names_the_bound(config: RopeConfig, max_positions: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rope_cos_sin(config, max_positions)
