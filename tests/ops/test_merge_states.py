"""merge_states: the result over the union of key sets, from the results over each."""

from __future__ import annotations

import pytest
import torch

import mixattn
from mixattn.ops.reference import attention_reference, merge_states_reference
from tests.cases import AttentionCase, make_inputs

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_states", [1, 2, 7])
@pytest.mark.parametrize("head_dim", [8, 40, 64, 256])
def test_merge_states_matches_reference(dtype: torch.dtype, num_states: int, head_dim: int) -> None:
    torch.manual_seed(0)
    outs = torch.randn(num_states, 11, 3, head_dim).to(dtype)
    lses = 5 * torch.randn(num_states, 11, 3)
    lses[0, 3] = -torch.inf
    lses[:, 5] = -torch.inf
    outs[:, 5] = torch.nan  # of an empty state, not to be read
    outs[0, 3] = torch.nan
    true_out, true_lse = merge_states_reference(outs, lses, compute_dtype=torch.float64)
    out, lse = mixattn.merge_states(outs, lses)
    assert out.dtype == dtype and lse.dtype == torch.float32
    # One rounding to dtype, and a few of float32 on weights and sums of values below 5.
    allowed = 0.51 * torch.finfo(dtype).eps * true_out.abs() + 16 * torch.finfo(torch.float32).eps * 5
    assert bool(((out.double() - true_out).abs() <= allowed).all())
    is_empty = true_lse == -torch.inf
    assert bool(is_empty[5].all()) and bool((out[5] == 0).all())
    assert torch.equal(lse == -torch.inf, is_empty)
    torch.testing.assert_close(lse[~is_empty].double(), true_lse[~is_empty], rtol=1e-6, atol=1e-6)


def test_merge_states_of_far_apart_lse_keeps_the_larger() -> None:
    outs = torch.stack([torch.full((1, 1, 8), 1.0), torch.full((1, 1, 8), 2.0)])
    out, lse = mixattn.merge_states(outs, torch.tensor([[[-500.0]], [[500.0]]]))
    assert bool((out == 2.0).all()) and float(lse) == 500.0


def test_merge_states_of_strided_views_matches_contiguous() -> None:
    torch.manual_seed(0)
    outs = torch.randn(11, 4, 3, 128)[..., :64].transpose(0, 1)
    lses = torch.randn(11, 4, 6)[..., :3].transpose(0, 1)
    expected = mixattn.merge_states(outs.contiguous(), lses.contiguous())
    for result, truth in zip(mixattn.merge_states(outs, lses), expected, strict=True):
        assert torch.equal(result, truth)


def test_merge_states_of_no_rows_is_empty() -> None:
    out, lse = mixattn.merge_states(torch.empty(2, 0, 4, 64), torch.empty(2, 0, 4))
    assert out.shape == (0, 4, 64) and lse.shape == (0, 4)


def test_merge_states_of_attention_over_two_ranges_is_attention_over_both() -> None:
    """A row's keys in two calls of attention, the second one's states merged with the first's."""
    both = AttentionCase("both", (1, 1), (48, 48), causal=False)
    inputs = make_inputs(both, torch.float32)
    arguments = (inputs.q, inputs.k_cache, inputs.v_cache)
    parts = [
        mixattn.attention(
            *arguments, cu_seqlens_q=inputs.cu_seqlens_q, seq_lens=torch.full((2,), kv_len, dtype=torch.int32),
            block_table=table.contiguous(), causal=False, return_lse=True,
        )
        for table, kv_len in ((inputs.block_table[:, :1], 16), (inputs.block_table[:, 1:], 32))
    ]  # fmt: skip
    out, lse = mixattn.merge_states(torch.stack([p[0] for p in parts]), torch.stack([p[1] for p in parts]))
    true_out, true_lse = attention_reference(*arguments, **inputs.index_tensors, causal=False)
    torch.testing.assert_close(out, true_out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, true_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("outs", "lses", "error", "message"),
    [
        (torch.zeros(2, 3, 8), torch.zeros(2, 3), ValueError, r"outs must be \[num_states, total_q, .* got shape"),
        (torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 5), ValueError, "lses .* with num_q_heads 5, but outs has .* 4"),
        (torch.zeros(0, 3, 4, 8), torch.zeros(0, 3, 4), ValueError, "at least 1 state"),
        (torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 4).double(), ValueError, "lses must be torch.float32, got .*64"),
        (torch.zeros(2, 3, 4, 8).double(), torch.zeros(2, 3, 4), NotImplementedError, "outs is torch.float64"),
        (torch.zeros(2, 3, 4, 12), torch.zeros(2, 3, 4), NotImplementedError, "head_dim 12 .* the nearest is 16"),
        (torch.zeros(2, 3, 4, 16)[..., ::2], torch.zeros(2, 3, 4), ValueError, r"last dimension of outs .* got 2"),
        (torch.zeros(2, 3, 4, 8, device="meta"), torch.zeros(2, 3, 4), ValueError, "lses must be on outs's device"),
        ([torch.zeros(2, 3, 4, 8)], torch.zeros(2, 3, 4), TypeError, "outs must be a torch.Tensor, got list"),
    ],
)
def test_merge_states_of_bad_input_names_argument_and_bound(
    outs: torch.Tensor, lses: torch.Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        mixattn.merge_states(outs, lses)
