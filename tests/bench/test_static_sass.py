"""Reading machine code: which loops there are, what they hold, and what their products do."""

from __future__ import annotations

import pytest

from bench.static.compilation import Binary
from bench.static.measure import measure
from bench.static.sass import count, matrix_counts, matrix_flops, matrix_loops, parse
from mixattn.triton_kernels.tiles import choose_tiles

LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;             /* 0x00000a0000017a02 */
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0020*/              @!P0 LDL R2, [R1] ;
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0040*/               @P1 BRA 0x20 ;
        /*0050*/                   ISETP.GE.AND P0, PT, R2, RZ, PT ;
        /*0060*/              @!P0 BRA 0x0 ;
        /*0070*/                   FADD R2, R2, R3 ;
        /*0080*/               @P2 BRA 0x70 ;
        /*0090*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*00a0*/              @UP0 BRA 0x90 ;
        /*00b0*/                   BRA 0xd0 ;
        /*00c0*/                   NOP ;
        /*00d0*/                   EXIT ;
"""


def test_parse_keeps_opcodes_and_drops_predicates() -> None:
    instructions = parse(LISTING)
    assert [i.name for i in instructions[:3]] == ["MOV", "HMMA", "LDL"]
    assert instructions[1].opcode == "HMMA.16816.F32.BF16"
    assert len(instructions) == 14


def test_matrix_loops_are_the_innermost_backward_branches_with_products() -> None:
    loops = matrix_loops(parse(LISTING))
    assert [[i.address for i in loop] for loop in loops] == [[0x20, 0x30, 0x40], [0x90, 0xA0]]
    assert [matrix_counts(loop) for loop in loops] == [{"HMMA": 1}, {"HGMMA": 1}]
    assert [count(loop, ("LDL", "STL")) for loop in loops] == [1, 0]


@pytest.mark.parametrize(
    ("opcode", "flops"),
    [
        ("HMMA.16816.F32.BF16", 8 * 2 * 16 * 8 * 16),  # each of 8 warps
        ("HGMMA.64x128x16.F32.BF16", 2 * 2 * 64 * 128 * 16),  # each of 2 warpgroups
        ("UTCHMMA", None),
    ],
)
def test_matrix_flops_are_those_of_all_warps(opcode: str, flops: int | None) -> None:
    assert matrix_flops(opcode, num_warps=8) == flops


def test_measure_loop_with_two_exponentials_a_score_is_of_the_kind_of_its_products() -> None:
    """A soft cap's loop over 16 x 64 scores: its 11 exponentials a thread are nearer to those of 64 x 64 scores."""
    lines = ["HMMA.16816.F32.BF16 R4, R8, R12, R4"] * 32 + ["MUFU.EX2 R2, R2"] * 11 + ["@P1 BRA 0x0"]
    listing = "\n".join(f"/*{16 * i:04x}*/ {line} ;" for i, line in enumerate(lines))
    tiles = choose_tiles(256, 2, (8, 0))
    assert (tiles.block_m, tiles.block_n) == ((64, 16), (64, 64))
    binary = Binary(registers=255, stack_bytes=0, shared_bytes=0, num_warps=8, instructions=parse(listing))
    assert list(measure(binary, tiles, (8, 0))["loops"]) == ["small"]
