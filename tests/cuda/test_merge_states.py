"""``merge_states(backend="cuda")`` on an emulated driver, against the float64 reference."""

from __future__ import annotations

import pytest
import torch

import mixattn
from mixattn.ops.reference import merge_states_reference
from tests.cuda.emulation import Emulation

DTYPES = [torch.bfloat16, torch.float16]


def make_states(dtype: torch.dtype, num_states: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """outs and lses of 11 tokens and 3 heads; row 5 has no state with keys, row 3 an empty one, whose out is NaN."""
    generator = torch.Generator().manual_seed(num_states)
    outs = torch.randn(num_states, 11, 3, head_dim, generator=generator).to(dtype)
    lses = 5 * torch.randn(num_states, 11, 3, generator=generator)
    lses[0, 3] = -torch.inf
    lses[:, 5] = -torch.inf
    outs[lses == -torch.inf] = torch.nan
    return outs, lses


def assert_close(outs: torch.Tensor, lses: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
    """One rounding to the dtype, and a few of float32 on weights and sums of values below 5."""
    true_out, true_lse = merge_states_reference(outs, lses, compute_dtype=torch.float64)
    allowed = 0.51 * torch.finfo(outs.dtype).eps * true_out.abs() + 16 * torch.finfo(torch.float32).eps * 5
    assert bool(((out.double() - true_out).abs() <= allowed).all())
    is_empty = true_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, is_empty) and bool((out[is_empty] == 0).all())
    torch.testing.assert_close(lse[~is_empty].double(), true_lse[~is_empty], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_states", [1, 2, 7])
@pytest.mark.parametrize("head_dim", [8, 40, 64, 256])
def test_merge_states_is_within_one_rounding(
    dtype: torch.dtype, num_states: int, head_dim: int, driver: Emulation
) -> None:
    outs, lses = make_states(dtype, num_states, head_dim)
    driver.configure(seed=num_states)
    out, lse = mixattn.merge_states(outs, lses, backend="cuda")
    assert driver.counts()["num_switches"] > 0, "something else has run it"
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_close(outs, lses, out, lse)


def test_merge_states_of_far_apart_lse_keeps_the_larger(driver: Emulation) -> None:
    outs = torch.stack([torch.full((1, 1, 8), 1.0), torch.full((1, 1, 8), 2.0)]).half()
    out, lse = mixattn.merge_states(outs, torch.tensor([[[-500.0]], [[500.0]]]), backend="cuda")
    assert bool((out == 2.0).all()) and float(lse) == 500.0


def test_merge_states_of_a_nan_shows_it(driver: Emulation) -> None:
    outs, lses = make_states(torch.bfloat16, 3, 64)
    lses[1, 0, 0] = torch.nan
    out, lse = mixattn.merge_states(outs, lses, backend="cuda")
    assert bool(out[0, 0].isnan().all()) and bool(lse[0, 0].isnan())
    assert not bool(out[0, 1:].isnan().any())


def test_merge_states_of_strided_views_gives_the_bits_of_contiguous(driver: Emulation) -> None:
    torch.manual_seed(0)
    outs = torch.randn(11, 4, 3, 128).half()[..., :64].transpose(0, 1)
    lses = torch.randn(11, 4, 6)[..., :3].transpose(0, 1)
    expected = mixattn.merge_states(outs.contiguous(), lses.contiguous(), backend="cuda")
    for result, truth in zip(mixattn.merge_states(outs, lses, backend="cuda"), expected, strict=True):
        assert torch.equal(result, truth)


def test_merge_states_of_no_rows_is_empty(driver: Emulation) -> None:
    out, lse = mixattn.merge_states(torch.empty(2, 0, 4, 64).half(), torch.empty(2, 0, 4), backend="cuda")
    assert out.shape == (0, 4, 64) and lse.shape == (0, 4)


def test_merge_states_that_no_kernel_takes_is_refused(driver: Emulation) -> None:
    outs, lses = make_states(torch.bfloat16, 2, 64)
    with pytest.raises(NotImplementedError, match=r"outs\.dtype float32 has no CUDA kernel; the nearest .* bfloat16"):
        mixattn.merge_states(outs.float(), lses, backend="cuda")
    odd = outs.new_empty(outs.numel() + 1)[1:].view(outs.shape).copy_(outs)
    with pytest.raises(NotImplementedError, match="outs at a byte 2 past a multiple of 16 has no CUDA kernel"):
        mixattn.merge_states(odd, lses, backend="cuda")


def test_merge_states_on_an_old_gpu_is_refused(driver: Emulation) -> None:
    outs, lses = make_states(torch.bfloat16, 2, 64)
    driver.configure(capability=75)
    with pytest.raises(NotImplementedError, match="backend='cuda' cannot run on cpu tensors"):
        mixattn.merge_states(outs, lses, backend="cuda")
