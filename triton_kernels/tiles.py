"""Which tiles the Triton attention kernel runs: one pure function from head size, element size and architecture."""

from __future__ import annotations

from dataclasses import dataclass

PLAN_BLOCK_ROWS = (128, 64, 16)
"""Packed query rows of the large, medium and small tile kind; the plans that this kernel runs are made with these.

128 rows are two wgmma of 64, and 128 flop per KV byte at group 1 of a 2-byte dtype; 16 are the rows of one mma.sync.
"""


@dataclass(frozen=True)
class TileChoice:
    """How one compiled kernel is cut up and launched.

    Args:
        block_n: keys per KV tile of the large, medium and small kind.
        num_stages: KV tiles in flight per kind (asynchronous copies into shared memory).
        num_warps: warps of a program; 8 give the large kind's two wgmma one warpgroup each.
        programs_per_sm: programs resident on one SM; the grid is this times the SMs.
        max_registers: registers per thread that the compiler is held to; None leaves it the architecture's 255.
    """

    block_n: tuple[int, int, int]
    num_stages: tuple[int, int, int]
    num_warps: int
    programs_per_sm: int
    max_registers: int | None


def choose_tiles(head_dim: int, element_bytes: int, capability: tuple[int, int]) -> TileChoice:
    return TileChoice((64, 64, 128), (2, 2, 2), 8, 1, None)
