"""The planner in plain Python: the truth that ``csrc/common/plan.h`` is held to, word for word.

It is written for reading: no capacity, no scratch, integers of any size, Python's own stable sort. Every formula is
restated here from its definition; nothing is shared with the compiled planner but ``Hardware``.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from mixattn.ops.plan import Hardware

PLAN_MAGIC = 0x6D780002
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
    v_head_dim: int | None = None
    """None: head_dim."""

    @property
    def group_size(self) -> int:
        return self.num_q_heads // self.num_kv_heads

    @property
    def value_dim(self) -> int:
        return self.head_dim if self.v_head_dim is None else self.v_head_dim


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
class Pages:
    """Where each sequence's keys are: the page ids of every sequence, as many as it has at least, and their size."""

    table: Sequence[Sequence[int]]
    page_size: int


@dataclass(frozen=True)
class Group:
    """Slices, one tile each, and the keys before all of their rows that they share."""

    tiles: list[Tile]
    prefix_tokens: int

    @property
    def num_rows(self) -> int:
        return sum(tile.num_rows for tile in self.tiles)

    def shared_tile(self, hardware: Hardware) -> Tile:
        """All rows over the shared keys, as if they were the first slice's."""
        kind = max(k for k in (LARGE, MEDIUM, SMALL) if self.num_rows <= hardware.block_rows[k])
        return Tile(self.tiles[0].seq_idx, 0, self.num_rows, kind, 0, self.prefix_tokens)

    def own_tiles(self) -> list[Tile]:
        """Each slice's rows over the keys behind."""
        return [replace(tile, kv_begin=self.prefix_tokens) for tile in self.tiles]


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
    dims = shape.head_dim + shape.value_dim
    flops = 2 * dims * priced_rows * num_keys
    num_bytes = dims * shape.kv_element_bytes * (fetched_keys + tile.num_rows)
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
        partial_bytes = 2 * 4 * (shape.value_dim + 1) * num_partial_rows
        partial_fs = min(partial_bytes // 1000 * round(1e18 / hardware.bytes_per_s), MAX_COST_FS)
        alone_fs = max(wave_fs, longest_fs) // hardware.workers_per_core
        return max(alone_fs, total_fs // hardware.num_workers) + partial_fs // hardware.num_workers

    return min(targets, key=end_fs)


def split(tile: Tile, cost_fs: int, target_fs: int, hardware: Hardware) -> list[tuple[int, int]]:
    """The KV ranges of a tile's pieces, in order."""
    return split_evenly(tile, count_splits(tile, cost_fs, target_fs, hardware), hardware)


def split_evenly(tile: Tile, num_splits: int, hardware: Hardware) -> list[tuple[int, int]]:
    """The KV ranges of so many pieces, in order; some are empty where there are fewer granules."""
    granule = hardware.split_tokens
    first = tile.kv_begin // granule
    num_granules = -(-tile.kv_end // granule) - first
    edges = [(first + num_granules * i // num_splits) * granule for i in range(num_splits + 1)]
    edges = [min(max(edge, tile.kv_begin), tile.kv_end) for edge in edges]
    return list(pairwise(edges))


def split_everywhere(tile: Tile, hardware: Hardware) -> list[tuple[int, int]]:
    """The KV ranges of a tile's pieces in an invariant plan, in order."""
    step = hardware.invariant_split_tokens
    inner = [edge for edge in range(0, tile.kv_end, step) if edge > tile.kv_begin]
    return list(pairwise([tile.kv_begin, *inner, tile.kv_end]))


def whole_fs(tile: Tile, shape: Shape, hardware: Hardware) -> int:
    """What a tile costs that no other tile shares its keys with."""
    return price(tile, tile.kv_end - tile.kv_begin, [tile], shape, hardware).total_fs


def is_cheaper(group: Group, shape: Shape, hardware: Hardware) -> bool:
    """Whether to read the shared keys together costs less than to read them slice by slice, all but first from a cache.

    A row's partial results, two at least, are written and read; a large tile has more to do than its rows.
    """
    kilobytes = 2 * 4 * (shape.value_dim + 1) * 2 * group.num_rows // 1000
    merging_fs = min(kilobytes * round(1e18 / hardware.bytes_per_s), MAX_COST_FS)
    shared = group.shared_tile(hardware)
    if shared.kind != SMALL:
        shared = replace(shared, num_rows=shared.num_rows + hardware.packing_rows)
    apart_fs = 0
    for tile in group.tiles:
        one = price(replace(tile, kv_end=group.prefix_tokens), group.prefix_tokens, [shared], shape, hardware)
        apart_fs += max(one.compute_fs, one.memory_fs if tile is group.tiles[0] else one.memory_fs // 3)
    return whole_fs(shared, shape, hardware) + merging_fs < apart_fs


def find_groups(
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
    slices: Sequence[list[Tile]],
    pages: Pages,
    shape: Shape,
    hardware: Hardware,
) -> list[Group]:
    """The groups of a batch, in order: runs of neighbours, grown one slice at a time."""
    even_share = sum(k for q, k in zip(q_lens, kv_lens, strict=True) if q) * shape.num_kv_heads // hardware.num_workers

    def shared_tokens(first: int) -> int:
        """Of slices first and first + 1."""
        num_pages = 0
        for s in (first, first + 1):
            if not 0 < q_lens[s] * shape.group_size <= hardware.block_rows[SMALL]:
                return 0
        most = max(0, min(kv_lens[s] - q_lens[s] for s in (first, first + 1))) // pages.page_size
        while num_pages < most and pages.table[first][num_pages] == pages.table[first + 1][num_pages]:
            num_pages += 1
        return num_pages * pages.page_size

    def can_grow(run: list[int], new: list[int], old_prefix: int, prefix: int) -> bool:
        own = [kv_lens[s] - prefix for s in new]
        is_balanced = max(own) <= even_share or 2 * max(own) * len(own) <= 3 * sum(own)
        has_room = sum(q_lens[s] for s in new) * shape.group_size <= hardware.block_rows[LARGE]
        return has_room and is_balanced and len(run) * prefix >= (len(run) - 1) * old_prefix

    runs: list[tuple[list[int], int]] = []  # slices, prefix
    for s in range(len(q_lens)):
        shared = shared_tokens(s - 1) if s > 0 else 0
        if shared > 0:
            run, prefix = runs[-1]
            if len(run) > 1 and shared > 2 * prefix:
                runs[-1] = run[:-1], prefix if len(run) > 2 else 0
                runs.append(([s - 1], 0))
                run, prefix = runs[-1]
            new_prefix = min(prefix, shared) if len(run) > 1 else shared
            if can_grow(run, [*run, s], prefix, new_prefix):
                runs[-1] = [*run, s], new_prefix
                continue
        runs.append(([s], 0))
    groups = [Group([slices[s][0] for s in run], prefix) for run, prefix in runs if len(run) > 1]
    return [group for group in groups if is_cheaper(group, shape, hardware)]


def plan_twin(
    cu_seqlens_q: Sequence[int],
    seq_lens: Sequence[int],
    shape: Shape,
    hardware: Hardware,
    *,
    invariant: bool = False,
    pages: Pages | None = None,
) -> TwinPlan:
    """The plan of a batch; arguments as ``mixattn.plan``."""
    slices = []
    q_lens = [end - begin for begin, end in pairwise(cu_seqlens_q)]
    for seq_idx, (q_len, kv_len) in enumerate(zip(q_lens, seq_lens, strict=True)):
        slices.append(row_tiles(seq_idx, q_len, kv_len, shape, hardware))
    groups: list[Group] = []
    most_groups = 0
    if pages is not None and not invariant and shape.window_left is None:
        groups = find_groups(q_lens, seq_lens, slices, pages, shape, hardware)
        most_groups = len(seq_lens) // 2
    group_of = {tile.seq_idx: group for group in groups for tile in group.tiles}

    # What is priced and split together: the tiles of a slice, the shared tile of a group, the slices of a group.
    units: list[tuple[list[Tile], Group | None]] = []
    for seq_idx, tiles in enumerate(slices):
        group = group_of.get(seq_idx)
        if group is None:
            units.append((tiles, None))
        elif group.tiles[0].seq_idx == seq_idx:
            units.append(([group.shared_tile(hardware)], group))
            units.append((group.own_tiles(), group))

    undivided = []
    for tiles, group in units:
        company = {id(tile): tiles if group is None else [tile] for tile in tiles}
        undivided.append(
            [price(tile, tile.kv_end - tile.kv_begin, company[id(tile)], shape, hardware).total_fs for tile in tiles]
        )
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
            for (tiles, _), costs in zip(units, undivided, strict=True)
            for tile, cost_fs in zip(tiles, costs, strict=True)
            if tile.kind != SMALL
        ]
        large_target_fs = choose_large_target(large, targets, total_fs, shape, hardware)

    priced_items: list[tuple[Price, list[int]]] = []
    merges: list[list[int]] = []
    num_partial_rows = 0

    def add_items(
        tile: Tile, company: list[Tile], ranges: Sequence[tuple[int, int]], merge: tuple[int, int, int, int] | None
    ) -> None:
        """merge: of kv head 0 its index, the first piece's partial row, rows from piece to piece, from head to head."""
        for split_idx, (kv_begin, kv_end) in enumerate(ranges):
            piece_price = price(tile, kv_end - kv_begin, company, shape, hardware)
            for kv_head in range(shape.num_kv_heads):
                item = [tile.seq_idx, kv_head, tile.row_begin, tile.num_rows | tile.kind << 16, kv_begin, kv_end, -1, 0]
                if merge is not None:
                    merge_idx, partial_row, piece_rows, head_rows = merge
                    item[6:] = [merge_idx + kv_head, partial_row + kv_head * head_rows + split_idx * piece_rows]
                priced_items.append((piece_price, item))

    def add_merges(tile: Tile, num_splits: int, num_items: int, prefix_tokens: int) -> None:
        nonlocal num_partial_rows
        for kv_head in range(shape.num_kv_heads):
            merges.append(
                [tile.seq_idx, kv_head, tile.row_begin, tile.num_rows, num_partial_rows, num_splits, num_items,
                 prefix_tokens]
            )  # fmt: skip
            num_partial_rows += num_splits * tile.num_rows

    shared_ranges: list[tuple[int, int]] = []
    for (tiles, group), costs in zip(units, undivided, strict=True):
        if group is not None and not shared_ranges:  # its slices come next
            target_fs = small_target_fs if tiles[0].kind == SMALL else large_target_fs
            shared_ranges = split(tiles[0], costs[0], target_fs, hardware)
        elif group is not None:
            shared = group.shared_tile(hardware)
            granules = [
                -(-tile.kv_end // hardware.split_tokens) - tile.kv_begin // hardware.split_tokens for tile in tiles
            ]  # fmt: skip
            num_own = max(1, min(-(-sum(costs) // (len(tiles) * small_target_fs)), max(granules), hardware.max_splits))
            num_splits = len(shared_ranges) + num_own
            head_rows = num_splits * group.num_rows
            first = (len(merges), num_partial_rows)
            add_items(shared, [shared], shared_ranges, (*first, group.num_rows, head_rows))
            rows_before = len(shared_ranges) * group.num_rows
            for tile in tiles:
                edges = split_evenly(tile, num_own, hardware)
                add_items(tile, [tile], edges, (first[0], first[1] + rows_before, group.num_rows, head_rows))
                rows_before += tile.num_rows
            add_merges(shared, num_splits, len(shared_ranges) + num_own * len(tiles), group.prefix_tokens)
            shared_ranges = []
        else:
            for tile, cost_fs in zip(tiles, costs, strict=True):
                target_fs = small_target_fs if tile.kind == SMALL else large_target_fs
                ranges = (
                    split_everywhere(tile, hardware) if invariant else split(tile, cost_fs, target_fs, hardware)
                )  # fmt: skip
                num_splits = len(ranges)
                if num_splits == 1:
                    add_items(tile, tiles, ranges, None)
                    continue
                rows = (len(merges), num_partial_rows, tile.num_rows, num_splits * tile.num_rows)
                add_items(tile, tiles, ranges, rows)
                add_merges(tile, num_splits, num_splits, 0)

    priced_items.sort(key=lambda priced: -priced[0].total_fs)  # stable: ties stay in generation order
    first_small = -1
    if hardware.separates_small:
        priced_items.sort(key=lambda priced: priced[1][3] >> 16 == SMALL)
        first_small = sum(item[3] >> 16 != SMALL for _, item in priced_items)
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
        group_bound = shape.num_kv_heads * most_groups
        capacity_items, capacity_merges = total_tiles_bound + group_bound + slots - 1, slots - 1 + group_bound
    header = [
        PLAN_MAGIC, len(items), len(merges), num_partial_rows, len(seq_lens), cu_seqlens_q[-1],
        capacity_items, capacity_merges,
        shape.num_q_heads, shape.num_kv_heads, shape.head_dim, int(shape.causal),
        -1 if shape.window_left is None else shape.window_left, len(groups),
        hardware.invariant_split_tokens if invariant else 0, first_small,
    ]  # fmt: skip
    return TwinPlan(header, items, merges, prices, max(free_at_fs))
