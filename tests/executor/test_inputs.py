"""The tensors of a step against the slices they are made from, row by row."""

from __future__ import annotations

import random
from array import array

import pytest

from mixattn.executor.inputs import InputBuilder, StepInputs
from mixattn.types import BatchPlan, SamplingParams, Slice


def make_slice(
    request_id: str, token_ids: list[int] | None, kv_len: int, pages: list[int], sampled: bool = True
) -> Slice:
    return Slice(
        request_id=request_id,
        q_len=1 if token_ids is None else len(token_ids),
        kv_len=kv_len,
        token_ids=token_ids,
        page_ids=array("i", pages),
        is_sampled=sampled,
        sampling=SamplingParams(),
        output_idx=0,
        history=[],
        prompt_len=0,
    )


def check_inputs(inputs: StepInputs, plan: BatchPlan, page_size: int, last_token_ids: dict[str, int]) -> None:
    """Every value by its definition in STYLE.md's table of words."""
    row = 0
    sampled_rows = []
    assert inputs.cu_seqlens_q[0] == 0
    for idx, part in enumerate(plan.slices):
        tokens = [last_token_ids[part.request_id]] if part.token_ids is None else list(part.token_ids)
        for offset, token in enumerate(tokens):
            position = part.kv_len - part.q_len + offset
            page = part.page_ids[position // page_size]
            assert inputs.input_ids[row] == token
            assert inputs.positions[row] == position
            assert inputs.slot_mapping[row] == page * page_size + position % page_size
            row += 1
        num_pages = -(-part.kv_len // page_size)
        assert inputs.block_table[idx, :num_pages].tolist() == list(part.page_ids[:num_pages])
        assert inputs.seq_lens[idx] == part.kv_len
        assert inputs.cu_seqlens_q[idx + 1] == row
        if part.is_sampled:
            sampled_rows.append(row - 1)
    assert inputs.sampled_rows == sampled_rows
    assert inputs.last_page == max(max(part.page_ids) for part in plan.slices)
    assert len(inputs.input_ids) == len(inputs.positions) == len(inputs.slot_mapping) == row
    assert inputs.block_table.shape[0] == len(inputs.seq_lens) == len(inputs.cu_seqlens_q) - 1 == len(plan.slices)
    assert inputs.block_table.is_contiguous()


@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
def test_build_random_steps_match_their_slices(page_size: int) -> None:
    rng = random.Random(page_size)
    builder = InputBuilder(page_size, max_model_len=400)
    for step_idx in range(30):
        slices, last_token_ids = [], {}
        for idx in range(rng.choice([1, 3, 40])):
            q_len = rng.choice([1, 1, 2, rng.randint(1, 200)])
            kv_len = rng.randint(q_len, 400)
            pages = [rng.randrange(10_000) for _ in range(-(-kv_len // page_size) + rng.randint(0, 2))]
            is_unknown = q_len == 1 and rng.random() < 0.5
            last_token_ids[f"r{idx}"] = rng.randrange(50_000)
            token_ids = None if is_unknown else [rng.randrange(50_000) for _ in range(q_len)]
            slices.append(make_slice(f"r{idx}", token_ids, kv_len, pages, sampled=rng.random() < 0.7))
        plan = BatchPlan(step_idx, tuple(slices))
        check_inputs(builder.build(plan, last_token_ids), plan, page_size, last_token_ids)


def test_build_same_sized_steps_reuse_their_buffers() -> None:
    builder = InputBuilder(16, max_model_len=64)
    plan = BatchPlan(0, (make_slice("a", [1, 2, 3], 20, [5, 6]),))
    first, second = builder.build(plan, {}), builder.build(plan, {})
    assert first.input_ids.data_ptr() == second.input_ids.data_ptr()
    assert first.block_table.data_ptr() == second.block_table.data_ptr()
