"""Random batches: a plan covers every (row, key) pair once, merges what it split, keeps its bounds, equals its twin."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mixattn import _C
from mixattn.ops.plan import Hardware, WorkPlan, plan
from mixattn.ops.reference import visible_keys
from tests.ops.plan_twin import SMALL, Pages, Shape, plan_twin, visible_range

CAPACITY_ITEMS, CAPACITY_MERGES = 6, 7
"""Words of the header."""


@dataclass(frozen=True)
class Batch:
    """The arguments of one call of ``plan``."""

    slices: list[tuple[int, int]]
    shape: Shape
    hardware: Hardware
    invariant: bool = False
    pages: Pages | None = None

    @property
    def cu_seqlens_q(self) -> list[int]:
        return [0, *np.cumsum([q_len for q_len, _ in self.slices]).tolist()]

    @property
    def seq_lens(self) -> list[int]:
        return [kv_len for _, kv_len in self.slices]

    def plan(self) -> WorkPlan:
        shape = self.shape
        return plan(
            self.cu_seqlens_q,
            self.seq_lens,
            num_q_heads=shape.num_q_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            v_head_dim=shape.v_head_dim,
            kv_element_bytes=shape.kv_element_bytes,
            causal=shape.causal,
            window_left=shape.window_left,
            invariant=self.invariant,
            hardware=self.hardware,
            block_table=None if self.pages is None else self.pages.table,
            page_size=None if self.pages is None else self.pages.page_size,
        )


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    num_kv_heads = draw(st.integers(1, 4))
    return Shape(
        num_q_heads=num_kv_heads * draw(st.integers(1, 16)),
        num_kv_heads=num_kv_heads,
        head_dim=draw(st.sampled_from([8, 64, 72, 128, 256])),
        kv_element_bytes=draw(st.sampled_from([1, 2, 4])),
        causal=draw(st.booleans()),
        window_left=draw(st.none() | st.integers(0, 5000)),
        v_head_dim=draw(st.none() | st.sampled_from([8, 128])),
    )


@st.composite
def hardwares(draw: st.DrawFn) -> Hardware:
    workers_per_core = draw(st.none() | st.integers(1, 4))
    return Hardware(
        name="drawn",
        num_workers=draw(st.integers(1, 300 // (workers_per_core or 1))) * (workers_per_core or 1),
        flops_per_s=draw(st.sampled_from([1e9, 170e9, 7.5e12])),
        bytes_per_s=draw(st.sampled_from([1e9, 12.5e9, 25.4e9])),
        item_overhead_s=draw(st.sampled_from([0.0, 1e-7, 1e-6, 1e-3])),
        block_rows=draw(st.sampled_from([(128, 64, 16), (256, 16, 16), (47, 20, 3), (32, 32, 32)])),
        row_granule=draw(st.sampled_from([None, 1, 8])),
        split_tokens=draw(st.integers(1, 512)),
        items_per_worker=draw(st.integers(1, 8)),
        heads_per_bundle=draw(st.integers(1, 16)),
        workers_per_core=workers_per_core,
        max_splits=draw(st.integers(1, 64)),
        separates_small=draw(st.booleans()),
        invariant_split_tokens=draw(st.integers(100, 2000)),
    )


@st.composite
def batches(
    draw: st.DrawFn,
    max_slices: int = 64,
    max_q: int = 300,
    max_kv: int = 4000,
    is_invariant: st.SearchStrategy[bool] = st.booleans(),  # noqa: B008
) -> Batch:
    q_lens = st.just(1) | st.integers(0, max_q)  # decodes are most of a real batch
    slices = draw(st.lists(st.tuples(q_lens, st.integers(0, max_kv)), min_size=1, max_size=max_slices))
    return Batch(slices, draw(shapes()), draw(hardwares()), draw(is_invariant))


@settings(max_examples=250)
@given(batch=batches())
def test_plan_random_batch_equals_its_python_twin(batch: Batch) -> None:
    made = batch.plan()
    twin = plan_twin(batch.cu_seqlens_q, batch.seq_lens, batch.shape, batch.hardware, invariant=batch.invariant)
    assert made.buffer[: _C.PLAN_HEADER_WORDS].tolist() == twin.header
    assert made.items().view(np.int32).reshape(-1, _C.WORK_ITEM_WORDS).tolist() == twin.items
    assert made.merges().view(np.int32).reshape(-1, _C.MERGE_WORDS).tolist() == twin.merges
    assert made.cost.flops == sum(price.flops for price in twin.prices)
    assert made.cost.bytes == sum(price.bytes for price in twin.prices)
    assert made.cost.predicted_s == twin.makespan_fs * 1e-15
    is_behind = [batch.hardware.separates_small and kind == SMALL for kind in made.items()["kind"]]
    order = [(behind, -price.total_fs) for behind, price in zip(is_behind, twin.prices, strict=True)]
    assert order == sorted(order)


@settings(max_examples=250)
@given(batch=batches())
def test_plan_random_batch_covers_every_row_and_key_once(batch: Batch) -> None:
    """By intervals: row tiles partition a slice's rows, their pieces partition a range that holds all visible keys."""
    shape = batch.shape
    items = batch.plan().items()
    keys = ("seq_idx", "kv_head", "row_begin", "kv_begin")
    items = items[np.lexsort([items[key] for key in reversed(keys)])]
    num_tiles_seen = 0
    for seq_idx, (q_len, kv_len) in enumerate(batch.slices):
        of_slice = items[items["seq_idx"] == seq_idx]
        visible = np.array([visible_range(token, q_len, kv_len, shape) for token in range(q_len)]).reshape(-1, 2)
        visible = np.repeat(visible, shape.group_size, axis=0)  # [packed rows, 2]
        for kv_head in range(shape.num_kv_heads):
            of_head = of_slice[of_slice["kv_head"] == kv_head]
            starts = np.flatnonzero(np.diff(of_head["row_begin"], prepend=-1))
            row_end = 0
            for pieces in np.split(of_head, starts[1:]) if len(of_head) else []:
                num_tiles_seen += 1
                assert pieces["row_begin"][0] == row_end, "a gap or an overlap of rows"
                assert (pieces["num_rows"] == pieces["num_rows"][0]).all()
                rows = visible[row_end : row_end + int(pieces["num_rows"][0])]
                row_end += int(pieces["num_rows"][0])
                assert (pieces["kv_begin"][1:] == pieces["kv_end"][:-1]).all(), "a gap or an overlap of keys"
                assert (pieces["kv_begin"] <= pieces["kv_end"]).all()
                seeing = rows[rows[:, 0] < rows[:, 1]]
                begin, end = int(pieces["kv_begin"][0]), int(pieces["kv_end"][-1])
                if len(seeing):  # exactly the keys that some row sees: none is missing, none is read in vain
                    assert (begin, end) == (seeing[:, 0].min(), seeing[:, 1].max())
                    assert (pieces["kv_begin"] < pieces["kv_end"]).all(), "an empty piece beside others"
                else:
                    assert len(pieces) == 1
                    assert begin == end
            assert row_end == len(visible)
    assert num_tiles_seen == len(np.unique(items[["seq_idx", "kv_head", "row_begin"]]))


@settings(max_examples=250)
@given(batch=batches())
def test_plan_random_batch_merges_exactly_what_it_split(batch: Batch) -> None:
    made = batch.plan()
    items, merges = made.items(), made.merges()
    direct = items[items["merge_idx"] < 0]
    assert (direct["merge_idx"] == -1).all()
    assert (direct["partial_row"] == 0).all()
    tile = ["seq_idx", "kv_head", "row_begin"]
    assert len(np.unique(direct[tile])) == len(direct), "a row tile is split but not merged"
    parts = items[items["merge_idx"] >= 0]
    parts = parts[np.lexsort([parts["kv_begin"], parts["merge_idx"]])]
    num_splits = np.bincount(parts["merge_idx"], minlength=made.num_merges)
    assert num_splits.tolist() == merges["num_splits"].tolist()
    assert (num_splits >= 2).all()
    group = merges[parts["merge_idx"]]
    for name in (*tile, "num_rows"):
        assert (parts[name] == group[name]).all(), name
    split_idx = np.arange(len(parts)) - np.repeat(np.cumsum(num_splits) - num_splits, num_splits)
    assert (parts["partial_row"] == group["partial_row"] + split_idx * group["num_rows"]).all()
    rows_used = merges["num_splits"] * merges["num_rows"]
    assert merges["partial_row"].tolist() == (np.cumsum(rows_used) - rows_used).tolist(), "partial rows overlap"
    assert made.num_partial_rows == rows_used.sum()


@settings(max_examples=250)
@given(batch=batches(is_invariant=st.just(False)))
def test_plan_random_batch_keeps_its_bounds(batch: Batch) -> None:
    """Capacities as plan.h proves them, kinds and split points as the hardware asks for them."""
    shape, hardware = batch.shape, batch.hardware
    made = batch.plan()
    items, merges = made.items(), made.merges()
    slots = hardware.num_workers * hardware.items_per_worker * min(hardware.heads_per_bundle, shape.num_kv_heads)
    slots = 1 if hardware.num_workers == 1 else slots
    largest = hardware.block_rows[0]
    rows_bound = batch.cu_seqlens_q[-1] * shape.group_size // largest
    num_tiles = len(np.unique(items[["seq_idx", "kv_head", "row_begin"]]))
    assert num_tiles <= shape.num_kv_heads * (len(batch.slices) + rows_bound)
    assert made.num_items <= num_tiles + slots - 1
    assert made.num_merges <= slots - 1
    assert made.num_partial_rows <= made.spec.max_partial_rows(batch.cu_seqlens_q[-1]) <= 2 * largest * (slots - 1)
    assert len(made.buffer) == (
        _C.PLAN_HEADER_WORDS
        + _C.WORK_ITEM_WORDS * made.buffer[CAPACITY_ITEMS]
        + _C.MERGE_WORDS * made.buffer[CAPACITY_MERGES]
    )

    block_rows = np.array([*hardware.block_rows, 0])
    assert (items["num_rows"] <= block_rows[items["kind"]]).all()
    assert (items["num_rows"] > block_rows[items["kind"] + 1]).all()
    assert (merges["num_splits"] <= hardware.max_splits).all()
    is_inner_edge = np.zeros(len(items), bool)
    order = np.lexsort([items["kv_begin"], items["merge_idx"]])
    is_inner_edge[order[1:]] = (items["merge_idx"][order[1:]] >= 0) & (np.diff(items["merge_idx"][order]) == 0)
    assert (items["kv_begin"][is_inner_edge] % hardware.split_tokens == 0).all()


@settings(max_examples=100)
@given(batch=batches(max_slices=8, is_invariant=st.just(True)), num_workers=st.integers(1, 300))
def test_invariant_plan_splits_each_slice_as_it_would_alone_on_any_machine(batch: Batch, num_workers: int) -> None:
    hardware = replace(
        batch.hardware, num_workers=num_workers, workers_per_core=None, items_per_worker=1, item_overhead_s=1e-4
    )
    made = batch.plan()
    items = made.items()
    step = batch.hardware.invariant_split_tokens
    has_keys = items["kv_begin"] < items["kv_end"]
    assert (items["kv_begin"] // step == (items["kv_end"] - 1) // step)[has_keys].all()
    assert made.num_items <= made.buffer[CAPACITY_ITEMS] and made.num_merges <= made.buffer[CAPACITY_MERGES]
    pieces = ["kv_head", "row_begin", "num_rows", "kv_begin", "kv_end"]
    for seq_idx, one in enumerate(batch.slices):
        alone = replace(batch, slices=[one], hardware=hardware).plan().items()
        in_batch = items[items["seq_idx"] == seq_idx]
        assert sorted(alone[pieces].tolist()) == sorted(in_batch[pieces].tolist())


@settings(max_examples=40)
@given(batch=batches(max_slices=4, max_q=20, max_kv=60))
def test_plan_small_batch_covers_the_reference_mask_once(batch: Batch) -> None:
    """Pair by pair, against the mask that defines the semantics."""
    shape = batch.shape
    items = batch.plan().items()
    for seq_idx, (q_len, kv_len) in enumerate(batch.slices):
        mask = visible_keys(q_len, kv_len, causal=shape.causal, window_left=shape.window_left).numpy()
        mask = np.repeat(mask, shape.group_size, axis=0)
        for kv_head in range(shape.num_kv_heads):
            times_covered = np.zeros(mask.shape, int)
            for item in items[(items["seq_idx"] == seq_idx) & (items["kv_head"] == kv_head)]:
                rows = slice(item["row_begin"], item["row_begin"] + item["num_rows"])
                times_covered[rows, item["kv_begin"] : item["kv_end"]] += 1
            assert (times_covered[mask] == 1).all()
            assert times_covered.max(initial=0) <= 1


def test_plan_one_dear_slice_meets_the_bound_on_items() -> None:
    """The bound is tight: last tiles of a single row, and one tile split into as many pieces as there are slots."""
    hardware = Hardware("eager", 132, 1e12, 1e9, 0.0, split_tokens=1, max_splits=1000)
    made = Batch([(129, 10), (1, 1_000_000), (257, 7)], Shape(1, 1, 64, 4, False, None), hardware).plan()
    assert made.num_items == (2 + 1 + 3) + 132 * 4 - 1 == made.buffer[CAPACITY_ITEMS]


def test_plan_slices_just_above_the_target_meet_the_bounds_on_merges_and_partial_rows() -> None:
    """One slice less than there are slots, all alike: each costs a little more than the target and is halved."""
    slots = 8 * 4
    hardware = Hardware("eager", 8, 1e12, 1e9, 0.0, split_tokens=1)
    made = Batch([(128, 500)] * (slots - 1), Shape(1, 1, 64, 4, False, None), hardware).plan()
    assert made.num_merges == slots - 1 == made.buffer[CAPACITY_MERGES]
    assert made.num_partial_rows == 2 * 128 * (slots - 1) == made.spec.max_partial_rows(128 * (slots - 1))


def test_plan_slices_split_as_often_as_they_may_be_meet_the_bound_on_partial_rows() -> None:
    hardware = Hardware("eager", 100, 1e12, 1e9, 0.0, split_tokens=1, max_splits=3)
    made = Batch([(2, 500)] * 4, Shape(3, 1, 64, 4, False, None), hardware).plan()
    assert made.num_partial_rows == 4 * 2 * 3 * 3 == made.spec.max_partial_rows(4 * 2)
