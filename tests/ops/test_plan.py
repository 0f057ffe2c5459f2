"""The planner by named batches: what is split, what is not, what is refused, what it costs."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from mixattn import _C
from mixattn.ops.plan import A100, H100, Hardware, WorkPlan, cpu_hardware, plan
from tests.ops.plan_twin import LARGE, MEDIUM, PLAN_MAGIC, SMALL, Shape, plan_twin

SHAPE: dict[str, Any] = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 64}
GROUP_SIZE = 4
CPU = cpu_hardware(4)


def plan_slices(*slices: tuple[int, int], **options: Any) -> WorkPlan:
    """The plan of slices (q_len, kv_len) on four threads, eight query and two kv heads of 64, unless told otherwise."""
    cu_seqlens_q = [0, *np.cumsum([q_len for q_len, _ in slices]).tolist()]
    return plan(cu_seqlens_q, [kv_len for _, kv_len in slices], **{**SHAPE, "hardware": CPU, **options})


def of_slice(made: WorkPlan, seq_idx: int, kv_head: int = 0) -> npt.NDArray[np.void]:
    """The items of one slice and kv head, by row and key."""
    items = made.items()
    items = items[(items["seq_idx"] == seq_idx) & (items["kv_head"] == kv_head)]
    return items[np.lexsort([items["kv_begin"], items["row_begin"]])]


def ranges(items: npt.NDArray[np.void]) -> list[tuple[int, int]]:
    return [(int(item["kv_begin"]), int(item["kv_end"])) for item in items]


# What is split


def test_plan_long_decode_is_split_over_the_workers() -> None:
    made = plan_slices((1, 16_000))
    assert made.num_merges == SHAPE["num_kv_heads"]
    assert made.num_items == CPU.num_workers * CPU.items_per_worker * SHAPE["num_kv_heads"]
    assert made.cost.imbalance < 1.05
    assert made.num_partial_rows == made.num_items * GROUP_SIZE


def test_plan_heads_of_a_bundle_are_split_alike_and_only_small_items_are() -> None:
    """Four workers over a decode with two kv heads: apart, two pieces of each head; together, four of both."""
    apart = replace(CPU, num_workers=1, items_per_worker=1, heads_per_bundle=1)
    decode = [(1, 16_000)]
    for heads, num_pieces in ((1, 2), (2, 4)):
        made = plan_slices(*decode, hardware=replace(apart, num_workers=4, heads_per_bundle=heads))
        assert len(of_slice(made, 0)) == num_pieces
        assert ranges(of_slice(made, 0, kv_head=0)) == ranges(of_slice(made, 0, kv_head=1))
    chunk = [plan_slices((64, 4000), hardware=replace(CPU, heads_per_bundle=heads)).items() for heads in (1, 2)]
    assert (chunk[0] == chunk[1]).all()


def test_plan_short_decodes_are_not_split() -> None:
    made = plan_slices(*[(1, 200 + i) for i in range(32)])
    assert made.num_items == 32 * SHAPE["num_kv_heads"]
    assert made.num_merges == made.num_partial_rows == 0
    assert (made.items()["merge_idx"] == -1).all()


def test_plan_one_long_decode_among_many_short_is_split_alone() -> None:
    made = plan_slices(*[(1, 300)] * 7, (1, 30_000), *[(1, 300)] * 8)
    assert set(made.merges()["seq_idx"].tolist()) == {7}
    assert len(of_slice(made, 7)) > CPU.num_workers
    assert made.cost.imbalance < 1.1


def test_plan_prefill_chunk_beside_decodes_gets_large_tiles_and_decodes_small_ones() -> None:
    made = plan_slices((1, 900), (70, 500), (1, 1200))
    chunk = of_slice(made, 1)
    tiles = np.unique(chunk[["row_begin", "num_rows", "kind"]]).tolist()
    assert tiles == [(0, 128, LARGE), (128, 128, LARGE), (256, 24, MEDIUM)]
    for seq_idx in (0, 2):
        assert (of_slice(made, seq_idx)["kind"] == SMALL).all()
        assert (of_slice(made, seq_idx)["num_rows"] == GROUP_SIZE).all()


@pytest.mark.parametrize(
    ("num_rows", "kind"), [(1, SMALL), (16, SMALL), (17, MEDIUM), (64, MEDIUM), (65, LARGE), (128, LARGE)]
)
def test_plan_kind_is_the_smallest_tile_that_holds_the_rows(num_rows: int, kind: int) -> None:
    item = plan_slices((num_rows, 500), num_q_heads=1, num_kv_heads=1).items()[0]
    assert (item["num_rows"], item["kind"]) == (num_rows, kind)


@pytest.mark.parametrize(("num_tokens", "num_pieces"), [(512, 1), (256, 2), (128, 4)])
def test_plan_chunk_on_cores_is_split_no_further_than_its_partials_are_worth(num_tokens: int, num_pieces: int) -> None:
    """8 kv heads x 16, 8 or 4 tiles of 128 rows on 132 SMs: an item for nearly each, not for 264 programs."""
    made = plan_slices((num_tokens, 30_000), num_q_heads=32, num_kv_heads=8, head_dim=128, dtype="bfloat16",
                       hardware=H100)  # fmt: skip
    assert (made.items()["kind"] == LARGE).all()
    assert made.num_items == 8 * num_tokens * 4 // 128 * num_pieces
    assert made.cost.imbalance < 1.1


def test_plan_one_worker_splits_nothing() -> None:
    made = plan_slices((1, 100_000), (300, 4000), hardware=cpu_hardware(1))
    assert made.num_merges == 0
    assert made.cost.imbalance == 1.0


def test_plan_split_stops_where_overhead_would_outweigh_the_work() -> None:
    """A decode of 64 keys takes about 3 us of one thread; 1 us of overhead per item is not to be paid 64 times."""
    many = replace(CPU, num_workers=64, split_tokens=1)
    assert len(of_slice(plan_slices((1, 64), hardware=many), 0)) <= 3
    assert len(of_slice(plan_slices((1, 64), hardware=replace(many, item_overhead_s=0.0)), 0)) == 64


def test_plan_split_is_capped_by_max_splits_and_by_the_granule() -> None:
    many = replace(CPU, num_workers=64, max_splits=5)
    assert len(of_slice(plan_slices((1, 100_000), hardware=many), 0)) == 5
    coarse = replace(CPU, num_workers=64, split_tokens=4096)
    assert ranges(of_slice(plan_slices((1, 10_000), hardware=coarse), 0)) == [(0, 4096), (4096, 8192), (8192, 10_000)]


def test_plan_items_are_ordered_dearest_first_with_kv_heads_of_a_range_side_by_side() -> None:
    undivided = replace(CPU, split_tokens=4096)
    items = plan_slices((1, 300), (1, 900), (1, 300), (1, 600), hardware=undivided).items()
    assert items["seq_idx"].tolist() == [1, 1, 3, 3, 0, 0, 2, 2]
    assert items["kv_head"].tolist() == [0, 1] * 4


# Edges


def test_plan_empty_slices_make_no_items() -> None:
    made = plan_slices((0, 100), (1, 20), (0, 0), (3, 9), (0, 5))
    assert set(made.items()["seq_idx"].tolist()) == {1, 3}


def test_plan_rows_without_keys_make_one_empty_item_so_that_out_is_written() -> None:
    made = plan_slices((3, 0), (1, 20_000))
    assert ranges(of_slice(made, 0)) == [(0, 0)]
    item = of_slice(made, 0)[0]
    assert (item["num_rows"], item["merge_idx"], item["partial_row"]) == (3 * GROUP_SIZE, -1, 0)


def test_plan_no_slices_make_an_empty_plan() -> None:
    made = plan([0], [], **SHAPE, hardware=CPU)
    assert (made.num_items, made.num_merges, made.num_partial_rows) == (0, 0, 0)
    assert len(made.items()) == len(made.merges()) == 0
    cost = made.cost
    assert (cost.flops, cost.bytes, cost.predicted_s, cost.imbalance, cost.headroom) == (0, 0, 0.0, 1.0, 1.0)


def test_plan_more_rows_than_keys_leaves_the_first_rows_without_keys() -> None:
    """200 rows over 100 keys: the tile of tokens 0..31 sees nothing, that of 96..127 the first 28 keys."""
    made = plan_slices((200, 100), hardware=cpu_hardware(1))
    assert ranges(of_slice(made, 0)) == [(0, 0), (0, 0), (0, 0), (0, 28), (0, 60), (0, 92), (0, 100)]


def test_plan_causal_chunk_stops_each_tile_at_its_last_row() -> None:
    made = plan_slices((64, 1000), hardware=cpu_hardware(1))
    assert ranges(of_slice(made, 0)) == [(0, 968), (0, 1000)]
    assert ranges(of_slice(plan_slices((64, 1000), hardware=cpu_hardware(1), causal=False), 0)) == [(0, 1000)] * 2


def test_plan_window_cuts_keys_on_the_left() -> None:
    one = cpu_hardware(1)
    assert ranges(of_slice(plan_slices((1, 1000), hardware=one, window_left=99), 0)) == [(900, 1000)]
    assert ranges(of_slice(plan_slices((1, 1000), hardware=one, window_left=0), 0)) == [(999, 1000)]
    chunk = plan_slices((64, 1000), hardware=one, window_left=99)
    assert ranges(of_slice(chunk, 0)) == [(936 - 99, 968), (968 - 99, 1000)]
    bidirectional = plan_slices((64, 1000), hardware=one, window_left=99, causal=False)
    assert ranges(of_slice(bidirectional, 0)) == [(936 - 99, 1000), (968 - 99, 1000)]


def test_plan_window_splits_at_multiples_of_the_granule_of_the_sequence() -> None:
    """So a piece ends at the same token however long the sequence has grown."""
    eager = replace(CPU, item_overhead_s=0.0)
    pieces = ranges(of_slice(plan_slices((1, 1000), hardware=eager, window_left=500), 0))
    assert len(pieces) > 2
    assert pieces[0][0] == 999 - 500
    assert pieces[-1][1] == 1000
    assert all(end % CPU.split_tokens == 0 for _, end in pieces[:-1])


def test_plan_invariant_splits_at_every_multiple_whatever_the_load() -> None:
    hardware = replace(CPU, invariant_split_tokens=512)
    alone = plan_slices((1, 1500), hardware=replace(hardware, num_workers=1), invariant=True)
    assert ranges(of_slice(alone, 0)) == [(0, 512), (512, 1024), (1024, 1500)]
    crowd = plan_slices((1, 1500), *[(1, 9000)] * 20, hardware=hardware, window_left=800, invariant=True)
    assert ranges(of_slice(crowd, 0)) == [(1499 - 800, 1024), (1024, 1500)]
    assert ranges(of_slice(plan_slices((1, 512), hardware=hardware, invariant=True), 0)) == [(0, 512)]


def test_plan_invariant_with_more_partial_rows_than_int32_can_count_is_refused() -> None:
    with pytest.raises(ValueError, match=r"seq_lens: an invariant plan .* can need 80000000000 partial rows"):
        plan_slices((100_000, 100_000), hardware=replace(CPU, invariant_split_tokens=1), invariant=True)


def test_plan_longest_sequence_that_int32_can_name_does_not_overflow() -> None:
    """2^31 - 1 keys; every product on the way is past 2^31."""
    kv_len = 2**31 - 1
    wide = replace(CPU, max_splits=1000)
    pieces = ranges(of_slice(plan_slices((1, kv_len), hardware=wide, num_kv_heads=1), 0))
    assert pieces[0][0] == 0
    assert pieces[-1][1] == kv_len
    assert all(begin < end for begin, end in pieces)
    assert [end for _, end in pieces[:-1]] == [begin for begin, _ in pieces[1:]]
    assert len(pieces) == CPU.num_workers * CPU.items_per_worker


# The words and the inputs


def test_plan_header_says_what_the_plan_was_made_for() -> None:
    made = plan_slices((1, 9000), (5, 70), window_left=4000, causal=False)
    capacity_items, capacity_merges = made.buffer[6:8].tolist()
    assert made.buffer[: _C.PLAN_HEADER_WORDS].tolist() == [
        PLAN_MAGIC, made.num_items, made.num_merges, made.num_partial_rows, 2, 6, capacity_items, capacity_merges,
        8, 2, 64, 0, 4000, 0, 0, -1,
    ]  # fmt: skip
    assert _C.PLAN_MAGIC == PLAN_MAGIC
    assert len(made.buffer) == 16 + 8 * (capacity_items + capacity_merges)
    assert plan_slices((1, 9)).buffer[11:13].tolist() == [1, -1]
    assert plan_slices((1, 9), invariant=True).buffer[14] == CPU.invariant_split_tokens


def test_plan_same_slices_give_the_same_words() -> None:
    slices = [(1, 700), (40, 90), (1, 9000), (0, 3), (1, 700)]
    first, second = plan_slices(*slices), plan_slices(*slices)
    assert first.buffer is not second.buffer
    for view in (WorkPlan.items, WorkPlan.merges):
        assert view(first).tobytes() == view(second).tobytes()
    assert first.buffer[:16].tolist() == second.buffer[:16].tolist()


def test_plan_takes_lists_arrays_and_cpu_tensors_alike() -> None:
    starts, lens = [0, 1, 41], [9000, 300]
    expected = plan(starts, lens, **SHAPE, hardware=CPU).items().tolist()
    for make in (
        tuple,
        np.array,
        lambda x: np.array(x, np.int32),
        lambda x: np.array(x, np.uint16),
        lambda x: np.repeat(np.array(x, np.int32), 2)[::2],
        torch.tensor,
        lambda x: torch.tensor(x, dtype=torch.int32),
    ):
        assert plan(make(starts), make(lens), **SHAPE, hardware=CPU).items().tolist() == expected


def test_plan_buffer_becomes_a_tensor_without_a_copy() -> None:
    made = plan_slices((1, 9000))
    words = torch.from_numpy(made.buffer)
    assert words.dtype == torch.int32
    assert words.data_ptr() == made.buffer.ctypes.data


def test_plan_without_hardware_is_for_this_machines_threads() -> None:
    made = plan([0, 1], [100], **SHAPE)
    assert made.hardware == cpu_hardware()
    assert made.hardware.num_workers >= 1


def test_plan_module_loads_without_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import mixattn; mixattn.plan; mixattn.WorkPlan"
    subprocess.run([sys.executable, "-c", code], check=True)


# What it costs


def test_plan_cost_of_one_decode_is_its_roofline() -> None:
    hardware = Hardware("toy", 1, flops_per_s=1e9, bytes_per_s=1e9, item_overhead_s=1e-6, row_granule=1)
    cost = plan_slices((1, 1000), num_q_heads=1, num_kv_heads=1, hardware=hardware).cost
    assert cost.flops == 4 * 64 * 1000
    assert cost.bytes == 2 * 64 * 4 * (1000 + 1)
    assert cost.predicted_s == pytest.approx(cost.bytes / 1e9 + 1e-6)
    assert cost.headroom == 1.0


def test_plan_cost_prices_padding_rows_by_the_granule() -> None:
    def flops(row_granule: int | None) -> int:
        return plan_slices((1, 1000), hardware=replace(CPU, row_granule=row_granule)).cost.flops

    assert flops(None) == 4 * flops(1) == 2 * flops(8)  # 4 rows in a small tile of 16


def test_plan_cost_reads_each_key_of_a_chunk_from_memory_once() -> None:
    one = cpu_hardware(1)
    cost = plan_slices((512, 4096), hardware=one, causal=False).cost
    assert cost.bytes == SHAPE["num_kv_heads"] * 2 * 64 * 4 * (4096 + 512 * GROUP_SIZE)
    half = plan_slices((512, 4096), hardware=one, causal=False, dtype="bfloat16").cost
    assert half.bytes * 2 == cost.bytes
    assert plan_slices((512, 4096), hardware=one, causal=False, kv_element_bytes=1).cost.bytes * 4 == cost.bytes


def test_plan_cost_draws_items_longest_first() -> None:
    """Three equal items on two workers: one worker does two of them."""
    even = Hardware("even", 2, 1e12, 1e9, 0.0, split_tokens=4096)
    cost = plan_slices(*[(1, 1000)] * 3, num_q_heads=1, num_kv_heads=1, hardware=even).cost
    assert cost.imbalance == pytest.approx(2 / 1.5)
    assert cost.predicted_s == pytest.approx(2 * 2 * 64 * 4 * 1001 / 1e9)


def test_plan_cost_workers_of_a_core_are_as_fast_as_one_of_them() -> None:
    """Two cores of two: a lone item has the whole core, and four items take as long as two on each core."""
    shared = Hardware("shared", 4, 1e12, 1e9, 0.0, split_tokens=4096, workers_per_core=2)
    item_s = 2 * 64 * 4 * 1001 / 1e9
    for num_items, num_turns in ((1, 1), (2, 1), (3, 2), (4, 2)):
        cost = plan_slices(*[(1, 1000)] * num_items, num_q_heads=1, num_kv_heads=1, hardware=shared).cost
        assert cost.predicted_s == pytest.approx(num_turns * item_s / 2)


@pytest.mark.parametrize(("chunk", "expected"), [(0, 1.0), (512, 1.11), (2048, 1.43)])
def test_plan_cost_headroom_of_decodes_beside_a_chunk_is_that_of_the_roofs(chunk: int, expected: float) -> None:
    """A layer of Llama 8B on an H100, 64 decodes at 8k keys (2.15 GB, 0.64 ms) and a chunk that ends at 8k.

    By hand: chunk rows * 32 heads * 4 * 128 flops * 8192 keys at 989 TFLOP/s, beside 0.64 ms; whole tiles under the
    causal edge are a little less than that.
    """
    slices = [(1, 8192)] * 64 + [(chunk, 8192)] * (chunk > 0)
    made = plan_slices(*slices, num_q_heads=32, num_kv_heads=8, head_dim=128, dtype="bfloat16", hardware=H100)
    assert made.cost.headroom == pytest.approx(expected, abs=0.06)
    assert made.cost.imbalance < 1.05


@pytest.mark.parametrize("hardware", [cpu_hardware(1), cpu_hardware(16), H100, A100], ids=lambda h: h.name)
def test_plan_cost_equals_what_the_twin_works_out(hardware: Hardware) -> None:
    slices = [(1, 900), (300, 2000), (1, 30_000), (5, 77), (90, 40)]
    made = plan_slices(*slices, hardware=hardware)
    starts = [0, *np.cumsum([q_len for q_len, _ in slices]).tolist()]
    twin = plan_twin(starts, [kv_len for _, kv_len in slices], Shape(8, 2, 64, 4, True, None), hardware)
    compute = sum(p.compute_fs for p in twin.prices if p.compute_fs > p.memory_fs)
    memory = sum(p.memory_fs for p in twin.prices if p.compute_fs <= p.memory_fs)
    mean = sum(p.total_fs for p in twin.prices) / hardware.num_workers
    assert made.cost.headroom == pytest.approx((compute + memory) / max(compute, memory), rel=1e-12)
    assert made.cost.imbalance == pytest.approx(twin.makespan_fs / mean, rel=1e-12)
    assert made.cost.predicted_s == pytest.approx(twin.makespan_fs * 1e-15, rel=1e-12)


# What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens_q": [0, 1]}, r"cu_seqlens_q must be \[num_seqs \+ 1\] = \[3\].*got \[2\]"),
        ({"cu_seqlens_q": []}, r"cu_seqlens_q must be \[num_seqs \+ 1\] = \[3\].*got \[0\]"),
        ({"cu_seqlens_q": [1, 2, 3]}, r"cu_seqlens_q\[0\] must be 0, got 1"),
        ({"cu_seqlens_q": [0, 5, 4]}, r"cu_seqlens_q must not decrease, got 5 then 4 at 2"),
        ({"cu_seqlens_q": [[0, 1, 2]]}, r"cu_seqlens_q must have 1 dimension, got shape \[1, 3\]"),
        ({"cu_seqlens_q": [0.0, 1.0, 2.0]}, r"cu_seqlens_q must hold integers, got float64"),
        ({"cu_seqlens_q": [0, 1, 2**31]}, r"cu_seqlens_q must fit int32, got 2147483648"),
        ({"cu_seqlens_q": [0, 1, 2**31 - 1]}, r"cu_seqlens_q\[2\] must be at most .*, got 2147483647"),
        ({"cu_seqlens_q": [[0], [1, 2]]}, r"cu_seqlens_q must be a vector of integers"),
        ({"seq_lens": [3, -1]}, r"seq_lens\[1\] must be >= 0, got -1"),
        ({"seq_lens": [True, False]}, r"seq_lens must hold integers, got bool"),
        ({"seq_lens": [3, -(2**40)]}, r"seq_lens must fit int32, got -1099511627776"),
        ({"seq_lens": 5}, r"seq_lens must have 1 dimension, got shape \[\]"),
        ({"num_q_heads": 7}, r"num_q_heads must be a multiple of num_kv_heads \(2\), got 7"),
        ({"num_q_heads": 0}, r"num_q_heads must be in \[1, 65536\], got 0"),
        ({"num_kv_heads": 0}, r"num_kv_heads must be in \[1, 65536\], got 0"),
        ({"num_kv_heads": 2.0}, r"num_kv_heads must be an integer, got 2.0"),
        ({"head_dim": -64}, r"head_dim must be in \[1, 4096\], got -64"),
        ({"dtype": "float64"}, r"dtype must be one of float32, bfloat16, float16, got 'float64'"),
        ({"kv_element_bytes": 0}, r"kv_element_bytes must be in \[1, 16\], got 0"),
        ({"window_left": -1}, r"window_left must be in \[0, 2147483647\] or None, got -1"),
        ({"window_left": 1.5}, r"window_left must be an integer, got 1.5"),
        ({"window_left": 2**40}, r"window_left must be in \[0, 2147483647\] or None, got 1099511627776"),
    ],
)
def test_plan_bad_argument_is_refused_by_name_value_and_bound(change: dict[str, Any], message: str) -> None:
    arguments = {"cu_seqlens_q": [0, 1, 2], "seq_lens": [30, 40], **SHAPE, "hardware": CPU, **change}
    with pytest.raises(ValueError, match=message):
        plan(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_workers": 0}, r"num_workers must be in \[1, 65536\], got 0"),
        ({"num_workers": 4.0}, r"num_workers must be an integer, got 4.0"),
        ({"num_workers": 8192, "items_per_worker": 9}, r"items_per_worker must be in \[1, 8\], got 9"),
        ({"workers_per_core": 0}, r"workers_per_core must be >= 1 or None, got 0"),
        ({"num_workers": 9, "workers_per_core": 2}, r"workers_per_core must divide num_workers \(9\), got 2"),
        ({"heads_per_bundle": 0}, r"heads_per_bundle must be in \[1, 4096\], got 0"),
        ({"flops_per_s": 0.0}, r"flops_per_s must be in \[888, 1e18\], got 0.0"),
        ({"bytes_per_s": float("nan")}, r"bytes_per_s must be in \[888, 1e18\], got nan"),
        ({"bytes_per_s": 1e19}, r"bytes_per_s must be in \[888, 1e18\], got 1e\+19"),
        ({"item_overhead_s": -1e-6}, r"item_overhead_s must be in \[0, 1\], got -1e-06"),
        ({"block_rows": (128, 64)}, r"block_rows must be \(large, medium, small\), got \(128, 64\)"),
        ({"block_rows": (64, 128, 16)}, r"block_rows\[1\] must be in \[1, 64\], got 128"),
        ({"row_granule": 0}, r"row_granule must be >= 1 or None, got 0"),
        ({"packing_rows": -1}, r"packing_rows must be in \[0, 4096\], got -1"),
        ({"split_tokens": 0}, r"split_tokens must be in \[1, 2147483647\], got 0"),
        ({"invariant_split_tokens": 0}, "invariant_split_tokens must be >= 1, got 0"),
        ({"invariant_split_tokens": 1.5}, "invariant_split_tokens must be an integer, got 1.5"),
        ({"max_splits": 0}, r"max_splits must be in \[1, 2147483647\], got 0"),
    ],
)
def test_hardware_bad_field_is_refused_by_name_value_and_bound(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CPU, **change)


def test_plan_cost_too_large_to_count_is_refused() -> None:
    slow = replace(CPU, flops_per_s=1e5)
    with pytest.raises(ValueError, match=r"predicted cost .* at most 2\^62 fs"):
        plan_slices((100_000, 100_000), hardware=slow)
    total = replace(CPU, flops_per_s=1e9)
    assert plan_slices((100, 2_000_000), hardware=total).num_items
    with pytest.raises(ValueError, match=r"predicted cost .* at most 2\^62 fs"):
        plan_slices(*[(100, 2_000_000)] * 60, hardware=total)


def test_native_plan_refuses_a_buffer_that_is_too_small_and_stays_inside_it() -> None:
    made = plan_slices((1, 9000), (70, 500))
    starts, lens = np.array([0, 1, 71], np.int32), np.array([9000, 500], np.int32)
    canary = 123456789
    for capacity_items, capacity_merges in ((made.num_items - 1, made.num_merges), (made.num_items, 1), (1, 0), (0, 0)):
        num_words = 16 + 8 * (capacity_items + capacity_merges)
        words = np.full(num_words + 64, canary, np.int32)
        with pytest.raises(ValueError, match=r"capacity_items \(\d+\) or capacity_merges \(\d+\) is too small"):
            _C.plan(
                made.spec, starts.ctypes.data, lens.ctypes.data, 2, words.ctypes.data, capacity_items, capacity_merges
            )
        assert (words[num_words:] == canary).all()


def test_native_plan_refuses_slices_of_negative_length() -> None:
    made = plan_slices((1, 9))
    words = np.zeros(1000, np.int32)
    for starts, lens in (([0, -1], [9]), ([0, 1], [-9])):
        s, k = np.array(starts, np.int32), np.array(lens, np.int32)
        with pytest.raises(ValueError, match="cu_seqlens_q must not decrease, seq_lens must be >= 0"):
            _C.plan(made.spec, s.ctypes.data, k.ctypes.data, 1, words.ctypes.data, 50, 50)
