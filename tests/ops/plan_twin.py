"""The planner in plain Python: the truth that ``csrc/common/plan.h`` is held to, word for word.

It is written for reading: no capacity, no scratch, integers of any size, Python's own stable sort. Every formula is
restated here from its definition; nothing is shared with the compiled planner but ``Hardware``.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from mixattn.ops.plan import Hardware

PLAN_MAGIC = 0x6D780001
LARGE, MEDIUM, SMALL = 0, 1, 2
MAX_COST_FS = 2**62


@dataclass(frozen=True)
class Shape:
    """What is the same for every slice of a batch."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    kv_element_bytes: int
    causal: bool
    window_left: int | None

    @property
    def group_size(self) -> int:
        return self.num_q_heads // self.num_kv_heads


@dataclass(frozen=True)
class Tile:
    """Some packed rows of one slice and the keys that they see, all together."""

    seq_idx: int
    row_begin: int
    num_rows: int
    kind: int
    kv_begin: int
    kv_end: int


@dataclass(frozen=True)
class Price:
    flops: int
    bytes: int
    compute_fs: int
    memory_fs: int
    total_fs: int


@dataclass(frozen=True)
class TwinPlan:
    """header [16], items [num_items][8], merges [num_merges][8] as work_item.h orders their words; prices per item."""

    header: list[int]
    items: list[list[int]]
    merges: list[list[int]]
    prices: list[Price]
    makespan_fs: int


def visible_range(token: int, q_len: int, kv_len: int, shape: Shape) -> tuple[int, int]:
    """The keys [begin, end) that query token ``token`` of a slice sees; begin == end if none."""
    position = kv_len - q_len + token
    end = min(position + 1, kv_len) if shape.causal else kv_len
    begin = 0 if shape.window_left is None else position - shape.window_left
    end = max(end, 0)
    return min(max(begin, 0), end), end


def row_tiles(seq_idx: int, q_len: int, kv_len: int, shape: Shape, hardware: Hardware) -> list[Tile]:
    """The row tiles of one slice."""
    num_rows = q_len * shape.group_size
    tiles = []
    for row_begin in range(0, num_rows, hardware.block_rows[LARGE]):
        row_end = min(row_begin + hardware.block_rows[LARGE], num_rows)
        kind = max(k for k in (LARGE, MEDIUM, SMALL) if row_end - row_begin <= hardware.block_rows[k])
        kv_begin, _ = visible_range(row_begin // shape.group_size, q_len, kv_len, shape)
        _, kv_end = visible_range((row_end - 1) // shape.group_size, q_len, kv_len, shape)
        tiles.append(Tile(seq_idx, row_begin, row_end - row_begin, kind, min(kv_begin, kv_end), kv_end))
    return tiles


def price(tile: Tile, num_keys: int, slice_tiles: Sequence[Tile], shape: Shape, hardware: Hardware) -> Price:
    """What ``num_keys`` keys of a tile cost, beside the other tiles of its slice."""
    granule = hardware.row_granule or hardware.block_rows[tile.kind]
    priced_rows = -(-tile.num_rows // granule) * granule
    seen = [t for t in slice_tiles if t.kv_begin < t.kv_end]
    if seen:
        distinct = max(t.kv_end for t in seen) - min(t.kv_begin for t in seen)
        fetched_keys = num_keys * distinct // sum(t.kv_end - t.kv_begin for t in seen)
    else:
        fetched_keys = 0
    flops = 4 * shape.head_dim * priced_rows * num_keys
    num_bytes = 2 * shape.head_dim * shape.kv_element_bytes * (fetched_keys + tile.num_rows)
    compute_fs = flops * round(1e18 / hardware.flops_per_s) // 1000
    memory_fs = num_bytes * round(1e18 / hardware.bytes_per_s) // 1000
    total_fs = round(1e15 * hardware.item_overhead_s) + max(compute_fs, memory_fs)
    return Price(flops, num_bytes, compute_fs, memory_fs, total_fs)


def count_splits(tile: Tile, cost_fs: int, target_fs: int, hardware: Hardware) -> int:
    """How many pieces a tile is split into."""
    num_granules = -(-tile.kv_end // hardware.split_tokens) - tile.kv_begin // hardware.split_tokens
    is_nearest = hardware.workers_per_core is not None and tile.kind != SMALL
    wanted = (cost_fs + target_fs // 2) // target_fs if is_nearest else -(-cost_fs // target_fs)
    return max(1, min(wanted, num_granules, hardware.max_splits))


def choose_large_target(
    large: Sequence[tuple[Tile, int]], targets: Sequence[int], total_fs: int, shape: Shape, hardware: Hardware
) -> int:
    """Of these targets the one by which the larger kinds' tiles, with their costs, end first; the earlier of two."""
    assert hardware.workers_per_core is not None
    if not large:
        return targets[0]
    num_cores = hardware.num_workers // hardware.workers_per_core
    large_fs = shape.num_kv_heads * sum(cost_fs for _, cost_fs in large)

    def end_fs(target_fs: int) -> int:
        splits = [count_splits(tile, cost_fs, target_fs, hardware) for tile, cost_fs in large]
        num_items = shape.num_kv_heads * sum(splits)
        num_partial_rows = shape.num_kv_heads * sum(
            n * tile.num_rows for (tile, _), n in zip(large, splits, strict=True) if n > 1
        )
        wave_fs = -(-num_items // num_cores) * (large_fs // num_items)
        longest_fs = max(-(-cost_fs // n) for (_, cost_fs), n in zip(large, splits, strict=True))
        partial_bytes = 2 * 4 * (shape.head_dim + 1) * num_partial_rows
        partial_fs = min(partial_bytes // 1000 * round(1e18 / hardware.bytes_per_s), MAX_COST_FS)
        alone_fs = max(wave_fs, longest_fs) // hardware.workers_per_core
        return max(alone_fs, total_fs // hardware.num_workers) + partial_fs // hardware.num_workers

    return min(targets, key=end_fs)


def split(tile: Tile, cost_fs: int, target_fs: int, hardware: Hardware) -> list[tuple[int, int]]:
    """The KV ranges of a tile's pieces, in order."""
    granule = hardware.split_tokens
    first = tile.kv_begin // granule
    num_granules = -(-tile.kv_end // granule) - first
    num_splits = count_splits(tile, cost_fs, target_fs, hardware)
    edges = [(first + num_granules * i // num_splits) * granule for i in range(num_splits + 1)]
    edges = [min(max(edge, tile.kv_begin), tile.kv_end) for edge in edges]
    return list(pairwise(edges))


def split_everywhere(tile: Tile, hardware: Hardware) -> list[tuple[int, int]]:
    """The KV ranges of a tile's pieces in an invariant plan, in order."""
    step = hardware.invariant_split_tokens
    inner = [edge for edge in range(0, tile.kv_end, step) if edge > tile.kv_begin]
    return list(pairwise([tile.kv_begin, *inner, tile.kv_end]))


def plan_twin(
    cu_seqlens_q: Sequence[int],
    seq_lens: Sequence[int],
    shape: Shape,
    hardware: Hardware,
    *,
    invariant: bool = False,
) -> TwinPlan:
    """The plan of a batch; arguments as ``mixattn.plan``."""
    slices = []
    for seq_idx, kv_len in enumerate(seq_lens):
        q_len = cu_seqlens_q[seq_idx + 1] - cu_seqlens_q[seq_idx]
        slices.append(row_tiles(seq_idx, q_len, kv_len, shape, hardware))

    undivided = [
        [price(tile, tile.kv_end - tile.kv_begin, tiles, shape, hardware).total_fs for tile in tiles]
        for tiles in slices
    ]
    total_fs = sum(sum(costs) for costs in undivided) * shape.num_kv_heads
    draws = 1 if hardware.num_workers == 1 else hardware.num_workers * hardware.items_per_worker
    slots = 1 if hardware.num_workers == 1 else draws * min(hardware.heads_per_bundle, shape.num_kv_heads)
    least_fs = max(2 * round(1e15 * hardware.item_overhead_s), 1)

    def target_of(num_items: int) -> int:
        return max(-(-total_fs // num_items), least_fs)

    small_target_fs, large_target_fs = target_of(slots), target_of(draws)
    if hardware.workers_per_core is not None:
        num_cores = hardware.num_workers // hardware.workers_per_core
        targets = [target_of(num_cores * many) for many in (1, 2, 4, 8) if num_cores * many <= draws]
        large = [
            (tile, cost_fs)
            for tiles, costs in zip(slices, undivided, strict=True)
            for tile, cost_fs in zip(tiles, costs, strict=True)
            if tile.kind != SMALL
        ]
        large_target_fs = choose_large_target(large, targets, total_fs, shape, hardware)

    priced_items: list[tuple[Price, list[int]]] = []
    merges: list[list[int]] = []
    num_partial_rows = 0
    for tiles, costs in zip(slices, undivided, strict=True):
        for tile, cost_fs in zip(tiles, costs, strict=True):
            target_fs = small_target_fs if tile.kind == SMALL else large_target_fs
            ranges = (
                split_everywhere(tile, hardware) if invariant else split(tile, cost_fs, target_fs, hardware)
            )  # fmt: skip
            is_split = len(ranges) > 1
            first_merge, first_partial_row = len(merges), num_partial_rows
            for split_idx, (kv_begin, kv_end) in enumerate(ranges):
                piece_price = price(tile, kv_end - kv_begin, tiles, shape, hardware)
                for kv_head in range(shape.num_kv_heads):
                    group_row = first_partial_row + kv_head * len(ranges) * tile.num_rows
                    item = [
                        tile.seq_idx, kv_head, tile.row_begin, tile.num_rows | tile.kind << 16, kv_begin, kv_end,
                        first_merge + kv_head if is_split else -1,
                        group_row + split_idx * tile.num_rows if is_split else 0,
                    ]  # fmt: skip
                    priced_items.append((piece_price, item))
            for kv_head in range(shape.num_kv_heads if is_split else 0):
                merges.append(
                    [tile.seq_idx, kv_head, tile.row_begin, tile.num_rows, num_partial_rows, len(ranges), 0, 0]
                )
                num_partial_rows += len(ranges) * tile.num_rows

    priced_items.sort(key=lambda priced: -priced[0].total_fs)  # stable: ties stay in generation order
    items = [item for _, item in priced_items]
    prices = [item_price for item_price, _ in priced_items]

    core_size = hardware.workers_per_core or 1  # workers of a core are as one that does an item after the other
    free_at_fs = [0] * (hardware.num_workers // core_size)
    for item_price in prices:
        heapq.heapreplace(free_at_fs, free_at_fs[0] + item_price.total_fs // core_size)

    if invariant:
        num_splits = [max(-(-kv_len // hardware.invariant_split_tokens), 1) for kv_len in seq_lens]
        tiles_and_splits = list(zip(map(len, slices), num_splits, strict=True))
        capacity_items = shape.num_kv_heads * sum(tiles * splits for tiles, splits in tiles_and_splits)
        capacity_merges = shape.num_kv_heads * sum(tiles for tiles, splits in tiles_and_splits if splits > 1)
    else:
        total_tiles_bound = shape.num_kv_heads * (
            len(seq_lens) + cu_seqlens_q[-1] * shape.group_size // hardware.block_rows[LARGE]
        )
        capacity_items, capacity_merges = total_tiles_bound + slots - 1, slots - 1
    header = [
        PLAN_MAGIC, len(items), len(merges), num_partial_rows, len(seq_lens), cu_seqlens_q[-1],
        capacity_items, capacity_merges,
        shape.num_q_heads, shape.num_kv_heads, shape.head_dim, int(shape.causal),
        -1 if shape.window_left is None else shape.window_left, hardware.num_workers,
        hardware.invariant_split_tokens if invariant else 0, 0,
    ]  # fmt: skip
    return TwinPlan(header, items, merges, prices, max(free_at_fs))
