"""The CUDA attention kernels, emulated, on combinations of all their features: every pair of values of any two."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from mixattn.ops.kv_dtypes import QUANTIZED
from mixattn.ops.tree_mask import tree_mask
from tests.cases import AttentionCase, KvFormat, assert_attention_close, make_inputs
from tests.covering import covering_rows
from tests.cuda.attention_run import prepare
from tests.cuda.emulation import Emulation
from tests.cuda.test_mixed_attention import HEADS

SHAPES = {
    "decodes": ((1, 1), (83, 20)),
    "chunk": ((21,), (147,)),
    "large-chunk": ((131,), (140,)),
    "mixed": ((1, 13, 0, 1), (150, 30, 5, 3)),
}
"""q_lens and kv_lens."""
AXES: dict[str, list[Any]] = {
    "shape": [*SHAPES],
    "capability": [80, 90],
    "dtype": [torch.bfloat16, torch.float16],
    "heads": sorted(HEADS),
    # What K and V are stored as, None being dtype, and of what they have a scale each.
    "stored": [None, *QUANTIZED],
    "scale": ["token", "head", "one"],
    "group_size": [1, 3, 8],
    "page_size": [1, 7, 16, 64],
    "window_left": [None, 9],
    "soft_cap": [None, 3.0],
    "alibi": [None, "per-head", "per-seq"],
    "has_sinks": [False, True],
    "has_tree": [False, True],
    "wants_lse": [True, False],
    "invariant": [False, True],
    "split_tokens": [16, 64],
    "num_workers": [1, 5, 64],
    "num_blocks": [1, 3],
}
NUM_ROWS = 400
NUM_QUICK_ROWS = 140
"""These have all pairs."""
ROWS = covering_rows(AXES, NUM_ROWS)


def case_of(row: dict[str, Any], name: str) -> AttentionCase:
    q_lens, kv_lens = SHAPES[row["shape"]]
    words: list[int] = []
    for q_len in q_lens:
        # A tree in which every row hangs on the one two before it, two branches, as far as a word reaches.
        tree = [None if i < 2 else i - 2 for i in range(min(q_len, 64))]
        words += (tree_mask(tree).tolist() if tree else []) + [-1] * (q_len - len(tree))
    return AttentionCase(
        name, q_lens, kv_lens, num_q_heads=row["group_size"], num_kv_heads=1, head_dim=row["heads"][0],
        v_head_dim=row["heads"][1], page_size=row["page_size"], window_left=row["window_left"],
        soft_cap=row["soft_cap"], num_workers=row["num_workers"], alibi=row["alibi"], has_sinks=row["has_sinks"],
        tree_mask=tuple(words) if row["has_tree"] else None,
    )  # fmt: skip


def test_covering_rows_hold_every_pair_of_values() -> None:
    for (one, ones), (other, others) in itertools.combinations(AXES.items(), 2):
        found = {(ones.index(row[one]), others.index(row[other])) for row in ROWS[:NUM_QUICK_ROWS]}
        assert len(found) == len(ones) * len(others), (one, other)


@pytest.mark.parametrize(
    "index", [pytest.param(i, marks=[pytest.mark.slow] * (i >= NUM_QUICK_ROWS)) for i in range(len(ROWS))]
)
def test_mixed_attention_combination_of_features_is_within_twice_eager_on_every_schedule(
    index: int, emulation: Emulation
) -> None:
    row = ROWS[index]
    case = case_of(row, f"row {index}: {row}")
    kv = None if row["stored"] is None else KvFormat(row["stored"], row["scale"])
    inputs = make_inputs(case, row["dtype"], kv=kv)
    run = prepare(
        case,
        row["dtype"],
        split_tokens=row["split_tokens"],
        inputs=inputs,
        capability=row["capability"],
        invariant=row["invariant"],
    )
    results = []
    for seed in range(index, index + 3):
        run.launch(emulation, seed=seed, num_blocks=row["num_blocks"], wants_lse=row["wants_lse"])
        assert not run.tickets.any()
        results.append((run.out.clone(), run.lse.clone()))
    assert_attention_close(case, inputs, run.out, run.lse if row["wants_lse"] else None)
    assert bool(run.lse.isnan().all()) != row["wants_lse"]
    for out, lse in results:
        assert torch.equal(out, run.out) and (torch.equal(lse, run.lse) or not row["wants_lse"])
