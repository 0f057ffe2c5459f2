"""merge_states in Triton against the float64 reference, empty states and strides included."""

from __future__ import annotations

import pytest
import torch

from mixattn.ops.reference import merge_states_reference
from mixattn.triton_kernels.merge_states import merge_states
from tests.triton.test_mixed_attention import strided


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("num_states", "total_q", "num_heads", "head_dim"),
    [(1, 3, 2, 16), (2, 4, 9, 40), (7, 2, 3, 64)],
    ids=["one", "two-heads9-dim40", "seven"],
)
def test_merge_states_equals_the_reference(
    num_states: int, total_q: int, num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(2)
    outs = torch.randn(num_states, total_q, num_heads, head_dim, generator=generator).to(dtype)
    lses = torch.randn(num_states, total_q, num_heads, generator=generator) * 10
    lses[0, 0] = -torch.inf
    lses[:, 1, 0] = -torch.inf
    outs[lses == -torch.inf] = torch.nan
    out = torch.full(outs.shape[1:], torch.nan, dtype=dtype, device=device)
    lse = torch.full(lses.shape[1:], torch.nan, device=device)
    merge_states(outs.to(device), lses.to(device), out, lse)
    true_out, true_lse = merge_states_reference(outs, lses, compute_dtype=torch.float64)
    eps = torch.finfo(dtype).eps
    # One rounding to the dtype, and in float32 that of the weights: exp2 of a difference of about 20 / ln 2.
    torch.testing.assert_close(out.cpu().double(), true_out, rtol=eps, atol=16 * torch.finfo(torch.float32).eps)
    torch.testing.assert_close(lse.cpu().double(), true_lse, rtol=4e-7, atol=1e-6)
    assert bool((out[1, 0] == 0).all()) and float(lse[1, 0]) == -torch.inf


def test_merge_states_any_strides_give_the_same_bits(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(3)
    outs = torch.randn(3, 4, 2, 16, generator=generator).to(device)
    lses = torch.randn(3, 4, 2, generator=generator).to(device)
    results = []
    for is_strided in (False, True):
        inputs = [strided(tensor) if is_strided else tensor for tensor in (outs, lses)]
        outputs = [torch.empty_like(outs[0]), torch.empty_like(lses[0])]
        outputs = [strided(tensor) if is_strided else tensor for tensor in outputs]
        assert all(tensor.is_contiguous() != is_strided for tensor in (*inputs, *outputs))
        merge_states(*inputs, *outputs)
        results.append(outputs)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
