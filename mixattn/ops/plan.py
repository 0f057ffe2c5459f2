"""The work plan of a step: slices in, work items of near-equal cost out, for every backend alike; ``mixattn.plan``.

The planner itself is ``csrc/common/plan.h``; the words that it writes are laid out in ``csrc/common/work_item.h``.
"""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mixattn import _C, env

Words = npt.NDArray[np.int32]

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

ITEM_DTYPE = np.dtype(
    [
        ("seq_idx", "<i4"),
        ("kv_head", "<i4"),
        ("row_begin", "<i4"),
        ("num_rows", "<u2"),
        ("kind", "<u2"),
        ("kv_begin", "<i4"),
        ("kv_end", "<i4"),
        ("merge_idx", "<i4"),
        ("partial_row", "<i4"),
    ]
)
"""struct WorkItem of work_item.h."""
MERGE_DTYPE = np.dtype(
    [
        ("seq_idx", "<i4"),
        ("kv_head", "<i4"),
        ("row_begin", "<i4"),
        ("num_rows", "<i4"),
        ("partial_row", "<i4"),
        ("num_splits", "<i4"),
        ("num_items", "<i4"),
        ("prefix_tokens", "<i4"),
    ]
)
"""struct Merge of work_item.h."""
_HEADER_NUM_ITEMS, _HEADER_NUM_MERGES, _HEADER_NUM_PARTIAL_ROWS, _HEADER_NUM_SEQS, _HEADER_TOTAL_Q = 1, 2, 3, 4, 5
_HEADER_CAPACITY_ITEMS, _HEADER_CAPACITY_MERGES, _HEADER_NUM_GROUPS = 6, 7, 13

_INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Hardware:
    """Who executes a plan, and how fast one of them is.

    Args:
        name: for people.
        num_workers: threads of a CPU, programs that the SMs of a GPU hold at once.
        flops_per_s: of one worker.
        bytes_per_s: of one worker, from memory, while the others read too.
        item_overhead_s: what an item takes besides its flops and bytes.
        block_rows: packed rows of the kernel's large, medium and small tile, descending.
        row_granule: a tile computes its rows rounded up to a multiple of this; None: all of its kind's ``block_rows``.
        split_tokens: splits start and end at multiples of this token position.
        invariant_split_tokens: an invariant plan splits at every multiple of this token position.
        items_per_worker: work is split until the dearest item is about 1 / items_per_worker of a worker's share.
            Where workers share cores this is of decodes and other small tiles only.
        heads_per_bundle: kv heads whose small items, of the same rows and keys, a worker takes together: where the
            heads of a key lie side by side in memory, work is balanced by splitting keys rather than heads.
        workers_per_core: workers that share what a core (an SM) reaches, which one of them has alone while the others
            are idle; a divisor of num_workers. Tiles larger than the small kind are then split no further than their
            partial results are worth: into about 1, 2, 4 or 8 items for each core, whichever is estimated to end first.
            None: they are split as small ones are.
        max_splits: pieces that the keys of one row tile are split into at most.
        separates_small: whether items of the small kind come behind all others, because they are drawn by workers of
            their own beside those that draw the others.
        packing_rows: what a key costs a tile above the small kind besides its rows, in rows: that a CPU copies K and V.
            It decides whether slices that share a prefix are grouped.
    Raises:
        ValueError: naming the field and its bound.
    """

    name: str
    num_workers: int
    flops_per_s: float
    bytes_per_s: float
    item_overhead_s: float
    block_rows: tuple[int, int, int] = (128, 64, 16)
    row_granule: int | None = None
    split_tokens: int = 128
    invariant_split_tokens: int = 1024
    items_per_worker: int = 4
    heads_per_bundle: int = 1
    workers_per_core: int | None = None
    max_splits: int = 64
    separates_small: bool = False
    packing_rows: int = 0

    def __post_init__(self) -> None:
        for name in ("flops_per_s", "bytes_per_s"):
            rate = getattr(self, name)
            if not 0 < rate < math.inf or not 1 <= round(1e18 / rate) <= 2**50:
                raise ValueError(f"{name} must be in [888, 1e18], got {rate}")
        if not 0 <= self.item_overhead_s <= 1:
            raise ValueError(f"item_overhead_s must be in [0, 1], got {self.item_overhead_s}")
        if len(self.block_rows) != 3:
            raise ValueError(f"block_rows must be (large, medium, small), got {self.block_rows}")
        if self.row_granule is not None and self.row_granule < 1:
            raise ValueError(f"row_granule must be >= 1 or None, got {self.row_granule}")
        if self.workers_per_core is not None and self.workers_per_core < 1:
            raise ValueError(f"workers_per_core must be >= 1 or None, got {self.workers_per_core}")
        if self.invariant_split_tokens < 1:
            raise ValueError(f"invariant_split_tokens must be >= 1, got {self.invariant_split_tokens}")
        for invariant in (False, True):
            _make_spec(1, 1, 1, None, 1, True, None, invariant, self)


def _make_spec(
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int | None,
    kv_element_bytes: int,
    causal: bool,
    window_left: int | None,
    invariant: bool,
    hardware: Hardware,
) -> _C.PlanSpec:
    """The planner's own form of these; ValueError naming the first that is out of bounds."""

    def integer(name: str, value: Any) -> int:
        try:
            return operator.index(value)
        except TypeError:
            raise ValueError(f"{name} must be an integer, got {value!r}") from None

    if window_left is not None and not 0 <= integer("window_left", window_left) <= _INT32_MAX:
        raise ValueError(f"window_left must be in [0, {_INT32_MAX}] or None, got {window_left}")
    fields = ("num_workers", "packing_rows", "split_tokens", "items_per_worker", "heads_per_bundle", "max_splits")
    return _C.PlanSpec(
        num_q_heads=integer("num_q_heads", num_q_heads),
        num_kv_heads=integer("num_kv_heads", num_kv_heads),
        head_dim=integer("head_dim", head_dim),
        v_head_dim=integer("v_head_dim", head_dim if v_head_dim is None else v_head_dim),
        kv_element_bytes=integer("kv_element_bytes", kv_element_bytes),
        causal=causal,
        window_left=-1 if window_left is None else window_left,
        block_rows=[integer("block_rows", rows) for rows in hardware.block_rows],
        row_granule=0 if hardware.row_granule is None else integer("row_granule", hardware.row_granule),
        workers_per_core=0
        if hardware.workers_per_core is None
        else integer("workers_per_core", hardware.workers_per_core),
        fixed_split_tokens=integer("invariant_split_tokens", hardware.invariant_split_tokens) if invariant else 0,
        fs_per_kiloflop=round(1e18 / hardware.flops_per_s),
        fs_per_kilobyte=round(1e18 / hardware.bytes_per_s),
        fs_per_item=round(1e15 * hardware.item_overhead_s),
        separates_small=hardware.separates_small,
        **{name: integer(name, getattr(hardware, name)) for name in fields},
    )


_cached_spec = functools.lru_cache(maxsize=256, typed=True)(_make_spec)
"""Typed, because 2.0 equals 2 and must be refused even if 2 came before it."""


def make_spec(
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int | None,
    dtype: str,
    kv_element_bytes: int | None,
    causal: bool,
    window_left: int | None,
    invariant: bool,
    hardware: Hardware,
) -> _C.PlanSpec:
    """What ``plan`` hands to the planner, from its own arguments. ValueError names what is out of bounds."""
    if kv_element_bytes is None:
        if dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPE_BYTES)}, got {dtype!r}")
        kv_element_bytes = DTYPE_BYTES[dtype]
    return _cached_spec(
        num_q_heads, num_kv_heads, head_dim, v_head_dim, kv_element_bytes, bool(causal), window_left, bool(invariant),
        hardware,
    )  # fmt: skip


CPU_FLOPS_PER_S = 170e9
CPU_BYTES_PER_S = 12.5e9
"""One thread of the reference machine: float32 FMA with AVX-512, and streaming reads from DRAM (2 cores; two threads
reach 336 GFLOP/s and 23.8 GB/s). What a plan depends on is mostly their ratio."""
CPU_ITEM_OVERHEAD_S = 1e-6
"""An item of a single key took 0.3 us with 1 row and 1.4 us with 4 (8,192 items, head_dim 64, float32, AVX-512, one
thread of the reference machine, 2026-11)."""
CPU_PACKING_ROWS = 16
"""Per key and head of 128, packed items took 63 ns + 4.4 ns a row in bfloat16, 125 + 5.5 in float32, 60 + 5.2 in int8
(20 to 128 rows over 1k keys, one thread of a Zen 4, 2026-11)."""
CPU_AMX_BLOCK_ROWS = (512, 64, 16)
"""Where tiles multiply, memory and packing set the time of many rows: a chunk of 512 at 4k, 32 / 8 heads of 128, took
63, 50 and 47 ms with row tiles of 128, 256 and 512 in bfloat16, 194, 178 and 161 ms in float32 (one thread of a Xeon
with AMX and 2 MiB of L2, which hold the rows' q and o; 2026-11)."""
CPU_SPLIT_TOKENS = 64
"""32 KiB of K and V at head_dim 64 in float32: less is not worth an item."""
CPU_HEADS_PER_BUNDLE = 16
"""One thread over 1 x 32k keys of 8 kv heads, head_dim 128: all heads together are read 1.4x as fast as
4 and 4 (float32 and bfloat16, Zen 3, 2026-11)."""


@functools.lru_cache(maxsize=64)
def cpu_hardware(num_threads: int | None = None) -> Hardware:
    """A CPU whose threads are those of the reference machine; None is this process, with its kernels' tiles."""
    if num_threads is not None:
        return _hardware_of(num_threads, Hardware.block_rows)
    has_amx = (env.cpu_isa() or _C.cpu_info()["isa"]) == "amx"
    return _hardware_of(env.num_threads(), CPU_AMX_BLOCK_ROWS if has_amx else Hardware.block_rows)


@functools.cache
def _hardware_of(num_threads: int, block_rows: tuple[int, int, int]) -> Hardware:
    return Hardware(
        name=f"cpu-{num_threads}",
        num_workers=num_threads,
        flops_per_s=CPU_FLOPS_PER_S,
        bytes_per_s=CPU_BYTES_PER_S,
        item_overhead_s=CPU_ITEM_OVERHEAD_S,
        block_rows=block_rows,
        row_granule=1,
        packing_rows=CPU_PACKING_ROWS,
        split_tokens=CPU_SPLIT_TOKENS,
        heads_per_bundle=CPU_HEADS_PER_BUNDLE,
    )


GPU_ITEM_OVERHEAD_S = 2e-6
"""Assumed until measured: two dependent reads of device memory (block table, then K) at about 0.8 us."""


GPU_ITEMS_PER_SM = 8
"""Items that decodes are split into for each SM. Over request traces (``bench_plan --traces``, budgets of 256 to 1,024
tokens) the most loaded SM then has at most 1.10 times the mean load; with 4 up to 1.18. With 10 the bound goes up.
"""


def with_workers(hardware: Hardware, num_sms: int, programs_per_sm: int) -> Hardware:
    """The hardware with this many programs that draw items; those of an SM share what an SM of ``hardware`` reaches."""
    flops_per_s, bytes_per_s = SM_RATES[hardware.name]
    return replace(
        hardware,
        num_workers=num_sms * programs_per_sm,
        flops_per_s=flops_per_s / programs_per_sm,
        bytes_per_s=bytes_per_s / programs_per_sm,
        items_per_worker=max(1, GPU_ITEMS_PER_SM // programs_per_sm),
        workers_per_core=programs_per_sm,
    )


SM_RATES = {"H100-SXM": (989e12 / 132, 3.35e12 / 132), "A100-SXM": (312e12 / 108, 2.039e12 / 108)}
"""flops_per_s and bytes_per_s of one SM, by ``Hardware.name``."""
H100 = with_workers(Hardware("H100-SXM", 132, *SM_RATES["H100-SXM"], GPU_ITEM_OVERHEAD_S), 132, 2)
"""Data sheet of the H100 SXM5 80 GB: 989 TFLOP/s dense bfloat16, 3.35 TB/s, 132 SMs. Roofs, no kernel's figure.

The workers are the programs that an SM holds of the kernel for 16-bit heads up to 128 (triton_kernels/tiles.py).
"""
A100 = with_workers(Hardware("A100-SXM", 108, *SM_RATES["A100-SXM"], GPU_ITEM_OVERHEAD_S), 108, 1)
"""Data sheet of the A100 SXM4 80 GB: 312 TFLOP/s dense bfloat16, 2,039 GB/s, 108 SMs. Roofs, no kernel's figure."""


def base_hardware(capability: tuple[int, int]) -> Hardware:
    """The nearest GPU whose data sheet is known, for ``with_workers``."""
    return H100 if capability >= (9, 0) else A100


@dataclass(frozen=True)
class PlanCost:
    """What a plan takes by its own cost function. A prediction, not a measurement.

    Args:
        flops: of all items, rows rounded up as the kernel's tiles are, masked keys inside an item's range included.
        bytes: K and V of every item, and its rows of q and out.
        predicted_s: when the last worker, or core that workers share, ends, if each draws the next item as soon as it
            is free.
        imbalance: the most loaded worker's time over the mean; 1 is perfect.
        headroom: (Tc + Tm) / max(Tc, Tm), with Tc the compute time of the items that compute bounds and Tm the memory
            time of the others: what perfect overlap of the two could win; 1 is nothing.
    """

    flops: int
    bytes: int
    predicted_s: float
    imbalance: float
    headroom: float


@dataclass(frozen=True, eq=False)
class WorkPlan:
    """The work items of one step, as words that every kernel reads.

    Args:
        buffer: [num_words] int32, contiguous; header, items, merges (work_item.h). Not to be written.
        num_items: work items.
        num_merges: row tiles and groups whose keys are split over several items.
        num_partial_rows: rows of the partial buffers that the items write.
        hardware: what it was balanced for.
        spec: the shape and the hardware as the planner took them.
        capacity_items: items that the buffer has room for; the merges come after them.
    """

    buffer: Words
    num_items: int
    num_merges: int
    num_partial_rows: int
    hardware: Hardware
    spec: _C.PlanSpec
    capacity_items: int

    @property
    def num_groups(self) -> int:
        """Groups of neighbouring slices whose common prefix is read once for all of them."""
        return int(self.buffer[_HEADER_NUM_GROUPS])

    def items(self) -> npt.NDArray[np.void]:
        """[num_items] of ``ITEM_DTYPE``, dearest first, of each kind if they are separate; a view of the buffer."""
        begin = _C.PLAN_HEADER_WORDS
        return self.buffer[begin : begin + self.num_items * _C.WORK_ITEM_WORDS].view(ITEM_DTYPE)

    def merges(self) -> npt.NDArray[np.void]:
        """[num_merges] of ``MERGE_DTYPE``; a view of the buffer."""
        begin = _C.PLAN_HEADER_WORDS + self.capacity_items * _C.WORK_ITEM_WORDS
        return self.buffer[begin : begin + self.num_merges * _C.MERGE_WORDS].view(MERGE_DTYPE)

    @functools.cached_property
    def cost(self) -> PlanCost:
        """The plan's price, worked out when first asked for."""
        cost = _C.plan_cost(self.spec, self.buffer.ctypes.data)
        busy, makespan = cost["busy_fs"], cost["makespan_fs"]
        compute, memory = cost["compute_bound_fs"], cost["memory_bound_fs"]
        return PlanCost(
            flops=cost["flops"],
            bytes=cost["bytes"],
            predicted_s=makespan * 1e-15,
            imbalance=makespan * self.hardware.num_workers / busy if busy else 1.0,
            headroom=(compute + memory) / max(compute, memory) if compute or memory else 1.0,
        )


def plan(
    cu_seqlens_q: npt.ArrayLike,
    seq_lens: npt.ArrayLike,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int | None = None,
    dtype: str = "float32",
    kv_element_bytes: int | None = None,
    causal: bool = True,
    window_left: int | None = None,
    invariant: bool = False,
    hardware: Hardware | None = None,
    block_table: npt.ArrayLike | None = None,
    page_size: int | None = None,
) -> WorkPlan:
    """The work items that compute attention of these slices, balanced over the hardware's workers.

    With a block table, neighbouring slices of few rows whose sequences begin with the same pages (a system prompt,
    forks of a request) become groups where that costs less: the keys that they share are read once for all of a group.
    There are none with ``window_left`` and in invariant plans, and ``attention`` does not take them with
    ``alibi_slopes``.

    The same arguments give the same words. Splits along the keys start and end at multiples of the hardware's
    ``split_tokens``, whatever the page size; those of an invariant plan at every multiple of
    ``invariant_split_tokens``, whatever the load.

    Args:
        cu_seqlens_q: [num_seqs + 1] integers, from 0, not decreasing: where each slice's rows start. List, numpy array
            or CPU tensor.
        seq_lens: [num_seqs] integers >= 0: the keys of each sequence, this step's included.
        num_q_heads, num_kv_heads, head_dim, v_head_dim: the shape of the attention; ``v_head_dim`` None is head_dim.
        dtype: ``float32``, ``bfloat16`` or ``float16``: what q, k and v are held in.
        kv_element_bytes: bytes of an element of K and V if not those of ``dtype``; of int4, priced as if in bytes, 1.
        causal: whether a row sees no key behind its own position.
        window_left: how many keys before its own position a row sees; None for all.
        invariant: whether the plan is for ``attention(invariant=True)``. It needs more partial rows: for each row as
            many as its keys have splits.
        hardware: whose workers to balance over; None is this machine's CPU. For tensors on a GPU take the GPU's
            (``mixattn.device_hardware``): few items leave most of it idle.
        block_table: [num_seqs, max_pages] int32, the page ids that ``attention`` will be called with, as a list, numpy
            array or CPU tensor; of each sequence only the entries of pages that it has are read. None: no slices are
            grouped.
        page_size: tokens per page, >= 1; with ``block_table`` only.
    Raises:
        ValueError: naming the argument, its value and the bound.
    """
    starts = _int32_array("cu_seqlens_q", cu_seqlens_q, 1)
    lens = _int32_array("seq_lens", seq_lens, 1)
    num_seqs = len(lens)
    if len(starts) != num_seqs + 1:
        raise ValueError(
            f"cu_seqlens_q must be [num_seqs + 1] = [{num_seqs + 1}] as seq_lens is [{num_seqs}], got [{len(starts)}]"
        )
    _C.check_slices(starts.ctypes.data, lens.ctypes.data, num_seqs)
    if hardware is None:
        hardware = cpu_hardware()
    spec = make_spec(
        num_q_heads, num_kv_heads, head_dim, v_head_dim, dtype, kv_element_bytes, causal, window_left, invariant,
        hardware,
    )  # fmt: skip
    total_q = int(starts[-1])
    group_size = num_q_heads // num_kv_heads
    if total_q * group_size > _INT32_MAX:
        raise ValueError(f"cu_seqlens_q[{num_seqs}] must be at most (2^31 - 1) / {group_size}, got {total_q}")
    pages = _page_table(block_table, page_size, lens)
    num_groups = 0 if pages is None else spec.max_groups(num_seqs)
    capacity_items, capacity_merges = spec.max_items(total_q, num_seqs, num_groups), spec.max_merges(num_groups)
    if invariant:
        capacity_items, capacity_merges = _invariant_capacity(starts, lens, num_q_heads, num_kv_heads, hardware)
    num_words = _C.PLAN_HEADER_WORDS + capacity_items * _C.WORK_ITEM_WORDS + capacity_merges * _C.MERGE_WORDS
    if num_words > _INT32_MAX:
        raise ValueError(f"seq_lens: {num_seqs} slices of {total_q} rows can need {capacity_items} items, too many")
    buffer = np.empty(num_words, np.int32)
    _C.plan(
        spec, starts.ctypes.data, lens.ctypes.data, num_seqs, buffer.ctypes.data, capacity_items, capacity_merges,
        *(() if pages is None else (pages.ctypes.data, pages.shape[1], page_size)),
    )  # fmt: skip
    return WorkPlan(
        buffer=buffer,
        num_items=int(buffer[_HEADER_NUM_ITEMS]),
        num_merges=int(buffer[_HEADER_NUM_MERGES]),
        num_partial_rows=int(buffer[_HEADER_NUM_PARTIAL_ROWS]),
        hardware=hardware,
        spec=spec,
        capacity_items=capacity_items,
    )


def _page_table(block_table: npt.ArrayLike | None, page_size: int | None, lens: Words) -> Words | None:
    """``plan``'s block table, [num_seqs, max_pages]; None if there is none, or nothing in it."""
    if block_table is None and page_size is None:
        return None
    if block_table is None or page_size is None:
        missing = "block_table" if block_table is None else "page_size"
        raise ValueError(f"block_table and page_size must be given both or neither, got no {missing}")
    if not isinstance(page_size, (int, np.integer)) or not 1 <= page_size <= _INT32_MAX:
        raise ValueError(f"page_size must be an integer in [1, {_INT32_MAX}], got {page_size!r}")
    pages = _int32_array("block_table", block_table, 2)
    if len(pages) != len(lens):
        raise ValueError(f"block_table must have a row for each of the {len(lens)} seq_lens, got {len(pages)} rows")
    if len(lens) == 0:
        return None
    num_pages = -(-int(lens.max()) // page_size)
    if pages.shape[1] < num_pages:
        raise ValueError(
            f"block_table must have max_pages >= {num_pages}, as seq_lens[{int(lens.argmax())}] is {lens.max()} and "
            f"page_size {page_size}, got {pages.shape[1]}"
        )
    return pages if pages.size else None


def _invariant_capacity(
    starts: Words, lens: Words, num_q_heads: int, num_kv_heads: int, hardware: Hardware
) -> tuple[int, int]:
    """The most items and merges that an invariant plan of these slices can have; ValueError if too many rows merge."""
    num_rows = np.diff(starts.astype(np.int64)) * (num_q_heads // num_kv_heads)
    num_tiles = -(-num_rows // hardware.block_rows[0])
    num_splits = -(-lens.astype(np.int64) // hardware.invariant_split_tokens)
    is_split = num_splits > 1
    num_partial_rows = num_kv_heads * int((num_rows * num_splits)[is_split].sum())
    if num_partial_rows > _INT32_MAX:
        raise ValueError(
            f"seq_lens: an invariant plan of these {len(lens)} slices can need {num_partial_rows} partial rows, more "
            f"than {_INT32_MAX}: plan smaller chunks"
        )
    num_items = num_kv_heads * int((num_tiles * np.maximum(num_splits, 1)).sum())
    return num_items, num_kv_heads * int(num_tiles[is_split].sum())


def plan_room(
    like: WorkPlan, *, total_q: int, num_seqs: int, num_words: int, num_merges: int, num_partial_rows: int
) -> WorkPlan:
    """A plan without items, into whose buffer the plans of later steps can be copied: ``buffer[:len(words)] = words``.

    For calls that are recorded with it: their workspace is for as many merges and partial rows as its header tells.

    Args:
        like: made for the same shape, options and hardware.
        total_q, num_seqs: of the batch that is recorded.
        num_words, num_merges, num_partial_rows: of the largest plan.
    """
    capacity_items = -(-num_words // _C.WORK_ITEM_WORDS)
    buffer = np.zeros(
        _C.PLAN_HEADER_WORDS + capacity_items * _C.WORK_ITEM_WORDS + num_merges * _C.MERGE_WORDS, np.int32
    )
    buffer[: _C.PLAN_HEADER_WORDS] = like.buffer[: _C.PLAN_HEADER_WORDS]
    for word, value in (
        (_HEADER_NUM_ITEMS, 0),
        (_HEADER_NUM_MERGES, num_merges),
        (_HEADER_NUM_PARTIAL_ROWS, num_partial_rows),
        (_HEADER_NUM_SEQS, num_seqs),
        (_HEADER_TOTAL_Q, total_q),
        (_HEADER_CAPACITY_ITEMS, capacity_items),
        (_HEADER_CAPACITY_MERGES, num_merges),
        (_HEADER_NUM_GROUPS, 0),
    ):
        buffer[word] = value
    return WorkPlan(buffer, 0, num_merges, num_partial_rows, like.hardware, like.spec, capacity_items)


def _int32_array(name: str, values: npt.ArrayLike, num_dims: int) -> Words:
    """int32, contiguous, copied only if it is not so already; ValueError naming the argument."""
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        form = "a vector" if num_dims == 1 else "a matrix"
        raise ValueError(
            f"{name} must be {form} of integers on the CPU (mixattn.DevicePlan plans on a GPU): {error}"
        ) from error
    if array.ndim != num_dims:
        plural = "s" if num_dims > 1 else ""
        raise ValueError(f"{name} must have {num_dims} dimension{plural}, got shape {list(array.shape)}")
    if array.dtype == np.int32:
        return np.ascontiguousarray(array)
    if array.size == 0:
        return np.empty(array.shape, np.int32)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} must hold integers, got {array.dtype}")
    low, high = int(array.min()), int(array.max())
    if low < -_INT32_MAX - 1 or high > _INT32_MAX:
        raise ValueError(f"{name} must fit int32, got {low if low < -_INT32_MAX - 1 else high}")
    return array.astype(np.int32, order="C")
