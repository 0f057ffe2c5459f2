"""bench.static.selftest_device, which runs the primitives on a GPU: here the emulated driver is the GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.static.selftest_device import (
    HOPPER,
    PRIMITIVES,
    SKIPPED,
    SM90_PRIMITIVES,
    Primitive,
    aligned,
    difference,
    primitives_of,
    run_emulated,
    run_on_device,
)
from tests.cuda.emulation import Emulation
from tests.emu.build import BUILD, ROOT, build_library
from tools.nvcc import find_nvcc

EMU, CUDA = ROOT / "tests" / "emu", ROOT / "tests" / "cuda"
NOT_ON_A_GPU = {"divergent", "deadlock", "barrier_counts", "bad_access", "banks", "copy_groups"} | {
    "registers", "bad_wgmma", "barrier_not_there", "too_many_registers",
}  # fmt: skip
"""Kernels that are wrong, count what only the emulation counts, read what is under way, or need a block's registers to
be bounded."""


def build_driver(name: str = "emulated_primitives_driver", includes: Sequence[Path] = ()) -> Path:
    return build_library(name, [CUDA / "emulated_driver.cpp", EMU / "emulated_primitives.cpp"], [*includes, CUDA, EMU])


def selftest(driver: str | Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bench.static.selftest_device", "--rounds", "3", *options],
        cwd=ROOT,
        env={**os.environ, "MIXATTN_LIBCUDA": str(driver)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_selftest_finds_that_two_emulations_agree() -> None:
    result = selftest(build_driver())
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "emulation on the host: 3 random inputs of each primitive"
    assert [line.split() for line in lines[1:-1]] == [[primitive.name, "agrees"] for primitive in PRIMITIVES]
    assert lines[-1] == "all agree"


def test_selftest_names_the_primitive_that_differs() -> None:
    folder = BUILD / "swapped"
    (folder / "cuda").mkdir(parents=True, exist_ok=True)
    right = "emu::float16_bits(low) | uint32_t{emu::float16_bits(high)} << 16"
    wrong = "emu::float16_bits(high) | uint32_t{emu::float16_bits(low)} << 16"
    text = (ROOT / "csrc" / "cuda" / "prim.cuh").read_text()
    assert text.count(right) == 1
    swapped, target = text.replace(right, wrong), folder / "cuda" / "prim.cuh"
    if not target.exists() or target.read_text() != swapped:  # else nothing is compiled again
        target.write_text(swapped)
    result = selftest(build_driver("swapped_primitives_driver", [folder]))
    assert result.returncode == 1
    assert re.search(
        r"^  pack_f16 +\d+ of 32 words differ, word \d+ is 0x\w{8}, emulated 0x\w{8}$", result.stdout, re.M
    )
    assert re.search(r"^  pack_bf16 +agrees$", result.stdout, re.MULTILINE)
    assert result.stdout.splitlines()[-1] == f"1 of {len(PRIMITIVES)} differ"


def test_selftest_without_a_driver_says_so_and_exits_with_its_own_status() -> None:
    result = selftest("libno_such_driver.so.1")
    assert result.returncode == SKIPPED
    assert result.stdout.startswith("not run: no driver: libno_such_driver.so.1: cannot open")
    assert selftest(build_driver(), "--device", "1").stdout == "not run: the driver sees 1 GPUs, --device is 1\n"


def test_selftest_has_every_primitive_kernel() -> None:
    """A kernel of primitives.cuh is in the selftest, unless it is one that a GPU cannot settle."""
    kernels, entries = set(), {}
    for suffix in ("", "_sm90"):
        kernel = r"(?:MX_KERNEL (?=\w+\()|MX_DEVICE void (?=\w+\(const TensorMap&))(\w+)"
        kernels |= set(re.findall(kernel, (EMU / f"primitives{suffix}.cuh").read_text()))
        text = (EMU / f"primitive_entries{suffix}.h").read_text()
        entries |= dict(re.findall(r"^  X\((\w+), (\w+)[<)]", text, re.MULTILINE))
    assert list(entries) == [primitive.name for primitive in primitives_of(HOPPER)]
    assert kernels == set(entries.values()) | NOT_ON_A_GPU


@pytest.mark.parametrize(("value", "differs"), [(1.0 + 2**-22, False), (1.0 + 2**-20, True), (np.nan, True)])
def test_difference_of_floats_is_held_against_the_tolerance(value: float, differs: bool) -> None:
    functions = next(primitive for primitive in PRIMITIVES if primitive.name == "functions")
    emulated = np.array([1.0, -np.inf, np.nan], np.float32)
    device = emulated.copy()
    device[0] = value
    assert (difference(functions, device.view(np.uint32), emulated.view(np.uint32)) is not None) is differs


@pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc")
@pytest.mark.parametrize(
    ("source", "architecture", "primitives"),
    [
        ("primitives.cu", "sm_80", PRIMITIVES),
        ("primitives.cu", "sm_90a", PRIMITIVES),
        ("primitives_sm90.cu", "sm_90a", PRIMITIVES + SM90_PRIMITIVES),
    ],
)
def test_primitives_compile_under_the_names_that_the_loader_asks_for(
    source: str, architecture: str, primitives: list[Primitive], tmp_path: Path
) -> None:
    command = [find_nvcc(), "-std=c++17", f"-arch={architecture}", "-ptx", f"-I{ROOT / 'csrc'}", f"-I{EMU}"]
    subprocess.run([*command, "-o", tmp_path / "primitives.ptx", EMU / source], check=True)
    entries = re.findall(r"\.entry primitive_(\w+)\(", (tmp_path / "primitives.ptx").read_text())
    assert sorted(entries) == sorted(primitive.name for primitive in primitives)


def test_selftest_on_hopper_runs_its_primitives_too() -> None:
    rng = np.random.default_rng(0)
    for primitive in SM90_PRIMITIVES:
        inputs = aligned(primitive.make_input(rng))
        runs = [run_emulated(primitive, inputs, seed) for seed in range(2)]
        assert difference(primitive, *runs) is None
        assert not (runs[0] == 2**32 - 1).all()


@pytest.mark.parametrize("name", ["box_16", "box_64"])
def test_selftest_of_boxes_goes_through_the_driver(name: str) -> None:
    """Which makes the map; its other primitives take addresses only."""
    image = Emulation(build_driver()).image(capability=90)
    primitive = next(primitive for primitive in SM90_PRIMITIVES if primitive.name == name)
    inputs = aligned(primitive.make_input(np.random.default_rng(0)))
    found = run_on_device(image, torch.device("cpu"), primitive, inputs)
    assert difference(primitive, found, run_emulated(primitive, inputs, 1)) is None
