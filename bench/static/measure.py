"""The static measures of one compiled attention kernel: occupancy, and what each of its loops over keys costs."""

from __future__ import annotations

from typing import Any

from bench.static.compilation import Binary
from bench.static.sass import LOCAL, MASK, Instruction, count, matrix_counts, matrix_family, matrix_flops, matrix_loops
from mixattn.triton_kernels.tiles import TileChoice

KIB = 1024
REGISTERS_PER_SM = 64 * KIB
WARPS_PER_SM = 64
REGISTER_GRANULE = 256
"""Registers are given to a warp in multiples of this."""
SM_PARTITIONS = 4
"""Each has a quarter of the registers and runs a quarter of the warps."""
SHARED_BYTES_PER_SM = {(8, 0): 164 * KIB, (9, 0): 228 * KIB, (10, 0): 228 * KIB}
RESERVED_SHARED_BYTES = KIB
"""Of each program, for the system. Source of all of these: CUDA C++ programming guide, table of technical
specifications per compute capability, and the occupancy calculator's."""

KINDS = ("large", "small")
"""The tiles of many rows and of few."""


def programs_per_sm(binary: Binary, capability: tuple[int, int]) -> tuple[int, str]:
    """How many programs an SM holds at once, and what sets the limit: registers, shared memory or warps."""
    warp_registers = -(-32 * binary.registers // REGISTER_GRANULE) * REGISTER_GRANULE
    warps_of_partition = REGISTERS_PER_SM // SM_PARTITIONS // warp_registers
    limits = {
        "registers": warps_of_partition * SM_PARTITIONS // binary.num_warps,
        "shared": SHARED_BYTES_PER_SM[capability] // (binary.shared_bytes + RESERVED_SHARED_BYTES),
        "warps": WARPS_PER_SM // binary.num_warps,
    }
    limiter = min(limits, key=lambda name: limits[name])
    return limits[limiter], limiter


def issued_flops(body: list[Instruction], num_warps: int) -> int | None:
    """The flops of the matrix instructions of a loop; None where one of them does not say."""
    issued = [matrix_flops(i.opcode, num_warps) for i in body if matrix_family(i.opcode) is not None]
    return None if None in issued else sum(flops or 0 for flops in issued)


def flops_per_score(tiles: TileChoice) -> int:
    """Of both products, columns of tiles past the heads' sizes included."""
    return 2 * (sum(tiles.block_d) + tiles.block_dv)


def measure_loop(body: list[Instruction], block_m: int, block_n: int, tiles: TileChoice) -> dict[str, Any]:
    """What one turn of a loop over keys costs a warp; flops are those of its two products.

    ``issued_flops`` are those of the instructions there, None where they do not say: more than ``flops`` means that
    warps repeat each other's products.
    """
    flops = block_m * block_n * flops_per_score(tiles)
    return {
        "instructions": len(body),
        "matrix": matrix_counts(body),
        "local": count(body, LOCAL),
        "mask": count(body, MASK),
        "flops": flops,
        "issued_flops": issued_flops(body, tiles.num_warps),
        "warp_instructions_per_mflop": round(1e6 * len(body) * tiles.num_warps / flops),
    }


def measure(binary: Binary, tiles: TileChoice, capability: tuple[int, int]) -> dict[str, Any]:
    """The measures of a kernel, as ``contracts.json`` keeps them.

    Of a kind's loops, the one with the fewest compares and selects is its full loop (tiles that every row sees whole),
    the others are its edge loops. A loop is a kind's by the flops of its products, or, where these do not say, by its
    exponentials: one for each of its scores.
    """
    loops: dict[str, dict[str, Any]] = {}
    found: dict[str, list[dict[str, Any]]] = {}
    shapes = dict(zip(KINDS, zip(tiles.block_m, tiles.block_n, strict=True), strict=False))  # or one kind only
    for body in matrix_loops(binary.instructions):
        flops = issued_flops(body, tiles.num_warps)
        num_scores = sum(i.opcode.startswith("MUFU.EX2") for i in body) * 32 * tiles.num_warps
        if flops is not None:
            num_scores = flops // flops_per_score(tiles)
        distances = {name: abs(block_m * block_n - num_scores) for name, (block_m, block_n) in shapes.items()}
        kind = min(distances, key=distances.__getitem__)
        found.setdefault(kind, []).append(measure_loop(body, *shapes[kind], tiles))
    for kind, measured in sorted(found.items()):
        measured.sort(key=lambda loop: (loop["mask"], loop["instructions"]))
        loops[kind] = measured[0]
        for index, loop in enumerate(measured[1:]):
            loops[f"{kind}-edge" + (f"-{index}" if index else "")] = loop
    num_programs, limiter = programs_per_sm(binary, capability)
    return {
        "registers": binary.registers,
        "stack_bytes": binary.stack_bytes,
        "shared_bytes": binary.shared_bytes,
        "num_warps": binary.num_warps,
        "programs_per_sm": num_programs,
        "limiter": limiter,
        "instructions": len(binary.instructions),
        "local": count(binary.instructions, LOCAL),
        "matrix": matrix_counts(binary.instructions),
        "loops": loops,
    }
