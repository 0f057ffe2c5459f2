"""The CUDA attention kernel, emulated, on every named case, and what the cases do not reach: strides, the workspace."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from tests.cases import CASES, AttentionCase, AttentionInputs, assert_attention_close, make_inputs
from tests.cuda.attention_run import AttentionRun, prepare

DTYPES = [torch.bfloat16, torch.float16]
SUPPORTED_CASES = [case for case in CASES if case.head_dim in (64, 128)]
SEEDS = range(3)


def check(run: AttentionRun, inputs: AttentionInputs, *, has_lse: bool = True) -> None:
    assert_attention_close(run.case, inputs, run.out, run.lse if has_lse else None)
    assert not run.tickets.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SUPPORTED_CASES, ids=lambda case: case.id)
def test_mixed_attention_named_case_is_within_twice_eager_on_every_schedule(
    case: AttentionCase, dtype: torch.dtype, emulated: ModuleType
) -> None:
    inputs = make_inputs(case, dtype)
    run = prepare(case, dtype, inputs=inputs)
    assert run.work_plan.num_merges > 0 or case.num_workers is None, "the case is to force splits"
    results = []
    for seed in SEEDS:
        run.launch(emulated, seed=seed)
        check(run, inputs)
        results.append((run.out.clone(), run.lse.clone()))
    assert all(torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1]) for out, lse in results)
