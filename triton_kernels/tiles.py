"""Which tiles the Triton attention kernel runs: one pure function from head, element and architecture."""

from __future__ import annotations

from dataclasses import dataclass

PLAN_BLOCK_ROWS = (128, 64, 16)
"""Packed query rows of the large, medium and small tile kind; what a plan for the kernel is made with.

128 rows are one wgmma of 64 for each of two warpgroups; 16 are the rows of one mma.sync.
"""
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
"""128 keys would fit shared memory too, but spill registers (sm_90: 32 bytes at head_dim 128)."""
MIN_BLOCK_N = 16
"""The least that a product of tiles takes."""


@dataclass(frozen=True)
class TileChoice:
    """How one compiled kernel is cut up.

    Args:
        block_d: head_dim rounded up to a power of two, at least 16; the columns of every tile.
        block_n: keys per KV tile.
        num_stages: of the software pipeline over KV tiles. Page ids, then K and V, are (num_stages - 1) / 2 tiles ahead
            of what they are needed for: 3 for one, 5 for two.
        num_warps: warps of a program.
    """

    block_d: int
    block_n: int
    num_stages: int
    num_warps: int


def shared_bytes(block_d: int, block_n: int, num_stages: int, element_bytes: int) -> int:
    """Shared memory that a program takes, at most: Q, the tiles of K and V in flight and the one in use, page ids."""
    num_buffers = (num_stages - 1) // 2 + 1
    row_bytes = block_d * element_bytes
    page_id_bytes = 4 * block_n * num_stages
    walk = PLAN_BLOCK_ROWS[0] * row_bytes + num_buffers * 2 * block_n * row_bytes + page_id_bytes
    float32_result = PLAN_BLOCK_ROWS[0] * block_d * 4  # when the walk is over, on its way to coalesced stores
    return max(walk, float32_result)


def choose_tiles(head_dim: int, element_bytes: int, capability: tuple[int, int]) -> TileChoice:
    """The tiles for this head size and element size on a GPU of this compute capability.

    The most keys per tile, and of equals the deepest pipeline, that shared memory holds.

    Raises:
        NotImplementedError: the capability is below 8.0, which has no asynchronous copies, or the head does not fit.
    """
    if capability < (8, 0):
        raise NotImplementedError(
            f"compute capability {capability[0]}.{capability[1]} is not supported; the nearest is 8.0 (A100)"
        )
    limit = SHARED_BYTES.get(capability, min(SHARED_BYTES.values()))
    block_d = max(16, 1 << (head_dim - 1).bit_length())
    block_n = MAX_BLOCK_N
    while block_n >= MIN_BLOCK_N:
        for num_stages in (5, 3):
            if shared_bytes(block_d, block_n, num_stages, element_bytes) <= limit:
                return TileChoice(block_d, block_n, num_stages, NUM_WARPS)
        block_n //= 2
    raise NotImplementedError(
        f"head_dim {head_dim} with {element_bytes}-byte elements does not fit the {limit // KIB} KiB of shared memory "
        f"of compute capability {capability[0]}.{capability[1]}; the nearest is half as much of either"
    )
