"""Groups of slices that share a prefix: when the planner makes them, and that a plan with them is right."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixattn import _C
from mixattn.ops.plan import H100, Hardware, WorkPlan, cpu_hardware, plan
from mixattn.ops.reference import visible_keys
from tests.ops.plan_twin import LARGE, MEDIUM, SMALL, Pages, Shape, plan_twin
from tests.ops.test_plan_invariants import CAPACITY_ITEMS, CAPACITY_MERGES, Batch, hardwares, shapes

UNUSED = 77
"""The entries of a table behind a sequence's pages: equal in all rows, so that to read them would show."""
SHAPE = Shape(num_q_heads=8, num_kv_heads=2, head_dim=128, kv_element_bytes=2, causal=True, window_left=None)
GROUP_SIZE = 4
READER = replace(cpu_hardware(1), flops_per_s=1e15, packing_rows=0)
"""Waits for memory only: what saves reads is done."""


def make_pages(kv_lens: list[int], shared: list[int], page_size: int) -> Pages:
    """A table in which sequence s begins with ``shared[s]`` pages of sequence s - 1, as far as both have them."""
    num_pages = [-(-kv_len // page_size) for kv_len in kv_lens]
    rows: list[list[int]] = []
    next_page = 1000
    for s, count in enumerate(num_pages):
        kept = rows[-1][: min(shared[s], count, num_pages[s - 1])] if s > 0 else []
        rows.append([*kept, *range(next_page, next_page + count - len(kept))])
        next_page += count
    width = max([*num_pages, 1]) + 1
    return Pages([row + [UNUSED] * (width - len(row)) for row in rows], page_size)


def make_batch(slices: list[tuple[int, int]], shared: list[int], page_size: int = 16, **options: Any) -> Batch:
    pages = make_pages([kv_len for _, kv_len in slices], shared, page_size)
    return Batch(slices, **{"shape": SHAPE, "hardware": READER, "pages": pages, **options})


def groups_of(made: WorkPlan) -> list[tuple[int, int, int]]:
    """(first slice, packed rows, prefix tokens) of each group."""
    merges = made.merges()
    of_groups = merges[(merges["prefix_tokens"] > 0) & (merges["kv_head"] == 0)]
    groups = of_groups[["seq_idx", "num_rows", "prefix_tokens"]].tolist()
    assert len(groups) == made.num_groups
    return groups


# When there are groups


def test_plan_decodes_behind_a_system_prompt_are_a_group() -> None:
    made = make_batch([(1, 4096 + 32 * (i + 4)) for i in range(32)], [0] + [256] * 31, hardware=H100).plan()
    assert groups_of(made) == [(0, 32 * GROUP_SIZE, 4096)]
    items = made.items()
    shared = items[items["num_rows"] == 128]
    assert (shared["kind"] == LARGE).all() and shared["kv_end"].max() == 4096
    assert (items["kv_begin"][items["num_rows"] == GROUP_SIZE] >= 4096).all()
    assert made.num_items == made.merges()["num_items"].sum()


def test_plan_without_a_table_has_no_groups_and_keeps_its_bounds() -> None:
    batch = make_batch([(1, 5000)] * 8, [0] + [300] * 7)
    with_table, without = batch.plan(), replace(batch, pages=None).plan()
    assert with_table.num_groups == 1 and without.num_groups == 0
    assert without.buffer[CAPACITY_ITEMS] == without.spec.max_items(8, 8)
    assert with_table.buffer[CAPACITY_ITEMS] == without.buffer[CAPACITY_ITEMS] + 2 * 4
    assert with_table.buffer[CAPACITY_MERGES] == without.buffer[CAPACITY_MERGES] + 2 * 4


@pytest.mark.parametrize("change", [{"window_left": 10_000}, {"invariant": True}], ids=str)
def test_plan_with_a_window_or_invariance_has_no_groups(change: dict[str, Any]) -> None:
    invariant = change.pop("invariant", False)
    batch = make_batch([(1, 5000)] * 8, [0] + [300] * 7, shape=replace(SHAPE, **change), invariant=invariant)
    assert groups_of(batch.plan()) == []


def test_plan_group_ends_where_its_rows_fill_a_large_tile() -> None:
    made = make_batch([(1, 5000)] * 70, [0] + [300] * 69).plan()
    assert groups_of(made) == [(0, 128, 4800), (32, 128, 4800), (64, 24, 4800)]
    assert set(made.items()["kind"]) == {LARGE, MEDIUM, SMALL}


def test_plan_group_holds_no_slice_of_more_rows_than_a_small_tile_and_no_empty_one() -> None:
    batch = make_batch([(1, 5000), (4, 5000), (5, 5000), (1, 5000), (0, 5000), (1, 5000), (1, 5000)], [0] + [300] * 6)
    assert groups_of(batch.plan()) == [(0, 5 * GROUP_SIZE, 4800), (5, 2 * GROUP_SIZE, 4800)]


def test_plan_prefix_ends_before_the_first_row_of_every_slice() -> None:
    """All 5 pages are the same, but of the fifth the second slice's own rows stand in the way."""
    made = make_batch([(1, 5000), (3, 4802), (1, 5000)], [0] + [301] * 2).plan()
    assert groups_of(made) == [(0, 5 * GROUP_SIZE, 4784)]
    assert groups_of(make_batch([(1, 1), (1, 1)], [0, 1], page_size=1).plan()) == []
    assert groups_of(make_batch([(4, 3), (4, 3)], [0, 3], page_size=1).plan()) == []


def test_plan_slice_that_shares_little_is_left_out() -> None:
    """Three that share 250 pages, then one that shares 10 with them: 3 x 10 is less than 2 x 250."""
    assert groups_of(make_batch([(1, 5000)] * 4, [0, 250, 250, 10]).plan()) == [(0, 3 * GROUP_SIZE, 4000)]
    assert groups_of(make_batch([(1, 5000)] * 4, [0, 250, 250, 200]).plan()) == [(0, 4 * GROUP_SIZE, 3200)]


def test_plan_longer_prefix_within_a_shorter_one_takes_a_slice_along() -> None:
    made = make_batch([(1, 5000)] * 6, [0, 100, 100, 250, 250, 100]).plan()
    assert groups_of(made) == [(0, 2 * GROUP_SIZE, 1600), (2, 3 * GROUP_SIZE, 4000)]


def test_plan_slice_with_many_keys_of_its_own_is_left_out_where_it_would_hold_up_the_others() -> None:
    """Its pieces would be few as theirs are; alone it is split over all workers."""
    lens = [2500] * 16 + [40_000] + [2500] * 15
    big = Shape(32, 8, 128, 2, True, None)
    made = make_batch([(1, n) for n in lens], [0] + [125] * 31, shape=big, hardware=H100).plan()
    assert groups_of(made) == [(0, 64, 2000), (17, 60, 2000)]
    assert made.cost.imbalance < 1.2
    alone = make_batch([(1, n) for n in lens], [0] + [125] * 31, shape=big, hardware=cpu_hardware(1)).plan()
    assert groups_of(alone) == [(0, 128, 2000)], "one worker waits for nobody"


def test_plan_group_that_saves_less_than_it_costs_is_not_made() -> None:
    """The partial results of a shared page of 16 keys are longer than the page."""
    assert groups_of(make_batch([(1, 500)] * 32, [0] + [1] * 31).plan()) == []
    assert groups_of(make_batch([(1, 500)] * 2, [0, 3]).plan()) == []
    assert groups_of(make_batch([(1, 900)] * 2, [0, 40]).plan()) == [(0, 2 * GROUP_SIZE, 640)]


@pytest.mark.parametrize(
    ("num_slices", "prefix", "dtype_bytes", "is_grouped"),
    [
        (2, 2048, 4, True), (2, 128, 4, True), (5, 2048, 4, True), (32, 4096, 4, True), (32, 32, 4, False),
        (2, 2048, 2, True), (2, 128, 2, False), (4, 2048, 2, True), (5, 2048, 2, False), (8, 128, 2, False),
        (32, 4096, 2, True), (32, 64, 2, False),
        (5, 1024, 1, False), (8, 1024, 1, False), (32, 256, 1, False),
    ],
)  # fmt: skip
def test_plan_for_a_cpu_groups_decodes_where_that_was_measured_to_be_faster(
    num_slices: int, prefix: int, dtype_bytes: int, is_grouped: bool
) -> None:
    """Up to 16 rows are read where they lie, more are copied first (``CPU_PACKING_ROWS``)."""
    shape = Shape(32, 8, 128, dtype_bytes, True, None)
    shared = [0] + [prefix // 16] * (num_slices - 1)
    made = make_batch([(1, prefix + 64)] * num_slices, shared, shape=shape, hardware=cpu_hardware(1)).plan()
    assert made.num_groups == is_grouped


def test_plan_group_whose_rows_the_hardware_computes_no_faster_together_is_not_made() -> None:
    slow = replace(cpu_hardware(1), flops_per_s=1e9)
    assert groups_of(make_batch([(1, 5000)] * 8, [0] + [300] * 7, hardware=slow).plan()) == []


def test_plan_group_saves_the_reads_that_it_is_for() -> None:
    batch = make_batch([(1, 4096 + 256)] * 32, [0] + [256] * 31)
    with_groups, without = batch.plan().cost, replace(batch, pages=None).plan().cost
    key_bytes = 2 * 128 * 2 * SHAPE.num_kv_heads
    assert without.bytes - with_groups.bytes == key_bytes * (31 * 4096 - 32 * GROUP_SIZE)
    assert with_groups.predicted_s < without.predicted_s / 2


# Random batches


@st.composite
def prefix_batches(draw: st.DrawFn, max_slices: int = 40, max_pages: int = 60) -> Batch:
    """Mostly decodes, most of which begin as the slice before does."""
    num_seqs = draw(st.integers(1, max_slices))
    page_size = draw(st.sampled_from([1, 3, 16]))
    q_lens = st.sampled_from([1, 1, 1, 1, 2, 3, 0, 50])
    kv_lens = st.integers(0, max_pages * page_size) | st.just(max_pages * page_size)
    slices = draw(st.lists(st.tuples(q_lens, kv_lens), min_size=num_seqs, max_size=num_seqs))
    counts = st.integers(0, max_pages) | st.sampled_from([0, max_pages, max_pages // 2])
    shared = draw(st.lists(counts, min_size=num_seqs, max_size=num_seqs))
    shape, hardware = draw(shapes()), draw(hardwares())
    if draw(st.integers(0, 9)) > 0:  # or most have none
        shape = replace(shape, window_left=None)
        hardware = replace(hardware, item_overhead_s=draw(st.sampled_from([0.0, 1e-9])), flops_per_s=1e13)
    return make_batch(
        slices, shared, page_size, shape=shape, hardware=hardware, invariant=draw(st.integers(0, 9)) == 0
    )  # fmt: skip


@settings(max_examples=300)
@given(batch=prefix_batches())
def test_plan_random_batch_with_prefixes_equals_its_python_twin(batch: Batch) -> None:
    made = batch.plan()
    twin = plan_twin(
        batch.cu_seqlens_q, batch.seq_lens, batch.shape, batch.hardware, invariant=batch.invariant, pages=batch.pages
    )
    assert made.buffer[: _C.PLAN_HEADER_WORDS].tolist() == twin.header
    assert made.items().view(np.int32).reshape(-1, _C.WORK_ITEM_WORDS).tolist() == twin.items
    assert made.merges().view(np.int32).reshape(-1, _C.MERGE_WORDS).tolist() == twin.merges
    assert made.cost.flops == sum(price.flops for price in twin.prices)
    assert made.cost.bytes == sum(price.bytes for price in twin.prices)
    assert made.cost.predicted_s == twin.makespan_fs * 1e-15


@settings(max_examples=100)
@given(batch=prefix_batches(max_slices=10, max_pages=20))
def test_plan_random_batch_with_prefixes_covers_every_row_and_page_once(batch: Batch) -> None:
    """Row by row: the keys that its items read, by the page they lie in and their place there, are those it sees."""
    assert batch.pages is not None
    shape, size = batch.shape, batch.pages.page_size
    starts = np.array(batch.cu_seqlens_q) * shape.group_size
    table = np.array(batch.pages.table)
    items = batch.plan().items()
    for kv_head in range(shape.num_kv_heads):
        reads: list[list[tuple[int, int]]] = [[] for _ in range(starts[-1])]
        shared_end = np.zeros(starts[-1], int)  # keys that a row has in an item of several slices
        for item in items[items["kv_head"] == kv_head]:
            keys = np.arange(item["kv_begin"], item["kv_end"])
            slots = list(zip(table[item["seq_idx"], keys // size].tolist(), keys.tolist(), strict=True))
            first = starts[item["seq_idx"]] + int(item["row_begin"])
            for row in range(first, first + int(item["num_rows"])):
                reads[row] += slots
            if first + int(item["num_rows"]) > starts[item["seq_idx"] + 1]:
                shared_end[first : first + int(item["num_rows"])] = np.maximum(
                    shared_end[first : first + int(item["num_rows"])], int(item["kv_end"])
                )
        for seq_idx, (q_len, kv_len) in enumerate(batch.slices):
            mask = visible_keys(q_len, kv_len, causal=shape.causal, window_left=shape.window_left).numpy()
            for row in range(q_len * shape.group_size):
                seen = np.flatnonzero(mask[row // shape.group_size])
                read = reads[starts[seq_idx] + row]
                assert len(set(read)) == len(read), "a key is read twice"
                assert shared_end[starts[seq_idx] + row] <= max(kv_len - q_len, 0), (
                    "where no mask is, a key that it must not see"
                )
                assert {(int(table[seq_idx, key // size]), int(key)) for key in seen} <= set(read)


@settings(max_examples=200)
@given(batch=prefix_batches())
def test_plan_random_batch_with_prefixes_fills_every_partial_row_once_in_key_order(batch: Batch) -> None:
    made = batch.plan()
    items, merges = made.items(), made.merges()
    writer = np.full(made.num_partial_rows, -1)
    for i in np.flatnonzero(items["merge_idx"] >= 0):
        rows = slice(int(items["partial_row"][i]), int(items["partial_row"][i]) + int(items["num_rows"][i]))
        assert (writer[rows] == -1).all()
        writer[rows] = i
    assert (writer >= 0).all()
    starts = np.array(batch.cu_seqlens_q) * batch.shape.group_size
    counts = np.bincount(items["merge_idx"][items["merge_idx"] >= 0], minlength=made.num_merges)
    assert counts.tolist() == merges["num_items"].tolist()
    for merge_idx, merge in enumerate(merges):
        splits, rows = int(merge["num_splits"]), int(merge["num_rows"])
        begin = int(merge["partial_row"])
        of_merge = items[writer[begin : begin + splits * rows].reshape(splits, rows)]
        assert (of_merge["merge_idx"] == merge_idx).all()
        assert (of_merge["kv_begin"][1:] == of_merge["kv_end"][:-1]).all(), "splits are not in the order of keys"
        item_rows = starts[of_merge["seq_idx"]] + of_merge["row_begin"]
        own_rows = starts[merge["seq_idx"]] + merge["row_begin"] + np.arange(rows)
        assert (item_rows <= own_rows).all() and (own_rows < item_rows + of_merge["num_rows"]).all()


@settings(max_examples=200)
@given(batch=prefix_batches())
def test_plan_random_batch_with_prefixes_keeps_its_bounds(batch: Batch) -> None:
    """As plan.h proves them."""
    shape, hardware = batch.shape, batch.hardware
    made = batch.plan()
    assert made.num_items <= made.buffer[CAPACITY_ITEMS] and made.num_merges <= made.buffer[CAPACITY_MERGES]
    if batch.invariant:
        return
    slots = hardware.num_workers * hardware.items_per_worker * min(hardware.heads_per_bundle, shape.num_kv_heads)
    slots = 1 if hardware.num_workers == 1 else slots
    largest, heads = hardware.block_rows[0], shape.num_kv_heads
    most_groups = 0 if shape.window_left is not None else len(batch.slices) // 2
    rows = batch.cu_seqlens_q[-1] * shape.group_size
    assert made.num_items <= heads * (len(batch.slices) + most_groups + rows // largest) + slots - 1
    assert made.num_merges <= slots - 1 + heads * most_groups
    bound = made.spec.max_partial_rows(batch.cu_seqlens_q[-1], most_groups)
    assert made.num_partial_rows <= bound <= 2 * largest * (slots - 1) + 2 * heads * rows
    for _, group_rows, prefix in groups_of(made):
        assert group_rows <= largest and prefix > 0


def test_native_plan_with_groups_refuses_a_buffer_that_is_too_small_and_stays_inside_it() -> None:
    batch = make_batch([(1, 5000)] * 12, [0] + [300] * 5 + [0] + [280] * 5)
    made = batch.plan()
    assert made.num_groups == 2
    starts, lens = np.array(batch.cu_seqlens_q, np.int32), np.array(batch.seq_lens, np.int32)
    assert batch.pages is not None
    table = np.array(batch.pages.table, np.int32)
    canary = 123456789
    needed = made.num_items, made.num_merges
    for items, merges in ((needed[0] - 1, needed[1]), (needed[0], needed[1] - 1), (20, 9), (0, 0)):
        num_words = 16 + 8 * (items + merges)
        words = np.full(num_words + 64, canary, np.int32)
        with pytest.raises(ValueError, match=r"capacity_items \(\d+\) or capacity_merges \(\d+\) is too small"):
            _C.plan(
                made.spec, starts.ctypes.data, lens.ctypes.data, 12, words.ctypes.data, items, merges,
                table.ctypes.data, table.shape[1], 16,
            )  # fmt: skip
        assert (words[num_words:] == canary).all()


def test_plan_that_would_cost_too_much_to_count_without_groups_is_made_with_them() -> None:
    slow = Hardware("slow", 1, 1e18, 889.0, 0.0)
    batch = make_batch([(1, 700)] * 20, [0] + [40] * 19, hardware=slow)
    with pytest.raises(ValueError, match="the predicted cost of the batch must be at most"):
        replace(batch, pages=None).plan()
    assert groups_of(batch.plan()) == [(0, 80, 640)]


# What is taken and refused


def test_plan_takes_block_tables_as_lists_arrays_and_cpu_tensors_alike() -> None:
    table = make_pages([5000, 5000], [0, 300], 16).table
    shape = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 64, "hardware": cpu_hardware(1), "page_size": 16}
    expected = plan([0, 1, 2], [5000, 5000], block_table=table, **shape)
    assert expected.num_groups == 1
    wide = np.repeat(np.array(table, np.int32), 2, axis=1)
    for given_table in (np.array(table), np.array(table, np.int32), torch.tensor(table), wide[:, ::2]):
        made = plan([0, 1, 2], [5000, 5000], block_table=given_table, **shape)
        assert made.items().tolist() == expected.items().tolist()


def test_plan_of_nothing_with_a_block_table_is_empty() -> None:
    shape = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 64, "page_size": 16}
    assert plan([0], [], block_table=np.empty((0, 4), np.int32), **shape).num_items == 0
    assert plan([0, 1, 2], [0, 0], block_table=np.empty((2, 0), np.int32), **shape).num_items == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"page_size": None}, "block_table and page_size must be given both or neither, got no page_size"),
        ({"block_table": None}, "block_table and page_size must be given both or neither, got no block_table"),
        ({"page_size": 0}, r"page_size must be an integer in \[1, 2147483647\], got 0"),
        ({"page_size": 16.0}, r"page_size must be an integer in \[1, 2147483647\], got 16.0"),
        ({"block_table": [1, 2, 3]}, r"block_table must have 2 dimensions, got shape \[3\]"),
        ({"block_table": [[1, 2, 3]]}, "block_table must have a row for each of the 2 seq_lens, got 1 rows"),
        ({"block_table": [[1, 2], [1, 2]]}, r"max_pages >= 3, as seq_lens\[1\] is 40 and page_size 16, got 2"),
        ({"block_table": [[0.5] * 3] * 2}, "block_table must hold integers, got float64"),
        ({"block_table": [[1], [2, 3]]}, "block_table must be a matrix of integers"),
    ],
)
def test_plan_bad_block_table_is_refused_by_name_value_and_bound(change: dict[str, Any], message: str) -> None:
    arguments = {"block_table": [[1, 2, 3], [1, 2, 4]], "page_size": 16, **change}
    with pytest.raises(ValueError, match=message):
        plan([0, 1, 2], [30, 40], num_q_heads=8, num_kv_heads=2, head_dim=64, **arguments)
