"""Executes the few PTX instructions that the kernels' inline assembly is made of: the interpreter of Triton cannot."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint32]


def run(assembly: str, num_outputs: int, inputs: Sequence[Words]) -> list[Words]:
    """The output registers $0 to $(num_outputs - 1), for inputs in the registers that follow; elementwise."""
    registers: dict[str, Words] = {f"${num_outputs + i}": value for i, value in enumerate(inputs)}

    def value(operand: str) -> Words:
        return registers[operand] if operand in registers else np.uint32(int(operand, 0)) + np.zeros_like(inputs[0])

    for statement in (part.strip() for part in assembly.strip().strip("{}").split(";")):
        if not statement or statement.startswith(".reg"):
            continue
        opcode, rest = statement.split(maxsplit=1)
        target, *operands = re.split(r"\s*,\s*", rest)
        registers[target] = OPCODES[opcode](*map(value, operands))
    return [registers[f"${i}"] for i in range(num_outputs)]


def prmt(a: Words, b: Words, selector: Words) -> Words:
    """Byte i of the result is the byte of b:a that nibble i of the selector names. Source: PTX ISA, prmt."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(a)
    for byte in range(4):
        pick = selector >> np.uint32(4 * byte) & np.uint32(15)
        assert bool((pick < 8).all()), "replicating the sign is not modelled"
        chosen = (both >> (np.uint64(8) * pick.astype(np.uint64)) & np.uint64(255)).astype(np.uint32)
        result |= chosen << np.uint32(8 * byte)
    return result


def halves(words: Words) -> npt.NDArray[np.float16]:
    """The two float16 in each word, the low one first: [..., 2]."""
    return words.view(np.float16).reshape(*words.shape, 2)


def of_halves(values: npt.NDArray[np.float16]) -> Words:
    """The inverse of ``halves``."""
    return np.ascontiguousarray(values).view(np.uint32)[..., 0]


OPCODES = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shr.b32": lambda a, b: a >> b,
    "add.u32": lambda a, b: a + b,
    "prmt.b32": prmt,
    "sub.f16x2": lambda a, b: of_halves(halves(a) - halves(b)),
    "mul.f16x2": lambda a, b: of_halves(halves(a) * halves(b)),
}
