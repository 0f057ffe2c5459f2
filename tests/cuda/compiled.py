"""What nvcc makes of a CUDA kernel, read from its machine code; no GPU is needed."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import triton

from tests.emu.build import ROOT
from tools.nvcc import find_nvcc

MMA_FLOPS = 2 * 16 * 8 * 16
"""Of one HMMA.16816, which a warp issues."""
WARPGROUP_MMA = re.compile(r"\.64x(\d+)x16\.")
"""An HGMMA and its columns; each of four warps issues it for 16 rows."""
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)([^;]*);")
SERIALISED = re.compile(r"\(C75\d+\)[^\n]*(serialized|ignored)[^\n]*")
"""ptxas' words where it puts a wait behind every wgmma, or has no registers to give."""
WORKERS = {"LDGSTS", "LDG", "HMMA", "HGMMA", "LDSM", "SHFL", "BAR"}
"""What the steady state of a KV loop is made of. A skipped block with none of these is the mask or the rescaling."""


@dataclass(frozen=True)
class Loop:
    """A loop around matrix products.

    Args:
        num_mmas: HMMA or HGMMA per iteration and warp.
        mma_flops: a warp's share of them, per iteration.
        num_instructions: per iteration and warp, of a tile that needs no mask and no rescaling.
    """

    num_mmas: int
    mma_flops: int
    num_instructions: int

    @property
    def instructions_per_mflop(self) -> float:
        """Warp instructions per million flops of matrix products."""
        return self.num_instructions / self.mma_flops * 1e6


@dataclass(frozen=True)
class Compiled:
    """A kernel's resources.

    Args:
        spilled_bytes: stack, spill stores and spill loads.
        complaints: what ptxas says of wgmma that it serialises.
        opcodes: by the first part of their name.
        loops: the KV loop of each tile kind, most products first.
    """

    registers: int
    spilled_bytes: tuple[int, int, int]
    complaints: list[str]
    opcodes: dict[str, int]
    loops: list[Loop]


def cuobjdump() -> str | None:
    """The tool of Triton's wheel, or else the system's; None without either."""
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(bundled) if bundled.exists() else shutil.which("cuobjdump")


def compile_kernels(source: Path, architecture: str, folder: Path) -> dict[str, Compiled]:
    """The kernels of a .cu file for ``sm_80``, ``sm_90a``, ..., by mangled name."""
    nvcc, disassembler = find_nvcc(), cuobjdump()
    assert nvcc is not None and disassembler is not None
    cubin = folder / f"{source.stem}-{architecture}.cubin"
    command = [nvcc, "-std=c++17", "-O3", f"-arch={architecture}", "-cubin", "-Xptxas", "-v", "-I", ROOT / "csrc"]
    result = subprocess.run([*command, "-o", cubin, source], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    sass = subprocess.run([disassembler, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    code = {text.split("\n", 1)[0].strip(): text for text in sass.split("Function : ")[1:]}
    kernels = {}
    for report in result.stderr.split("Compiling entry function '")[1:]:
        name = report.split("'", 1)[0]
        spilled, registers = SPILLS.search(report), REGISTERS.search(report)
        assert spilled is not None and registers is not None, report
        instructions = [(int(match[1], 16), match[2], match[3]) for match in INSTRUCTION.finditer(code[name])]
        opcodes = [opcode for _, opcode, _ in instructions]
        kernels[name] = Compiled(
            registers=int(registers[1]),
            spilled_bytes=(int(spilled[1]), int(spilled[2]), int(spilled[3])),
            complaints=[match[0] for match in SERIALISED.finditer(result.stderr)],
            opcodes={opcode: opcodes.count(opcode) for opcode in set(opcodes)},
            loops=find_loops(instructions),
        )
    return kernels


def mma_flops(opcode: str, operands: str) -> int:
    """A warp's share of a matrix product; 0 if this is none."""
    if opcode == "HMMA":
        return MMA_FLOPS
    match = WARPGROUP_MMA.match(operands) if opcode == "HGMMA" else None
    return 2 * 16 * int(match[1]) * 16 if match else 0


def find_loops(instructions: list[tuple[int, str, str]]) -> list[Loop]:
    """The innermost loops that hold matrix products, from (address, opcode, operands) in order of address."""
    opcode_at = {address: opcode for address, opcode, _ in instructions}
    flops_at = {address: mma_flops(opcode, operands) for address, opcode, operands in instructions}
    branches = [
        (address, int(target[1], 16))
        for address, opcode, operands in instructions
        if opcode == "BRA" and (target := re.search(r"0x([0-9a-f]+)", operands))
    ]

    def body(begin: int, end: int) -> set[int]:
        return {address for address in opcode_at if begin <= address <= end}

    def num_mmas(addresses: set[int]) -> int:
        return sum(flops_at[address] > 0 for address in addresses)

    backward = [(target, address) for address, target in branches if target < address]
    with_mmas = [span for span in backward if num_mmas(body(*span)) > 0]
    innermost = [
        (begin, end)
        for begin, end in with_mmas
        if not any((b, e) != (begin, end) and begin <= b and e <= end for b, e in with_mmas)
    ]
    loops = []
    for begin, end in innermost:
        hot = body(begin, end)
        total = num_mmas(hot)
        for address, target in branches:
            skipped = body(address + 1, target - 1)
            if begin <= address < target <= end and not WORKERS & {opcode_at[a] for a in skipped}:
                hot -= skipped
        loops.append(Loop(total, sum(flops_at[address] for address in hot), len(hot)))
    return sorted(loops, key=lambda loop: -loop.num_mmas)
