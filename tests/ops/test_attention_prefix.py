"""attention by plans with groups of slices that share a prefix: the plan it makes, and the plans it refuses."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mixattn
from mixattn.ops import attention as attention_module
from mixattn.ops.plan import WorkPlan
from tests.cases import (
    PREFIX_CASES,
    QUANTIZED_FORMATS,
    AttentionCase,
    AttentionInputs,
    KvFormat,
    assert_attention_close,
    make_inputs,
    plan_arguments,
)
from tests.ops.test_attention import DTYPES, splitting_hardware

CASE = AttentionCase(
    "prefix-of-6-decodes", (1,) * 6, (700, 710, 720, 650, 641, 900), num_q_heads=8, shared_pages=(0,) + (40,) * 5
)


def make_plan(case: AttentionCase, inputs: AttentionInputs, **options: Any) -> WorkPlan:
    return mixattn.plan(inputs.cu_seqlens_q, inputs.seq_lens, **{**plan_arguments(case, inputs), **options})


def attend(case: AttentionCase, inputs: AttentionInputs, **options: Any) -> torch.Tensor:
    return mixattn.attention(
        inputs.q, inputs.k_cache, inputs.v_cache, **inputs.index_tensors, **inputs.score_tensors, **inputs.scales,
        **case.options, **options,
    )  # fmt: skip


def test_attention_makes_a_plan_with_groups_on_the_cpu() -> None:
    inputs = make_inputs(CASE, torch.float32)
    plan = make_plan(CASE, inputs, kv_element_bytes=4)
    assert plan.num_groups == 1
    apart = dataclasses.replace(inputs, block_table=inputs.block_table.clone())
    assert torch.equal(attend(CASE, apart), attend(CASE, inputs, plan=plan))


def test_attention_with_alibi_makes_a_plan_without_groups_and_refuses_one_with_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = dataclasses.replace(CASE, alibi="per-seq")
    inputs = make_inputs(case, torch.float32)
    made: list[WorkPlan] = []

    def make(*arguments: Any, **options: Any) -> WorkPlan:
        made.append(mixattn.plan(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(attention_module, "make_plan", make)
    assert_attention_close(case, inputs, attend(case, inputs), None)
    assert [plan.num_groups for plan in made] == [0]
    for backend in ("cpu", "reference"):
        with pytest.raises(NotImplementedError, match=r"alibi_slopes is not supported .* without the block_table of"):
            attend(case, inputs, plan=make_plan(case, inputs), backend=backend)


def test_attention_with_groups_repeated_gives_the_same_bits() -> None:
    inputs = make_inputs(CASE, torch.float32)
    plan = make_plan(CASE, inputs, hardware=splitting_hardware(64))
    assert plan.num_groups == 1 and plan.merges()["num_splits"].max() > 4
    results = [attend(CASE, inputs, plan=plan) for _ in range(10)]
    assert all(torch.equal(result, results[0]) for result in results)


def test_attention_with_groups_writes_the_rows_of_each_slice_and_nothing_else() -> None:
    """The rows of a group belong to slices behind the first one: each writes its own tokens, and no other."""
    case = next(case for case in PREFIX_CASES if case.id == "prefix-beside-chunk-and-decodes")
    inputs = make_inputs(case, torch.float32)
    plan = make_plan(case, inputs, hardware=splitting_hardware(1))
    wide = torch.full((case.total_q, case.num_q_heads + 1, case.head_dim), 7.0)
    attend(case, inputs, plan=plan, out=wide[:, :-1])
    assert_attention_close(case, inputs, wide[:, :-1], None)
    assert bool((wide[:, -1] == 7.0).all())


@pytest.mark.parametrize(
    ("argument", "at", "value", "message"),
    [
        ("block_table", (3, 0), 1, r"block_table\[3\] does not begin with the pages of block_table\[0\]"),
        ("block_table", (3, 39), 1, r"block_table\[3\] does not begin with the pages of block_table\[0\]"),
        ("block_table", (0, 39), 1, r"block_table\[1\] does not begin with the pages of block_table\[0\]"),
        ("seq_lens", (4,), 640, "sequence 4 is not longer than the prefix that it is to share"),
        ("seq_lens", (2,), 721, "do not cover every row and key once"),
        ("seq_lens", (2,), 719, r"sequence 2, whose rows see \[640, 719\)"),
        ("cu_seqlens_q", (3,), 2, "the rows that share a prefix|not made for this batch"),
    ],
    ids=str,
)
def test_attention_with_groups_of_other_tables_or_lengths_is_refused(
    argument: str, at: tuple[int, ...], value: int, message: str
) -> None:
    inputs = make_inputs(CASE, torch.float32)
    plan = make_plan(CASE, inputs)
    getattr(inputs, argument)[at] = value
    out = torch.full_like(inputs.q, 7.0)
    with pytest.raises(ValueError, match=message):
        attend(CASE, inputs, plan=plan, out=out)
    assert bool((out == 7.0).all())


def test_attention_with_a_word_of_a_group_out_of_place_is_refused() -> None:
    """Whatever the word says instead; where two parts of one size change places, the sums hide it."""
    inputs = make_inputs(CASE, torch.float32)
    plan = make_plan(CASE, inputs, hardware=splitting_hardware(8))
    merges_begin = 16 + 8 * plan.capacity_items
    item_words = [16 + 8 * i + w for i in range(plan.num_items) for w in (0, 1, 2, 4, 5, 6)]
    merge_words = [merges_begin + 8 * i + w for i in range(plan.num_merges) for w in (0, 1, 2, 3, 5, 6, 7)]
    partial_rows = [16 + 8 * i + 7 for i in range(plan.num_items)]
    for word in (*item_words, *merge_words, *partial_rows):
        for value in (plan.buffer[word] + 1, -1, 2**30):
            words = torch.from_numpy(plan.buffer.copy())
            words[word] = int(value)
            if int(value) == plan.buffer[word]:
                continue
            with pytest.raises(ValueError, match=r"plan|block_table"):
                attend(CASE, inputs, plan=words)


def test_attention_with_groups_that_the_header_does_not_tell_of_is_refused() -> None:
    inputs = make_inputs(CASE, torch.float32)
    words = torch.from_numpy(make_plan(CASE, inputs).buffer.copy())
    words[13] = 0
    with pytest.raises(ValueError, match="it has groups of slices that its header does not tell of"):
        attend(CASE, inputs, plan=words)


def test_attention_with_groups_and_a_window_is_refused() -> None:
    inputs = make_inputs(CASE, torch.float32)
    words = torch.from_numpy(make_plan(CASE, inputs).buffer.copy())
    words[12] = 500
    with pytest.raises(ValueError, match="slices share a prefix in it, which they do not with a window"):
        attend(dataclasses.replace(CASE, window_left=500), inputs, plan=words)


@st.composite
def prefix_cases(draw: st.DrawFn) -> AttentionCase:
    num_seqs = draw(st.integers(2, 12))
    num_kv_heads, page_size = draw(st.integers(1, 2)), draw(st.sampled_from([1, 5, 16]))
    causal = draw(st.booleans())
    q_lens = draw(st.lists(st.sampled_from([1, 1, 1, 2, 3, 0, 30]), min_size=num_seqs, max_size=num_seqs))
    own = draw(st.lists(st.integers(0, 100), min_size=num_seqs, max_size=num_seqs))
    prefix_pages = draw(st.integers(1, 200 // page_size))
    kv_lens = [prefix_pages * page_size + q_len + more for q_len, more in zip(q_lens, own, strict=True)]
    shared = draw(st.lists(st.sampled_from([prefix_pages, prefix_pages, prefix_pages, 0]), min_size=num_seqs,
                           max_size=num_seqs))  # fmt: skip
    words = st.sampled_from([-1, 0, 1]) | st.integers(-(2**63), 2**63 - 1)
    has_tree = causal and draw(st.booleans())
    return AttentionCase(
        id="random",
        q_lens=tuple(q_lens),
        kv_lens=tuple(kv_lens),
        num_q_heads=num_kv_heads * draw(st.integers(1, 9)),
        num_kv_heads=num_kv_heads,
        head_dim=8 * draw(st.integers(1, 32)),
        page_size=page_size,
        causal=causal,
        soft_cap=draw(st.none() | st.floats(0.5, 50.0)),
        logit_std=draw(st.sampled_from([0.5, 1.0])),
        has_sinks=draw(st.booleans()),
        tree_mask=tuple(draw(st.lists(words, min_size=sum(q_lens), max_size=sum(q_lens)))) if has_tree else None,
        shared_pages=(0, *shared[1:]),
    )


@settings(max_examples=60)
@given(
    case=prefix_cases(),
    dtype=st.sampled_from(DTYPES),
    kv=st.none() | st.sampled_from(QUANTIZED_FORMATS),
    seed=st.integers(0, 2**31),
    num_workers=st.sampled_from([1, 8, 64]),
)
def test_attention_of_random_batch_with_prefixes_is_within_twice_eager(
    case: AttentionCase, dtype: torch.dtype, kv: KvFormat | None, seed: int, num_workers: int
) -> None:
    inputs = make_inputs(case, dtype, seed=seed, kv=kv)
    plan = make_plan(case, inputs, hardware=splitting_hardware(num_workers))
    out, lse = attend(case, inputs, plan=plan, return_lse=True)
    assert_attention_close(case, inputs, out, lse)
