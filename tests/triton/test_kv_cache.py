"""append_kv in Triton: every kind of rotation against the reference, strides, and slots that are not written."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixattn.ops.reference import append_kv_reference
from mixattn.triton_kernels.kv_cache import append_kv
from tests.triton.test_mixed_attention import strided

MAX_POSITIONS = 50
TOTAL_Q = 5
NUM_PAGES = 6


def table(rotary_dim: int) -> Tensor:
    angles = torch.outer(torch.arange(MAX_POSITIONS).float(), 0.7 ** torch.arange(rotary_dim // 2))
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def make(
    dtype: torch.dtype,
    num_kv_heads: int,
    num_q_heads: int,
    head_dim: int,
    page_size: int,
    v_head_dim: int | None = None,
) -> dict[str, Tensor]:
    """The tensors of a call; the caches hold NaN."""
    generator = torch.Generator().manual_seed(1)
    v_head_dim = head_dim if v_head_dim is None else v_head_dim
    pool = (NUM_PAGES, page_size, num_kv_heads)
    return {
        "k": torch.randn(TOTAL_Q, num_kv_heads, head_dim, generator=generator).to(dtype),
        "v": torch.randn(TOTAL_Q, num_kv_heads, v_head_dim, generator=generator).to(dtype),
        "k_cache": torch.full((*pool, head_dim), torch.nan, dtype=dtype),
        "v_cache": torch.full((*pool, v_head_dim), torch.nan, dtype=dtype),
        "slot_mapping": torch.randperm(NUM_PAGES * page_size, generator=generator)[:TOTAL_Q],
        "q": torch.randn(TOTAL_Q, num_q_heads, head_dim, generator=generator).to(dtype),
        "positions": torch.randint(MAX_POSITIONS, (TOTAL_Q,), generator=generator),
    }


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal but for one rounding of the dtype, NaN included."""
    eps = torch.finfo(expected.dtype).eps
    torch.testing.assert_close(actual.cpu(), expected, rtol=eps, atol=eps, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "interleaved"])
@pytest.mark.parametrize(
    ("num_kv_heads", "num_q_heads", "head_dim", "v_head_dim", "rotary_dim", "page_size"),
    [
        (2, 6, 16, 16, 16, 16), (1, 9, 40, 40, 12, 7), (9, 9, 24, 24, 24, 1), (2, 2, 192, 128, 64, 16),
        (2, 2, 16, 72, 16, 16),
    ],
    ids=["whole-page16-gqa3", "partial-page7-gqa9", "whole-page1-mha9", "partial-v128-of-192", "whole-v72-of-16"],
)  # fmt: skip
def test_append_kv_rotates_and_stores_like_the_reference(
    num_kv_heads: int,
    num_q_heads: int,
    head_dim: int,
    v_head_dim: int,
    rotary_dim: int,
    page_size: int,
    interleaved: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    tensors = make(dtype, num_kv_heads, num_q_heads, head_dim, page_size, v_head_dim)
    on_device = {name: tensor.to(device) for name, tensor in tensors.items()}
    cos_sin = table(rotary_dim)
    actual_q = append_kv(**on_device, rope_cos_sin=cos_sin.to(device), interleaved=interleaved)
    if dtype == torch.float32:
        # Where a * cos and b * sin nearly cancel, float32 of either order is off by more than one rounding.
        tensors = {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}
    expected_q = append_kv_reference(
        **tensors, rope_cos_sin=cos_sin.double(), interleaved=interleaved, compute_dtype=torch.float64
    )
    assert actual_q is not None and expected_q is not None
    assert_same(actual_q, expected_q.to(dtype))
    assert_same(on_device["k_cache"], tensors["k_cache"].to(dtype))
    assert_same(on_device["v_cache"], tensors["v_cache"].to(dtype))
    for name, size in (("k_cache", head_dim), ("v_cache", v_head_dim)):
        assert int(on_device[name].isnan().sum()) == (NUM_PAGES * page_size - TOTAL_Q) * num_kv_heads * size


def test_append_kv_without_rope_stores_the_same_bits(device: torch.device) -> None:
    tensors = {name: tensor.to(device) for name, tensor in make(torch.bfloat16, 3, 3, 24, 16).items()}
    del tensors["q"], tensors["positions"]
    assert append_kv(**tensors) is None
    slots = tensors["slot_mapping"]
    assert torch.equal(tensors["k_cache"].flatten(0, 1)[slots], tensors["k"])
    assert torch.equal(tensors["v_cache"].flatten(0, 1)[slots], tensors["v"])


def test_append_kv_any_strides_and_q_in_place_give_the_same_bits(device: torch.device) -> None:
    tensors = {name: tensor.to(device) for name, tensor in make(torch.float16, 2, 4, 16, 16).items()}
    cos_sin = table(16).to(device)
    views = {name: strided(tensor) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    wide_table = strided(cos_sin)
    assert not any(view.is_contiguous() for view in (views["k"], views["k_cache"], views["q"], wide_table))
    expected = append_kv(**tensors, rope_cos_sin=cos_sin)
    actual = append_kv(**views, rope_cos_sin=wide_table, q_out=views["q"])
    assert actual is views["q"] and expected is not None
    assert torch.equal(actual, expected)
    for name in ("k_cache", "v_cache"):
        assert torch.equal(views[name].nan_to_num(), tensors[name].nan_to_num())


def test_append_kv_no_rows_writes_nothing(device: torch.device) -> None:
    tensors = {name: tensor.to(device) for name, tensor in make(torch.float32, 2, 2, 16, 16).items()}
    for name in ("k", "v", "q", "slot_mapping", "positions"):
        tensors[name] = tensors[name][:0]
    q_out = append_kv(**tensors, rope_cos_sin=table(16).to(device))
    assert q_out is not None and q_out.shape == (0, 2, 16)
    assert tensors["k_cache"].isnan().all()
