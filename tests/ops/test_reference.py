"""The truth itself, against torch's own attention and against formulas written another way."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mixattn.ops.reference import (
    append_kv_reference,
    attention_reference,
    merge_states_reference,
    rope_reference,
    visible_keys,
)
from mixattn.ops.tree_mask import tree_mask
from tests.cases import CASES, SCORE_CASES, AttentionCase, make_inputs


def sdpa(case: AttentionCase) -> tuple[Tensor, Tensor]:
    """torch's attention over the case's sequences in float64, K and V gathered token by token."""
    inputs = make_inputs(case, torch.float64)
    outs, begin = [], 0
    for seq_idx, (q_len, kv_len) in enumerate(zip(case.q_lens, case.kv_lens, strict=True)):
        slots = [(int(inputs.block_table[seq_idx, t // case.page_size]), t % case.page_size) for t in range(kv_len)]
        k, v = (
            torch.stack([cache[slot] for slot in slots]).nan_to_num().transpose(0, 1)
            for cache in (inputs.k_cache, inputs.v_cache)
        )
        positions = torch.arange(q_len)[:, None] + kv_len - q_len
        keys = torch.arange(kv_len)[None]
        mask = torch.ones(q_len, kv_len, dtype=torch.bool)
        if case.causal:
            mask &= keys <= positions
        if case.window_left is not None:
            mask &= positions - keys <= case.window_left
        if case.tree_mask is not None:
            for row, key in itertools.product(range(q_len), range(max(kv_len - q_len, 0), kv_len)):
                distance = kv_len - q_len + row - key
                if 0 <= distance < 64:
                    mask[row, key] &= bool(case.tree_mask[begin + row] >> distance & 1)
        bias = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
        if inputs.alibi_slopes is not None:
            slopes = inputs.alibi_slopes if case.alibi == "per-head" else inputs.alibi_slopes[seq_idx]
            bias = bias - slopes.double()[:, None, None] * (positions - keys).abs()
        q = inputs.q[begin : begin + q_len].transpose(0, 1)
        outs.append(
            F.scaled_dot_product_attention(
                q[None], k[None], v[None], attn_mask=bias, scale=case.softmax_scale, enable_gqa=True
            )[0].transpose(0, 1)
        )
        begin += q_len
    truth, _ = attention_reference(
        inputs.q, inputs.k_cache, inputs.v_cache, **inputs.index_tensors, **inputs.score_tensors, **case.options,
        compute_dtype=torch.float64,
    )  # fmt: skip
    return torch.cat(outs), truth


@pytest.mark.parametrize(
    "case",
    [
        c
        for c in CASES + SCORE_CASES
        if c.soft_cap is None
        and not c.has_sinks
        and c.kv_lens
        and all(0 < q <= n for q, n in zip(c.q_lens, c.kv_lens, strict=True))
    ],
    ids=lambda case: case.id,
)
def test_attention_reference_equals_torch_sdpa(case: AttentionCase) -> None:
    expected, truth = sdpa(case)
    # Of a row that sees nothing sdpa makes NaN.
    torch.testing.assert_close(truth, expected.nan_to_num(0.0), rtol=1e-12, atol=1e-12)


def test_visible_keys_is_aligned_bottom_right() -> None:
    assert visible_keys(2, 4, causal=True, window_left=None).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert visible_keys(2, 4, causal=True, window_left=1).int().tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]
    assert visible_keys(2, 4, causal=False, window_left=1).int().tolist() == [[0, 1, 1, 1], [0, 0, 1, 1]]
    assert visible_keys(3, 1, causal=True, window_left=None).int().tolist() == [[0], [0], [1]]


def test_visible_keys_of_tree_are_context_ancestors_and_row_itself() -> None:
    words = tree_mask([None, 0, 0, 1])
    visible = visible_keys(4, 6, causal=True, window_left=None, tree_mask=words)
    assert visible.int().tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 1, 0], [1, 1, 1, 1, 0, 1]]
    visible = visible_keys(4, 6, causal=True, window_left=3, tree_mask=words)
    assert visible.int().tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [0, 1, 1, 0, 1, 0], [0, 0, 1, 1, 0, 1]]


def test_visible_keys_64_before_a_row_are_seen_whatever_its_word() -> None:
    visible = visible_keys(70, 71, causal=True, window_left=None, tree_mask=torch.zeros(70, dtype=torch.int64))
    assert visible[:, 0].all()
    expected = [[key == 0 or position - key >= 64 for key in range(71)] for position in range(1, 71)]
    assert visible.tolist() == expected


def test_attention_reference_alibi_and_sinks_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 2, 8, generator=generator, dtype=torch.float64)
    k_cache, v_cache = torch.randn(2, 1, 3, 1, 8, generator=generator, dtype=torch.float64)
    slopes, sinks = torch.tensor([0.5, 0.25]), torch.tensor([1.5, -torch.inf])
    out, lse = attention_reference(
        q, k_cache, v_cache, cu_seqlens_q=torch.tensor([0, 2]), seq_lens=torch.tensor([3]),
        block_table=torch.tensor([[0]]), softmax_scale=0.5, alibi_slopes=slopes, sinks=sinks,
        compute_dtype=torch.float64,
    )  # fmt: skip
    for row, head in itertools.product(range(2), range(2)):
        keys = range(row + 2)  # positions 1 and 2
        weights = [
            math.exp(0.5 * float(q[row, head] @ k_cache[0, key, 0]) - float(slopes[head]) * (row + 1 - key))
            for key in keys
        ]
        total = sum(weights) + math.exp(float(sinks[head]))
        expected = sum(weight * v_cache[0, key, 0] for weight, key in zip(weights, keys, strict=True)) / total
        torch.testing.assert_close(out[row, head], expected)
        assert float(lse[row, head]) == pytest.approx(math.log(total), rel=1e-12)


def test_attention_reference_of_rows_without_keys_has_the_sink_for_lse() -> None:
    q, cache = torch.ones(2, 2, 8), torch.full((1, 4, 1, 8), torch.nan)
    sinks = torch.tensor([0.75, -torch.inf])
    out, lse = attention_reference(
        q, cache, cache, cu_seqlens_q=torch.tensor([0, 2]), seq_lens=torch.tensor([0]),
        block_table=torch.tensor([[0]]), sinks=sinks,
    )  # fmt: skip
    assert bool((out == 0).all()) and torch.equal(lse, sinks.expand(2, 2))


def test_attention_reference_soft_cap_and_lse_by_hand() -> None:
    q = torch.ones(1, 1, 8)
    k_cache = torch.stack([torch.full((1, 8), 1.0), torch.full((1, 8), -1.0)])[None]
    v_cache = torch.stack([torch.full((1, 8), 3.0), torch.full((1, 8), 5.0)])[None]
    out, lse = attention_reference(
        q, k_cache, v_cache,
        cu_seqlens_q=torch.tensor([0, 1]), seq_lens=torch.tensor([2]), block_table=torch.tensor([[0]]),
        softmax_scale=0.5, soft_cap=2.0, compute_dtype=torch.float64,
    )  # fmt: skip
    score = torch.tensor(2.0, dtype=torch.float64) * torch.tanh(torch.tensor(4.0 / 2.0, dtype=torch.float64))
    weight = torch.sigmoid(2 * score)  # of the first key: e^s / (e^s + e^-s)
    torch.testing.assert_close(out[0, 0, 0], weight * 3 + (1 - weight) * 5)
    torch.testing.assert_close(lse[0, 0], torch.log(score.exp() + (-score).exp()))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_reference_is_a_complex_rotation(interleaved: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 3, 8, dtype=torch.float64)
    positions = torch.tensor([4, 0, 2, 2, 1])
    angles = torch.randn(6, 3, dtype=torch.float64)
    table = torch.cat((angles.cos(), angles.sin()), dim=-1)
    result = rope_reference(x, positions, table, interleaved=interleaved, compute_dtype=torch.float64)
    turn = torch.polar(torch.ones(5, 1, 3, dtype=torch.float64), angles[positions][:, None])
    pairs = x[..., :6].unflatten(-1, (3, 2)) if interleaved else x[..., :6].unflatten(-1, (2, 3)).transpose(-1, -2)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    expected = turned.flatten(-2) if interleaved else turned.transpose(-1, -2).flatten(-2)
    torch.testing.assert_close(result[..., :6], expected)
    assert torch.equal(result[..., 6:], x[..., 6:])


def test_append_kv_reference_writes_its_slots_only() -> None:
    k_cache, v_cache = torch.full((3, 4, 2, 8), -1.0), torch.full((3, 4, 2, 8), -1.0)
    k, v = torch.randn(2, 2, 8), torch.randn(2, 2, 8)
    assert append_kv_reference(k, v, k_cache, v_cache, torch.tensor([9, 2])) is None
    assert torch.equal(k_cache[2, 1], k[0]) and torch.equal(k_cache[0, 2], k[1])
    assert torch.equal(v_cache[2, 1], v[0]) and torch.equal(v_cache[0, 2], v[1])
    assert int((k_cache != -1).any(-1).any(-1).sum()) == 2


def test_merge_states_reference_of_halves_is_the_whole() -> None:
    torch.manual_seed(0)
    scores, values = torch.randn(3, 2, 10, dtype=torch.float64), torch.randn(10, 8, dtype=torch.float64)

    def over(part: slice) -> tuple[Tensor, Tensor]:
        return scores[..., part].softmax(-1) @ values[part], scores[..., part].logsumexp(-1)

    parts = [
        over(slice(0, 4)),
        over(slice(4, 10)),
        (torch.full((3, 2, 8), torch.nan).double(), torch.full((3, 2), -torch.inf).double()),
    ]
    out, lse = merge_states_reference(
        torch.stack([p[0] for p in parts]), torch.stack([p[1] for p in parts]), compute_dtype=torch.float64
    )
    whole_out, whole_lse = over(slice(0, 10))
    torch.testing.assert_close(out, whole_out)
    torch.testing.assert_close(lse, whole_lse)


def test_merge_states_reference_of_empty_states_is_empty() -> None:
    out, lse = merge_states_reference(torch.full((2, 1, 1, 8), torch.nan), torch.full((2, 1, 1), -torch.inf))
    assert bool((out == 0).all()) and bool((lse == -torch.inf).all())
