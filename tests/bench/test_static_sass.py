"""Reading machine code: which loops there are, what they hold, and what their products do."""

from __future__ import annotations

import pytest

from bench.static.sass import count, matrix_counts, matrix_flops, matrix_loops, parse

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
