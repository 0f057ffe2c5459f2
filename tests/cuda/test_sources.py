"""Kernels are plain C++ around the primitives of prim.cuh: anything else would run on one of the two sides only."""

from __future__ import annotations

import re

import pytest

from tests.emu.build import ROOT

CUDA = ROOT / "csrc" / "cuda"
KERNEL_SOURCES = sorted(file for file in CUDA.rglob("*.cuh") if not file.name.startswith("prim"))
ONE_SIDED = re.compile(
    r"\basm\b|__CUDA\w*|__global__|__device__|__shared__|__sync\w+|__shfl\w+|__\w+_sync\b|\batomic[A-Z]\w*|"
    r"\b(threadIdx|blockIdx|blockDim|gridDim)\b|\bemu::"
)


@pytest.mark.parametrize("file", KERNEL_SOURCES, ids=lambda file: str(file.relative_to(CUDA)))
def test_kernel_source_uses_only_what_both_sides_have(file: object) -> None:
    text = re.sub(r"//.*", "", (CUDA / str(file)).read_text())
    assert ONE_SIDED.findall(text) == []


@pytest.mark.parametrize(
    "line",
    ["asm volatile(", "__syncthreads();", "x = threadIdx.x;", "atomicAdd(p, 1);", "__any_sync(m, p)", "emu::lane()"],
)
def test_one_sided_line_is_found(line: str) -> None:
    assert ONE_SIDED.search(line)
