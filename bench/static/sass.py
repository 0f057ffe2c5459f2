"""What a disassembled kernel does in its loops: instructions by family, the flops of its matrix products."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

INSTRUCTION = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)(?P<operands>[^;]*);"
)
"""One line of ``cuobjdump -sass``; a predicate before the opcode is dropped."""
TARGET = re.compile(r"0x(?P<address>[0-9a-f]+)\s*$")

MATRIX = re.compile(r"(?P<family>HGMMA|QGMMA|IGMMA|HMMA|QMMA|IMMA|UTC[A-Z]*MMA)\b")
"""mma.sync is HMMA, QMMA (fp8) or IMMA (int8); wgmma has a G in it; tcgen05's are UTC...MMA, without their shape."""
WARPGROUP_SHAPE = re.compile(r"GMMA\.(?P<m>\d+)x(?P<n>\d+)x(?P<k>\d+)")
WARP_SHAPES = {"16816": (16, 8, 16), "1688": (16, 8, 8), "16832": (16, 8, 32), "1684": (16, 8, 4)}
"""The digits behind HMMA and its kin, read as m, n and k."""

LOCAL = ("LDL", "STL")
"""Loads and stores of a thread's stack: spilled registers."""
MASK = ("ISETP", "FSETP", "FSEL", "SEL", "PLOP3", "P2R", "R2P", "VOTE")
"""What compares and selects are made of: the cost of a mask, and of every bound that is checked."""


@dataclass(frozen=True)
class Instruction:
    """One instruction; ``opcode`` with its modifiers, ``operands`` as printed."""

    address: int
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.split(".", 1)[0]


def parse(text: str) -> list[Instruction]:
    """The instructions of ``cuobjdump -sass`` of one kernel, in the order of their addresses."""
    return [
        Instruction(int(match["address"], 16), match["opcode"], match["operands"].strip())
        for match in INSTRUCTION.finditer(text)
    ]


def matrix_family(opcode: str) -> str | None:
    """``HMMA``, ``HGMMA``, ``UTCHMMA`` and so on for a matrix product, None for any other opcode."""
    match = MATRIX.match(opcode)
    return None if match is None else match["family"]


def matrix_flops(opcode: str, num_warps: int) -> int | None:
    """Flops of one matrix instruction that all warps of a program run; None where the opcode does not hold its shape.

    A warpgroup of four warps runs a wgmma together, a warp an mma alone.
    """
    if match := WARPGROUP_SHAPE.search(opcode):
        return 2 * int(match["m"]) * int(match["n"]) * int(match["k"]) * (num_warps // 4)
    for part in opcode.split("."):
        if part in WARP_SHAPES:
            m, n, k = WARP_SHAPES[part]
            return 2 * m * n * k * num_warps
    return None


def count(instructions: Sequence[Instruction], names: Sequence[str]) -> int:
    """How many of the instructions have one of the names."""
    return sum(instruction.name in names for instruction in instructions)


def matrix_counts(instructions: Sequence[Instruction]) -> dict[str, int]:
    """Matrix instructions by family."""
    families = (matrix_family(instruction.opcode) for instruction in instructions)
    return dict(sorted(Counter(family for family in families if family is not None).items()))


def matrix_loops(instructions: Sequence[Instruction]) -> list[list[Instruction]]:
    """The bodies of the innermost loops that hold matrix products, by address.

    A loop is what lies between a branch backwards and its target, both included.
    """
    index = {instruction.address: position for position, instruction in enumerate(instructions)}
    spans = []
    for end, instruction in enumerate(instructions):
        target = TARGET.search(instruction.operands) if instruction.name == "BRA" else None
        begin = end if target is None else index.get(int(target["address"], 16), end)
        if begin < end and matrix_counts(instructions[begin : end + 1]):
            spans.append((begin, end))
    innermost = [
        (begin, end)
        for begin, end in spans
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in spans)
    ]
    return [list(instructions[begin : end + 1]) for begin, end in sorted(innermost)]
