"""The Triton attention kernel on combinations of all its features: every pair of values of any two of them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from mixattn.ops.tree_mask import tree_mask
from tests.cases import QUANTIZED_FORMATS, AttentionCase, assert_attention_close, make_inputs
from tests.covering import covering_rows
from tests.triton.attention_run import prepare

SHAPES = {
    "decode": ((1, 1), (53, 20)),
    "chunk": ((21,), (47,)),
    "mixed": ((1, 13, 0, 1), (70, 30, 5, 3)),
}
"""q_lens and kv_lens."""
AXES: dict[str, list[Any]] = {
    "shape": [*SHAPES],
    "head_dims": [(64, 64), (96, 96), (128, 128), (192, 192), (256, 256), (192, 128), (64, 128), (128, 64), (40, 256)],
    "group_size": [1, 3, 4, 8],
    "page_size": [1, 7, 16, 64],
    "dtype": [torch.bfloat16, torch.float16, torch.float32],
    "kv": [None, *QUANTIZED_FORMATS],
    "window_left": [None, 9],
    "soft_cap": [None, 3.0],
    "alibi": [None, "per-head", "per-seq"],
    "has_sinks": [False, True],
    "has_tree": [False, True],
    "wants_lse": [True, False],
    "num_workers": [1, 5, 16, 64],
    "invariant": [False, True],
}
NUM_ROWS = 400
NUM_QUICK_ROWS = 60
ROWS = covering_rows(AXES, NUM_ROWS)


def case_of(row: dict[str, Any], name: str) -> AttentionCase:
    q_lens, kv_lens = SHAPES[row["shape"]]
    words: list[int] = []
    for q_len in q_lens:
        # A tree in which every row hangs on the one two before it: two branches.
        words += tree_mask([None if i < 2 else i - 2 for i in range(q_len)]).tolist() if q_len else []
    return AttentionCase(
        name, q_lens, kv_lens, num_q_heads=row["group_size"], num_kv_heads=1, head_dim=row["head_dims"][0],
        v_head_dim=row["head_dims"][1], page_size=row["page_size"], window_left=row["window_left"],
        soft_cap=row["soft_cap"], num_workers=row["num_workers"], alibi=row["alibi"], has_sinks=row["has_sinks"],
        tree_mask=tuple(words) if row["has_tree"] else None,
    )  # fmt: skip


def test_covering_rows_hold_every_pair_of_values() -> None:
    assert len(ROWS) >= NUM_ROWS
    for (one, ones), (other, others) in itertools.combinations(AXES.items(), 2):
        found = {(ones.index(row[one]), others.index(row[other])) for row in ROWS}
        assert len(found) == len(ones) * len(others), (one, other)


@pytest.mark.parametrize(
    "index", [pytest.param(i, marks=[pytest.mark.slow] * (i >= NUM_QUICK_ROWS)) for i in range(len(ROWS))]
)
def test_mixed_attention_combination_of_features_is_within_twice_eager(index: int, device: torch.device) -> None:
    row = ROWS[index]
    case = case_of(row, f"row {index}: {row}")
    inputs = make_inputs(case, row["dtype"], kv=row["kv"])
    run = prepare(case, row["dtype"], device, split_tokens=16, inputs=inputs, invariant=row["invariant"])
    run.launch(wants_lse=row["wants_lse"])
    assert_attention_close(case, inputs, run.out.cpu(), run.lse.cpu() if row["wants_lse"] else None)
    assert bool(run.lse.isnan().all()) != row["wants_lse"]
    assert not run.tickets.any()
