"""The planner on the device, emulated: the host's words, bit by bit, on any schedule and with any number of warps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import mixattn
from mixattn import _C
from mixattn.ops.plan import A100, H100, Hardware, WorkPlan, cpu_hardware, with_workers
from tests.cases import AttentionCase, assert_attention_close, make_inputs
from tests.cuda.attention_run import hardware
from tests.cuda.emulation import Emulation
from tests.ops.plan_twin import Pages, Shape
from tests.ops.test_plan_invariants import Batch
from tests.ops.test_plan_prefix import make_batch, make_pages

GARBAGE = 0x7F7F7F7F
GUARD_WORDS = 64
STATUS_WORD, NO_ROOM, BAD_SLICE, COST_TOO_LARGE = 0, 2, 1, 3
FIRST_SMALL_WORD = 15
Words = npt.NDArray[np.int32]

HARDWARE = [
    H100,
    replace(H100, separates_small=True),
    A100,
    with_workers(H100, 132, 1),
    replace(with_workers(A100, 7, 3), item_overhead_s=0.0, split_tokens=64),
    cpu_hardware(4),
    replace(cpu_hardware(1), row_granule=None),
    Hardware("odd", 60, 1e9, 25e9, 0.0, (47, 20, 3), 8, 100, 300, 3, 2, 2, 9),
    Hardware("one kind", 300, 7.5e12, 1e9, 1e-7, (32, 32, 32), None, 16, 1000, 1, 16, 4, 64),
]
SHAPES = [
    Shape(32, 8, 128, 2, True, None),
    Shape(8, 1, 64, 4, True, None),
    Shape(6, 2, 72, 1, False, None),
    Shape(21, 3, 256, 2, True, 500),
    Shape(5, 5, 64, 2, True, 0),
]


def random_batch(rng: np.random.Generator, max_slices: int) -> Batch:
    """Mostly decodes; chunks, verification slices, empty rows, rows before the first key and keys at page edges."""
    slices = []
    for _ in range(rng.integers(1, max_slices, endpoint=True)):
        kind = rng.random()
        kv_len = int(rng.choice([0, rng.integers(1, 300), rng.integers(1, 6000), rng.integers(1, 130_000)],
                                p=[0.05, 0.45, 0.4, 0.1]))  # fmt: skip
        if kind < 0.65:
            q_len = 1
        elif kind < 0.75:
            q_len = int(rng.integers(2, 10))
        elif kind < 0.85:
            q_len = 0
        else:
            q_len = int(rng.integers(2, 600))
        slices.append((q_len, kv_len if rng.random() < 0.1 else max(kv_len, q_len)))
    shape = SHAPES[rng.integers(len(SHAPES))]
    if rng.random() < 0.2:
        shape = replace(shape, window_left=int(rng.integers(0, 5000)))
    hardware = HARDWARE[rng.integers(len(HARDWARE))]
    if rng.random() < 0.3:
        hardware = replace(hardware, max_splits=int(rng.integers(1, 20)), split_tokens=int(rng.integers(1, 512)))
    pages = random_pages(rng, slices) if rng.random() < 0.5 else None
    return Batch(slices, shape, hardware, invariant=bool(rng.random() < 0.15), pages=pages)


def random_pages(rng: np.random.Generator, slices: list[tuple[int, int]]) -> Pages:
    """Most sequences begin as the one before, with anything from none to all of its pages."""
    page_size = int(rng.choice([16, 64, 256]))
    kv_lens = [kv_len for _, kv_len in slices]
    shared = [int(rng.choice([0, rng.integers(0, 5), rng.integers(0, 200), 10**6], p=[0.2, 0.1, 0.3, 0.4]))
              for _ in slices]  # fmt: skip
    return make_pages(kv_lens, shared, page_size)


def with_guard(num_words: int) -> Words:
    return np.full(num_words + GUARD_WORDS, GARBAGE, np.int32)


def plan_on_device(
    image: _C.CudaImage,
    host: WorkPlan,
    cu_seqlens_q: list[int],
    seq_lens: list[int],
    num_threads: int,
    capacity: tuple[int, int] | None = None,
    pages: Pages | None = None,
    capacity_partial_rows: int = 2**31 - 1,
) -> Words:
    """The words that the kernel writes, with the room that the host's plan had or ``capacity``; looks past them."""
    capacity_items, capacity_merges = map(int, host.buffer[6:8]) if capacity is None else capacity
    num_words = _C.PLAN_HEADER_WORDS + 8 * (capacity_items + capacity_merges)
    scratch_words = 2 * _C.cuda_plan_scratch_words(host.spec, len(seq_lens), capacity_items)
    out, scratch = with_guard(num_words), with_guard(scratch_words)
    starts, lens = np.array(cu_seqlens_q, np.int32), np.array(seq_lens, np.int32)
    table = np.array([[]] if pages is None else pages.table, np.int32)
    _C.cuda_plan(
        spec=host.spec, image=image, cu_seqlens_q=starts.ctypes.data, seq_lens=lens.ctypes.data,
        num_seqs=len(seq_lens), block_table=0 if pages is None else table.ctypes.data,
        block_table_stride=table.shape[-1], page_size=0 if pages is None else pages.page_size, out=out.ctypes.data,
        scratch=scratch.ctypes.data, capacity_items=capacity_items, capacity_merges=capacity_merges,
        capacity_partial_rows=capacity_partial_rows, num_threads=num_threads, stream=0,
    )  # fmt: skip
    assert (out[num_words:] == GARBAGE).all() and (scratch[scratch_words:] == GARBAGE).all(), "written past the end"
    return out[:num_words]


def assert_equal(words: Words, host: WorkPlan) -> None:
    """Header, items and merges; words behind them are left as they were."""
    items_end = _C.PLAN_HEADER_WORDS + 8 * host.num_items
    merges_begin = _C.PLAN_HEADER_WORDS + 8 * host.capacity_items
    merges_end = merges_begin + 8 * host.num_merges
    assert (words[:items_end] == host.buffer[:items_end]).all()
    assert (words[merges_begin:merges_end] == host.buffer[merges_begin:merges_end]).all()
    assert (words[items_end:merges_begin] == GARBAGE).all() and (words[merges_end:] == GARBAGE).all()


def check_random_batches(emulation: Emulation, seed: int, num_batches: int, max_slices: int) -> None:
    rng = np.random.default_rng(seed)
    for i in range(num_batches):
        batch = random_batch(rng, max_slices)
        host = batch.plan()
        image = emulation.image(seed=i)
        num_threads = 32 * int(rng.integers(1, 4))
        num_groups = 0 if batch.pages is None else host.spec.max_groups(len(batch.seq_lens))
        bound = host.spec.max_partial_rows(batch.cu_seqlens_q[-1], num_groups)
        words = plan_on_device(
            image, host, batch.cu_seqlens_q, batch.seq_lens, num_threads, pages=batch.pages,
            capacity_partial_rows=host.num_partial_rows if batch.invariant else bound,
        )  # fmt: skip
        assert_equal(words, host)


@pytest.mark.parametrize("seed", range(3))
def test_plan_random_batch_on_the_device_equals_the_hosts(seed: int, emulation: Emulation) -> None:
    check_random_batches(emulation, seed, num_batches=100, max_slices=24)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 120))
def test_plan_10_000_random_batches_on_the_device_equal_the_hosts(seed: int, emulation: Emulation) -> None:
    check_random_batches(emulation, seed, num_batches=500, max_slices=256)


@pytest.mark.parametrize("num_threads", [32, 64, 96, 512])
@pytest.mark.parametrize("invariant", [False, True], ids=["balanced", "invariant"])
def test_plan_of_256_slices_is_the_same_with_any_number_of_warps(
    num_threads: int, invariant: bool, emulation: Emulation
) -> None:
    slices = [(512, 3000), *[(1, 100 + 37 * i) for i in range(250)], *[(4, 900)] * 5]
    batch = Batch(slices, SHAPES[0], H100, invariant)
    host = batch.plan()
    assert_equal(plan_on_device(emulation.image(seed=1), host, batch.cu_seqlens_q, batch.seq_lens, num_threads), host)


@pytest.mark.parametrize("num_threads", [32, 96, 512])
def test_plan_of_256_slices_in_groups_is_the_same_with_any_number_of_warps(
    num_threads: int, emulation: Emulation
) -> None:
    slices = [(1, 2000 + 16 * (37 * i % 50)) for i in range(256)]
    batch = make_batch(slices, [0 if i % 40 == 0 else 120 for i in range(256)], shape=SHAPES[0], hardware=H100)
    host = batch.plan()
    assert host.num_groups == 13 and set(host.items()["kind"]) == {0, 1, 2}
    words = plan_on_device(
        emulation.image(seed=2), host, batch.cu_seqlens_q, batch.seq_lens, num_threads, pages=batch.pages
    )
    assert_equal(words, host)


def test_plan_in_groups_without_room_says_so_and_with_just_enough_is_made(emulation: Emulation) -> None:
    batch = make_batch([(1, 5000)] * 70, [0] + [300] * 69, shape=SHAPES[0], hardware=H100)
    host = batch.plan()
    arguments = (emulation.image(), host, batch.cu_seqlens_q, batch.seq_lens, 64)
    room = host.num_items, host.num_merges
    for items, merges in ((room[0] - 1, room[1]), (room[0], room[1] - 1), (0, 0)):
        words = plan_on_device(*arguments, (items, merges), batch.pages)
        assert words[STATUS_WORD] == NO_ROOM and not words[1:4].any()
        assert (words[_C.PLAN_HEADER_WORDS :] == GARBAGE).all()
    words = plan_on_device(*arguments, room, batch.pages)
    assert words[STATUS_WORD] == _C.PLAN_MAGIC and words[13] == 3
    assert (words[16 : 16 + 8 * host.num_items] == host.buffer[16 : 16 + 8 * host.num_items]).all()


@pytest.mark.parametrize("seed", range(3))
def test_plan_of_slices_that_all_cost_the_same_keeps_their_order(seed: int, emulation: Emulation) -> None:
    """Ties in every step of the sort, and a last run that is shorter."""
    batch = Batch([(1, 300)] * 37, SHAPES[0], cpu_hardware(1))
    host = batch.plan()
    assert host.items()["seq_idx"].tolist() == np.repeat(np.arange(37), 8).tolist()
    assert_equal(plan_on_device(emulation.image(seed=seed), host, batch.cu_seqlens_q, batch.seq_lens, 64), host)


@pytest.mark.parametrize("slices", [[], [(0, 0)], [(0, 7), (0, 0)], [(1, 0)]], ids=str)
def test_plan_of_next_to_nothing_equals_the_hosts(slices: list[tuple[int, int]], emulation: Emulation) -> None:
    batch = Batch(slices, SHAPES[0], H100)
    host = batch.plan()
    assert_equal(plan_on_device(emulation.image(), host, batch.cu_seqlens_q, batch.seq_lens, 64), host)


SPLIT = Batch([(1, 60_000), (40, 3000), (1, 50)], SHAPES[0], H100)


@pytest.mark.parametrize(
    ("items_left_out", "merges_left_out"), [(8, 0), (1, 0), (0, 1), (0, 10**6), (10**6, 0)], ids=str
)
def test_plan_without_room_says_so_and_writes_only_its_header(
    items_left_out: int, merges_left_out: int, emulation: Emulation
) -> None:
    host = SPLIT.plan()
    assert host.num_merges > 1
    room = max(0, host.num_items - items_left_out), max(0, host.num_merges - merges_left_out)
    words = plan_on_device(emulation.image(), host, SPLIT.cu_seqlens_q, SPLIT.seq_lens, 64, room)
    assert words[STATUS_WORD] == NO_ROOM
    assert not words[1:4].any()
    assert (words[_C.PLAN_HEADER_WORDS :] == GARBAGE).all()


def test_plan_without_room_for_its_partial_rows_says_so(emulation: Emulation) -> None:
    host = SPLIT.plan()
    arguments = (emulation.image(), host, SPLIT.cu_seqlens_q, SPLIT.seq_lens, 64)
    words = plan_on_device(*arguments, capacity_partial_rows=host.num_partial_rows - 1)
    assert words[STATUS_WORD] == NO_ROOM and not words[1:4].any()
    assert (words[_C.PLAN_HEADER_WORDS :] == GARBAGE).all()


@pytest.mark.parametrize("separates_small", [False, True], ids=["mixed", "apart"])
def test_plan_that_there_is_none_of_has_no_item_in_any_queue(separates_small: bool, emulation: Emulation) -> None:
    hardware = replace(H100, separates_small=separates_small)
    host = Batch(SPLIT.slices, SHAPES[0], hardware).plan()
    words = plan_on_device(emulation.image(), host, SPLIT.cu_seqlens_q, SPLIT.seq_lens, 64, (0, 0))
    assert words[STATUS_WORD] == NO_ROOM and words[1] == 0
    assert words[FIRST_SMALL_WORD] == (0 if separates_small else -1)


def test_plan_with_just_enough_room_is_made(emulation: Emulation) -> None:
    host = SPLIT.plan()
    room = (host.num_items, host.num_merges)
    words = plan_on_device(
        emulation.image(), host, SPLIT.cu_seqlens_q, SPLIT.seq_lens, 64, room,
        capacity_partial_rows=host.num_partial_rows,
    )  # fmt: skip
    assert words[STATUS_WORD] == _C.PLAN_MAGIC and words[1] == host.num_items
    assert (words[16 : 16 + 8 * host.num_items] == host.buffer[16 : 16 + 8 * host.num_items]).all()


@pytest.mark.parametrize(
    ("cu_seqlens_q", "seq_lens", "status"),
    [
        ([0, 1, 0, 2], [5, 5, 5], BAD_SLICE),
        ([0, 1, 2, 3], [5, -1, 5], BAD_SLICE),
        ([0, 2**30, 2**30, 2**30], [5, 5, 5], BAD_SLICE),
        ([0, 128, 256, 384], [2**31 - 1] * 3, COST_TOO_LARGE),
    ],
)
def test_plan_of_a_batch_that_has_none_says_why(
    cu_seqlens_q: list[int], seq_lens: list[int], status: int, emulation: Emulation
) -> None:
    slow = replace(cpu_hardware(1), flops_per_s=1000.0, bytes_per_s=1e9)
    host = Batch([(1, 1), (1, 1), (1, 1)], SHAPES[1], slow).plan()
    words = plan_on_device(emulation.image(), host, cu_seqlens_q, seq_lens, 64)
    assert words[STATUS_WORD] == status and not words[1:4].any()


def test_plan_whose_items_together_cost_too_much_says_so_as_the_host_does(emulation: Emulation) -> None:
    """Each of 4,000 tiles costs little less than the most: their sum would pass 2^64."""
    slow = replace(cpu_hardware(1), flops_per_s=1e9, bytes_per_s=1e6)
    shape = Shape(1, 1, 256, 4, True, None)
    slices = [(1, 2_100_000)] * 4000
    cheap = Batch([(1, 1)] * 4000, shape, slow)
    with pytest.raises(ValueError, match="the predicted cost of the batch must be at most"):
        replace(cheap, slices=slices).plan()
    one = replace(cheap, slices=slices[:1]).plan()
    assert one.cost.predicted_s * 1e15 > 2**61
    words = plan_on_device(emulation.image(), cheap.plan(), cheap.cu_seqlens_q, [2_100_000] * 4000, 64)
    assert words[STATUS_WORD] == COST_TOO_LARGE


# ---- the door -------------------------------------------------------------------------------------------------------


def device_plan(**options: object) -> mixattn.DevicePlan:
    return mixattn.DevicePlan(
        **{"max_num_seqs": 8, "max_total_q": 64, "num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128,
           "hardware": H100, "device": "cpu", **options}
    )  # fmt: skip


def as_tensor(values: list[Any]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("invariant", [False, True], ids=["balanced", "invariant"])
def test_device_plan_updated_again_in_the_same_buffer_is_the_hosts_each_time(
    invariant: bool, driver: Emulation
) -> None:
    made = device_plan(invariant=invariant, max_kv_len=20_000)
    address = made.buffer.data_ptr()
    for slices in ([(1, 15_000), (40, 900), (3, 700)], [(1, 20)], [(1, 18_000)] * 8):
        host = Batch(slices, SHAPES[0], H100, invariant)
        made.update(as_tensor(host.cu_seqlens_q), as_tensor(host.seq_lens))
        read, expected = made.read(), host.plan()
        assert made.buffer.data_ptr() == address
        assert (read.items() == expected.items()).all() and (read.merges() == expected.merges()).all()
        assert read.num_partial_rows == expected.num_partial_rows
        assert read.cost == expected.cost


def test_device_plan_of_a_replay_with_fewer_slices_ignores_the_empty_ones(driver: Emulation) -> None:
    made = device_plan()
    made.update(as_tensor([0, 1, 5, 5, 5]), as_tensor([900, 300, 0, 0]))
    assert (made.read().items() == Batch([(1, 900), (4, 300)], SHAPES[0], H100).plan().items()).all()


def test_device_plan_runs_attention(driver: Emulation) -> None:
    case = AttentionCase("device-plan", (1, 40, 9), (300, 90, 200), num_q_heads=6)
    inputs = make_inputs(case, torch.bfloat16)
    options = {name: case.plan_options[name] for name in ("num_q_heads", "num_kv_heads", "head_dim")}
    made = device_plan(**options, hardware=hardware(8, 64))
    made.update(inputs.cu_seqlens_q, inputs.seq_lens)
    out, lse = mixattn.attention(
        inputs.q, inputs.k_cache, inputs.v_cache, **inputs.index_tensors, plan=made.buffer, return_lse=True,
        backend="cuda",
    )  # fmt: skip
    assert made.read().num_merges > 0
    assert_attention_close(case, inputs, out, lse)


def test_device_plan_with_a_block_table_is_the_hosts_with_it(driver: Emulation) -> None:
    made = device_plan(page_size=16)
    for num_groups, shared in ((1, [0] + [100] * 7), (0, [0] * 8), (2, [0, 80, 80, 0, 90, 90, 0, 0])):
        batch = make_batch([(1, 2000)] * 8, shared, shape=SHAPES[0], hardware=H100)
        assert batch.pages is not None
        made.update(as_tensor(batch.cu_seqlens_q), as_tensor(batch.seq_lens), torch.tensor(batch.pages.table).int())
        read, expected = made.read(), batch.plan()
        assert read.num_groups == expected.num_groups == num_groups
        assert (read.items() == expected.items()).all() and (read.merges() == expected.merges()).all()


def test_device_plan_reads_why_there_is_none(driver: Emulation) -> None:
    made = device_plan(max_num_seqs=1, max_total_q=1, hardware=cpu_hardware(1))
    made.update(as_tensor([0, 2000]), as_tensor([2000]))
    with pytest.raises(ValueError, match="needs more items, merges or partial rows than max_num_seqs, max_total_q"):
        made.read()
    with pytest.raises(ValueError, match="a device found no items for its batch"):
        mixattn.attention(
            torch.zeros(2000, 32, 128, dtype=torch.bfloat16), *torch.zeros(2, 125, 16, 8, 128, dtype=torch.bfloat16),
            cu_seqlens_q=as_tensor([0, 2000]), seq_lens=as_tensor([2000]),
            block_table=torch.arange(125, dtype=torch.int32)[None], plan=made.buffer, backend="cuda",
        )  # fmt: skip
    made.update(as_tensor([0, 1]), as_tensor([2000]))
    assert made.read().num_items == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_num_seqs": 0}, r"max_num_seqs must be in \[1, 2147483647\], got 0"),
        ({"max_total_q": 2**31}, r"max_total_q must be in \[1, 2147483647\], got 2147483648"),
        ({"max_num_seqs": 2**28}, "max_num_seqs 268435456 and max_total_q 64 can need .* items, too many"),
        ({"invariant": True}, "max_kv_len must be >= 1 for an invariant plan, got None"),
        ({"num_q_heads": 30}, "num_q_heads must be a multiple of num_kv_heads"),
        ({"page_size": 0}, r"page_size must be in \[1, 2147483647\] or None, got 0"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
    ],
)
def test_device_plan_that_cannot_be_is_refused(options: dict[str, object], message: str, driver: Emulation) -> None:
    with pytest.raises(ValueError, match=message):
        device_plan(**options)


@pytest.mark.parametrize(
    ("cu_seqlens_q", "seq_lens", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), as_tensor([1, 2]), r"cu_seqlens_q must be torch\.int32, got torch\.int64"),
        (as_tensor([0, 1]), as_tensor([[1]]), r"seq_lens must have 1 dimension, got shape \[1, 1\]"),
        (as_tensor([0, 1]), as_tensor([1, 2]), r"cu_seqlens_q must be \[num_seqs \+ 1\] = \[3\]"),
        (as_tensor([0] * 10), as_tensor([0] * 9), "seq_lens must have at most max_num_seqs = 8 elements, got 9"),
        (as_tensor([0, 1, 2])[::2], as_tensor([1]), "the last dimension of cu_seqlens_q must be contiguous"),
    ],
)
def test_device_plan_of_other_tensors_is_refused(
    cu_seqlens_q: torch.Tensor, seq_lens: torch.Tensor, message: str, driver: Emulation
) -> None:
    with pytest.raises(ValueError, match=message):
        device_plan().update(cu_seqlens_q, seq_lens)


@pytest.mark.parametrize(
    ("page_size", "block_table", "message"),
    [
        (16, None, "block_table must be given, as the plan has a page_size"),
        (None, as_tensor([[1]]), "block_table must be None, as the plan was made without page_size"),
        (16, as_tensor([[1], [2]]), r"block_table must be \[num_seqs, max_pages\] = \[1, max_pages\], got .*\[2, 1\]"),
        (16, as_tensor([1]), r"block_table must be \[num_seqs, max_pages\] = \[1, max_pages\], got shape \[1\]"),
        (16, torch.tensor([[1]]), r"block_table must be torch\.int32, got torch\.int64"),
    ],
)
def test_device_plan_of_another_block_table_is_refused(
    page_size: int | None, block_table: torch.Tensor | None, message: str, driver: Emulation
) -> None:
    with pytest.raises(ValueError, match=message):
        device_plan(page_size=page_size).update(as_tensor([0, 1]), as_tensor([9]), block_table)


def test_device_plan_without_a_gpu_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="backend='cuda' cannot run on cpu tensors"):
        device_plan()
