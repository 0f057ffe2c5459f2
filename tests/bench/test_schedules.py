"""The schedules that plans are compared with: every row meets every key it sees, and known facts of each."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from bench.kernels import schedules
from bench.kernels.schedules import Schedule, Shape, Slices, Unit, bound_of
from bench.kernels.trace_batches import batches, read_lengths

SHAPE = Shape()
DECODES: Slices = [(1, 4000)] * 60
MIXED: Slices = [(2048, 4096), *DECODES]
OTHERS = [schedules.flash_attention_3, schedules.flashinfer_prefill, schedules.vllm_unified]


@pytest.mark.parametrize("slices", [DECODES, MIXED, [(1, 100_000)], [(37, 37), (0, 9), (5, 900)]], ids=len)
@pytest.mark.parametrize("schedule", OTHERS, ids=lambda s: s.__name__)
def test_schedule_covers_every_key_of_every_tile(schedule: object, slices: Slices) -> None:
    assert callable(schedule)
    made: Schedule = schedule(slices, SHAPE)
    for i, (q_len, kv_len) in enumerate(slices):
        units = [unit for unit in made.units if unit.seq_idx == i]
        assert bool(units) == (q_len > 0)
        # The last tile sees all keys, so that heads * kv_len is the least; and all rows have a place in some tile.
        assert sum(unit.num_keys for unit in units) >= (kv_len * SHAPE.num_kv_heads if q_len else 0)
        if q_len:
            assert sum(unit.tile_rows for unit in units) >= q_len * SHAPE.num_q_heads
    assert made.num_empty >= 0 and made.num_merge_rows <= made.num_partial_rows


def test_flash_attention_3_splits_decodes_alone_and_not_beside_a_chunk() -> None:
    one_long: Slices = [(1, 131_072)]
    assert schedules.flash_attention_3(one_long, SHAPE).num_partial_rows > 0
    assert schedules.flash_attention_3([(512, 512), *one_long], SHAPE).num_partial_rows == 0


def test_flashinfer_takes_one_tile_for_all_by_the_average() -> None:
    assert {unit.tile_rows for unit in schedules.flashinfer_prefill(MIXED, SHAPE).units} == {128}
    assert {unit.tile_rows for unit in schedules.flashinfer_prefill(DECODES, SHAPE).units} == {16}


def test_vllm_launches_a_grid_for_any_batch_and_splits_few_decodes_only() -> None:
    assert schedules.vllm_unified(DECODES, SHAPE).num_partial_rows == 0
    few = schedules.vllm_unified(DECODES[:16], SHAPE)
    assert few.num_partial_rows == 16 * SHAPE.num_q_heads * 16
    assert schedules.vllm_unified(MIXED, SHAPE).num_empty > 0


def test_bound_of_one_unit_is_its_roofline_on_one_sm() -> None:
    slices: Slices = [(1, 8192)]
    unit = Unit(0, 16, 8192 * SHAPE.num_kv_heads)
    bound = bound_of(Schedule([unit], 2), slices, SHAPE)
    num_bytes = 2 * 128 * 2 * 8192 * 8
    assert bound.bound_us == pytest.approx(1.0 + 132 * num_bytes / 3.35e12 * 1e6)
    assert bound.imbalance == pytest.approx(132.0)


def test_traces_of_every_format_are_read_and_run(tmp_path: Path) -> None:
    azure, mooncake = tmp_path / "azure.csv", tmp_path / "mooncake.jsonl.gz"
    azure.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\nx,40,3\nx,5000,2\nx,7,2\n")
    with gzip.open(mooncake, "wt") as file:
        file.write('{"timestamp": 0, "input_length": 40, "output_length": 3}\n')
    assert list(read_lengths(azure)) == [(40, 3), (5000, 2), (7, 2)]
    assert list(read_lengths(mooncake)) == [(40, 3)]
    steps = list(batches(azure, num_steps=9, warmup_steps=0, budget_tokens=32, max_num_seqs=4, max_model_len=1000))
    assert sum(q_len for step in steps for q_len, _ in step) == 40 + 2 + 7 + 1
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="must have columns"):
        list(read_lengths(tmp_path / "other.csv"))
