"""How other kernels cut a batch of attention on a GPU into CTAs, as pure functions, and what such a cut is bound by.

Each follows the published schedule of its source, as of 2026-08, for bfloat16 and head_dim 128, on an H100 unless it
takes a GPU. The bound is a roofline of the units that a CTA is given, not a time of theirs: all are priced alike, by
the peak rates of the data sheet.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from mixattn.ops.plan import A100, GPU_ITEM_OVERHEAD_S, H100, Hardware, WorkPlan


@dataclass(frozen=True)
class Gpu:
    """Its SMs, and what all of them reach together by the data sheet."""

    num_sms: int
    flops_per_s: float
    bytes_per_s: float


def gpu_of(hardware: Hardware) -> Gpu:
    """The GPU whose SMs run the workers of ``hardware``."""
    num_workers = hardware.num_workers
    return Gpu(
        num_workers // (hardware.workers_per_core or 1),
        hardware.flops_per_s * num_workers,
        hardware.bytes_per_s * num_workers,
    )


H100_GPU, A100_GPU = gpu_of(H100), gpu_of(A100)

Slices = Sequence[tuple[int, int]]
"""(q_len, kv_len) of each."""


@dataclass(frozen=True)
class Shape:
    """Of the attention. Args: v_head_dim: None is head_dim."""

    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    kv_element_bytes: int = 2
    v_head_dim: int | None = None

    @property
    def value_dim(self) -> int:
        return self.head_dim if self.v_head_dim is None else self.v_head_dim

    @property
    def group_size(self) -> int:
        return self.num_q_heads // self.num_kv_heads


@dataclass(frozen=True)
class Unit:
    """What one CTA, or one draw of a persistent CTA, computes: a tile of a slice's rows, padding included."""

    seq_idx: int
    tile_rows: int
    num_keys: int


@dataclass(frozen=True)
class Schedule:
    """A batch, cut up.

    Args:
        units: in the order in which they are given out, each to the SM that is free first.
        ctas_per_sm: that run at once.
        num_empty: CTAs that are launched and find nothing to do.
        num_partial_rows: rows of float32 partial results, a row per query head, token and split.
        num_merge_rows: rows that are merged from them.
    """

    units: list[Unit]
    ctas_per_sm: int
    num_empty: int = 0
    num_partial_rows: int = 0
    num_merge_rows: int = 0


@dataclass(frozen=True)
class Bound:
    """What bounds a schedule.

    Args:
        bound_us: when the last SM ends.
        imbalance: the most loaded SM's cost over the mean.
        headroom: as ``PlanCost.headroom``, over the schedule's units.
    """

    bound_us: float
    imbalance: float
    headroom: float


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def bound_of(schedule: Schedule, slices: Slices, shape: Shape, gpu: Gpu = H100_GPU) -> Bound:
    """The roofline of a schedule over SMs at peak rates; keys that tiles share are read once.

    A unit takes GPU_ITEM_OVERHEAD_S besides, under which the SM's other CTAs go on; a partial row is written and read
    again. An SM is taken to reach its rates with any number of CTAs, which favours schedules of small ones.
    """
    read: dict[int, int] = defaultdict(int)
    for unit in schedule.units:
        read[unit.seq_idx] += unit.num_keys
    sms = [0.0] * gpu.num_sms
    dims = shape.head_dim + shape.value_dim
    compute_bound_s = memory_bound_s = 0.0
    for unit in schedule.units:
        distinct = slices[unit.seq_idx][1] * shape.num_kv_heads
        fetched = unit.num_keys * min(1.0, distinct / read[unit.seq_idx]) if unit.num_keys else 0.0
        compute_s = 2 * dims * unit.tile_rows * unit.num_keys / gpu.flops_per_s * gpu.num_sms
        memory_s = dims * shape.kv_element_bytes * fetched / gpu.bytes_per_s * gpu.num_sms
        if compute_s > memory_s:
            compute_bound_s += compute_s
        else:
            memory_bound_s += memory_s
        cost = GPU_ITEM_OVERHEAD_S / schedule.ctas_per_sm + max(compute_s, memory_s)
        heapq.heapreplace(sms, sms[0] + cost)
    partial_s = schedule.num_partial_rows * partial_row_bytes(shape) * 2 / gpu.bytes_per_s
    mean, longer_s = sum(sms) / len(sms), max(compute_bound_s, memory_bound_s)
    return Bound(
        bound_us=(max(sms) + partial_s) * 1e6,
        imbalance=max(sms) / mean if mean else 1.0,
        headroom=(compute_bound_s + memory_bound_s) / longer_s if longer_s else 1.0,
    )


def partial_row_bytes(shape: Shape) -> int:
    return 4 * (shape.value_dim + 1)


def visible_end(q_len: int, kv_len: int, packed_end: int, group_size: int) -> int:
    """Keys that the packed rows before packed_end see, all together, under the causal mask."""
    return min(max(kv_len - q_len + ceil_div(packed_end, group_size), 0), kv_len)


def row_tiles(q_len: int, kv_len: int, tile: int, group_size: int) -> list[int]:
    """The keys of each tile of packed rows."""
    num_rows = q_len * group_size
    return [visible_end(q_len, kv_len, min(begin + tile, num_rows), group_size) for begin in range(0, num_rows, tile)]


def ours(plan: WorkPlan) -> Schedule:
    """The work plan of mixattn."""
    items, merges = plan.items(), plan.merges()
    units = [
        Unit(int(item["seq_idx"]), plan.hardware.block_rows[item["kind"]], int(item["kv_end"] - item["kv_begin"]))
        for item in items
    ]
    ctas_per_sm = plan.hardware.workers_per_core or 1
    return Schedule(units, ctas_per_sm, 0, plan.num_partial_rows, int(merges["num_rows"].sum()))


FA3_BLOCK_M, FA3_BLOCK_N, FA3_MAX_SPLITS = 128, 128, 128


def fa3_num_splits(num_blocks_mh: int, num_n_blocks: int) -> int:
    """Source: hopper/heuristics.h num_splits_heuristic, for K and V that fit the L2 cache."""
    if num_blocks_mh >= 0.8 * H100_GPU.num_sms or num_n_blocks <= 4:
        return 1
    most = min(FA3_MAX_SPLITS, H100_GPU.num_sms, num_n_blocks)
    waves = [num_blocks_mh * splits / H100_GPU.num_sms for splits in range(1, most + 1)]
    efficiencies = [wave / ceil_div(int(wave * 1e6), 10**6) for wave in waves]
    best = max(efficiencies)
    return next(i + 1 for i, efficiency in enumerate(efficiencies) if efficiency >= 0.85 * best)


def flash_attention_3(slices: Slices, shape: Shape) -> Schedule:
    """FlashAttention-3, varlen and paged, without CUDA graphs: one tile of 128 x 128, one CTA per SM, longest first.

    Source: hopper/flash_api.cpp get_num_splits and hopper/flash_prepare_scheduler.cu prepare_varlen_num_blocks of
    Dao-AILab/flash-attention 0251105a.
    """
    live = [(i, q_len, kv_len) for i, (q_len, kv_len) in enumerate(slices) if q_len]
    if not live:
        return Schedule([], 1)
    heads, group = shape.num_kv_heads, shape.group_size
    most_m_blocks = max(ceil_div(q_len * group, FA3_BLOCK_M) for _, q_len, _ in live)
    most_n_blocks = max(ceil_div(kv_len, FA3_BLOCK_N) for _, _, kv_len in live)
    most_splits = fa3_num_splits(heads * most_m_blocks, most_n_blocks)
    blocks = sum(ceil_div(q * group, FA3_BLOCK_M) * ceil_div(kv, FA3_BLOCK_N) for _, q, kv in live)
    blocks_per_sm = ceil_div(ceil_div(11 * blocks * heads, 10), H100_GPU.num_sms)
    units: list[Unit] = []
    num_partial_rows = num_merge_rows = 0
    for i, q_len, kv_len in sorted(live, key=lambda s: -s[2]):
        splits = max(1, min(ceil_div(ceil_div(kv_len, FA3_BLOCK_N), max(blocks_per_sm, 1)), most_splits))
        for num_keys in row_tiles(q_len, kv_len, FA3_BLOCK_M, group):
            units += [Unit(i, FA3_BLOCK_M, ceil_div(num_keys, splits))] * (splits * heads)
        if splits > 1:
            num_partial_rows += splits * q_len * shape.num_q_heads
            num_merge_rows += q_len * shape.num_q_heads
    return Schedule(units, 1, 0, num_partial_rows, num_merge_rows)


def flashinfer_prefill(slices: Slices, shape: Shape, gpu: Gpu = H100_GPU) -> Schedule:
    """FlashInfer's BatchPrefill (FA2 template): one row tile and one KV chunk for the whole batch, two CTAs per SM.

    Source: include/flashinfer/attention/scheduler.cuh PrefillSplitQOKVIndptr and utils.cuh FA2DetermineCtaTileQ of
    flashinfer-ai/flashinfer fb28d724.
    """
    live = [(i, q_len, kv_len) for i, (q_len, kv_len) in enumerate(slices) if q_len]
    if not live:
        return Schedule([], 2)
    group, heads = shape.group_size, shape.num_kv_heads
    average = sum(q_len * group for _, q_len, _ in live) / len(live)
    tile = 128 if average > 64 else 64 if average > 16 else 16

    def num_ctas(chunk: int) -> int:
        return sum(ceil_div(q_len * group, tile) * max(1, ceil_div(kv_len, chunk)) for _, q_len, kv_len in live)

    low, high = 128, max(128, *(kv_len for _, _, kv_len in live))
    while low < high:
        middle = (low + high) // 2
        if num_ctas(middle) > 2 * gpu.num_sms // heads:
            low = middle + 1
        else:
            high = middle
    units: list[Unit] = []
    num_partial_rows = num_merge_rows = 0
    for i, q_len, kv_len in live:
        num_chunks = max(1, ceil_div(kv_len, low))
        for num_keys in row_tiles(q_len, kv_len, tile, group):
            for begin in range(0, num_chunks * low, low):
                units += [Unit(i, tile, max(0, min(low, num_keys - begin)))] * heads
        if num_chunks > 1:
            num_partial_rows += num_chunks * q_len * shape.num_q_heads
            num_merge_rows += q_len * shape.num_q_heads
    return Schedule(units, 2, 0, num_partial_rows, num_merge_rows)


VLLM_BLOCK_M, VLLM_SEGMENTS, VLLM_CTAS_PER_SM = 16, 16, 6


def vllm_unified(slices: Slices, shape: Shape) -> Schedule:
    """vLLM's unified Triton kernel: tiles of 16 rows; 16 segments of the keys if all slices are decodes, and few.

    Source: vllm/v1/attention/ops/triton_unified_attention.py of vLLM 0.32.0; CTAs per SM as compiled (bench/static).
    """
    heads, group = shape.num_kv_heads, shape.group_size
    live = [(i, q_len, kv_len) for i, (q_len, kv_len) in enumerate(slices) if q_len]
    block_q = VLLM_BLOCK_M // group
    num_blocks = sum(q_len for _, q_len, _ in live) // block_q + len(slices)
    is_split = all(q_len == 1 for _, q_len, _ in live) and len(slices) <= 128 // heads
    num_segments = VLLM_SEGMENTS if is_split else 1
    units: list[Unit] = []
    for i, q_len, kv_len in live:
        for begin in range(0, q_len, block_q):
            num_keys = min(kv_len, kv_len - q_len + min(begin + block_q, q_len))
            units += [Unit(i, VLLM_BLOCK_M, ceil_div(num_keys, num_segments))] * (heads * num_segments)
    rows = sum(q_len for _, q_len, _ in live) * shape.num_q_heads if is_split else 0
    num_empty = num_blocks * heads * num_segments - len(units)
    return Schedule(units, VLLM_CTAS_PER_SM, num_empty, rows * num_segments, rows)
