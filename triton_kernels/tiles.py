"""Which tiles the Triton attention kernel runs: one pure function from head, element and architecture."""

from __future__ import annotations

from dataclasses import dataclass

PLAN_BLOCK_ROWS = (128, 64, 16)
"""Packed query rows of the large, medium and small tile kind; what a plan for the kernel is made with.

128 rows are one wgmma of 64 for each of two warpgroups; 16 are the rows of one mma.sync.
"""
BLOCK_ROWS = (PLAN_BLOCK_ROWS, (64, 64, 16), (32, 32, 16), (16, 16, 16))
"""What the kernel may run them in: an item of more rows than its tile is walked more than once."""
MAX_FLOAT32_BLOCK_ROWS = 64
"""A float32 product is three of tf32, from operands split in two: with 128 rows it spills kilobytes."""
NUM_WARPS = 8
"""Two warpgroups: with one, the large kind's sums alone take 128 of a thread's 255 registers at head_dim 128."""

KIB = 1024
SHARED_BYTES = {
    (8, 0): 163 * KIB,
    (8, 6): 99 * KIB,
    (8, 7): 163 * KIB,
    (8, 9): 99 * KIB,
    (9, 0): 227 * KIB,
    (10, 0): 227 * KIB,
    (10, 3): 227 * KIB,
    (12, 0): 99 * KIB,
}
"""The most shared memory of one program by compute capability. Source: CUDA C++ programming guide, table of technical
specifications per compute capability. Others from 8.0 on are taken to have the least of these."""

MAX_BLOCK_N = 64
"""128 keys would fit shared memory too, but spill registers (sm_90, head_dim 64 and 128)."""
MAX_TILE_ELEMENTS = 64 * 128
"""Of a K or V tile: at head_dim 256 a tile of 64 keys spills registers on sm_90, one of 32 does not."""
MIN_BLOCK_N = 16
"""The least that a product of tiles takes."""


@dataclass(frozen=True)
class TileChoice:
    """How one compiled kernel is cut up.

    Args:
        block_m: rows of a tile of the large, medium and small kind.
        block_d: head_dim rounded up to a power of two, at least 16; the columns of every tile.
        block_n: keys per KV tile.
        num_stages: of the software pipeline over KV tiles. Page ids, then K and V, are (num_stages - 1) / 2 tiles ahead
            of what they are needed for: 3 for one, 5 for two.
        num_warps: warps of a program.
    """

    block_m: tuple[int, int, int]
    block_d: int
    block_n: int
    num_stages: int
    num_warps: int


def shared_bytes(tiles: TileChoice, element_bytes: int, capability: tuple[int, int]) -> int:
    """Shared memory that a program takes, at most: Q, the tiles of K and V in flight and the one in use, page ids."""
    num_kv_tiles = 2 * ((tiles.num_stages - 1) // 2 + 1)
    if element_bytes == 4 and capability[0] in (9, 10):
        num_kv_tiles += 4  # wgmma and tcgen05 read from shared memory: K and V in use, each split into two tf32
    row_bytes = tiles.block_d * element_bytes
    page_id_bytes = 4 * tiles.block_n * tiles.num_stages
    barrier_bytes = KIB  # tcgen05's and alignment; fewer elsewhere
    walk = (tiles.block_m[0] + num_kv_tiles * tiles.block_n) * row_bytes + page_id_bytes + barrier_bytes
    float32_result = tiles.block_m[0] * tiles.block_d * 4  # after the walk, on its way to coalesced stores
    return max(walk, float32_result)


def choose_tiles(head_dim: int, element_bytes: int, capability: tuple[int, int]) -> TileChoice:
    """The tiles for this head size and element size on a GPU of this compute capability.

    Of what shared memory holds: the most rows, then the most keys per tile, then the deepest pipeline.

    Raises:
        NotImplementedError: the capability is below 8.0, which has no asynchronous copies, or the head is too large.
    """
    if capability < (8, 0):
        raise NotImplementedError(
            f"compute capability {capability[0]}.{capability[1]} is not supported; the nearest is 8.0 (A100)"
        )
    limit = SHARED_BYTES.get(capability, min(SHARED_BYTES.values()))
    block_d = max(16, 1 << (head_dim - 1).bit_length())
    for block_m in BLOCK_ROWS:
        if element_bytes == 4 and block_m[0] > MAX_FLOAT32_BLOCK_ROWS:
            continue
        block_n = min(MAX_BLOCK_N, MAX_TILE_ELEMENTS // block_d)
        while block_n >= MIN_BLOCK_N:
            for num_stages in (5, 3):
                tiles = TileChoice(block_m, block_d, block_n, num_stages, NUM_WARPS)
                if shared_bytes(tiles, element_bytes, capability) <= limit:
                    return tiles
            block_n //= 2
    raise NotImplementedError(
        f"head_dim {head_dim} with {element_bytes}-byte elements does not fit the {limit // KIB} KiB of shared memory "
        f"of compute capability {capability[0]}.{capability[1]}; the nearest that does is 256"
    )
