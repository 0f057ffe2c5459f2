"""Hopper's primitives, emulated, against tables written out from the PTX ISA, and what the emulator must catch."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest

from tests.emu.build import ROOT
from tests.emu.test_primitives import FOLDER, LATE_SEEDS, NAN_WORD, SEEDS, Words, a_owner, bfloat16_words, c_owner, run

NVCC_SOURCE = """
#include "primitives_sm90.cuh"
using namespace mx;
#define KERNEL(...) template __global__ void primitives::__VA_ARGS__(const uint32_t*, uint32_t*);
KERNEL(wgmma_product<64, 0, true, f16>) KERNEL(wgmma_product<96, 0, true, f16>)
KERNEL(wgmma_product<128, 3, false, bf16>) KERNEL(wgmma_product<192, 0, true, bf16>)
KERNEL(wgmma_product<256, 0, true, bf16>) KERNEL(wgmma_from_registers<64, 0, bf16>)
KERNEL(wgmma_from_registers<96, 1, f16>) KERNEL(wgmma_from_registers<128, 7, bf16>)
KERNEL(wgmma_from_registers<192, 0, f16>) KERNEL(wgmma_from_registers<256, 0, f16>)
KERNEL(mbarrier<true>)
"""
LEFT_BYTES, PANEL_BYTES = 8 << 10, 16 << 10
"""Of primitives_sm90.cuh: where B begins behind A, and one panel of 64 columns behind the other."""
SHARED_BYTES = 48 << 10


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc on PATH")
def test_primitives_compile_for_hopper_too(tmp_path: Path) -> None:
    source = tmp_path / "primitives_sm90.cu"
    source.write_text(NVCC_SOURCE)
    command = ["nvcc", "-std=c++17", "-arch=sm_90a", "-cubin", f"-I{ROOT / 'csrc'}", f"-I{FOLDER}"]
    result = subprocess.run(
        [*command, "-o", tmp_path / "primitives.cubin", source], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


# ---- products of a warpgroup ----------------------------------------------------------------------------------------


def bits_of(values: npt.NDArray[np.float32], element: str) -> npt.NDArray[np.uint16]:
    return bfloat16_words(values) if element == "bf16" else values.astype(np.float16).view(np.uint16)


def swizzled(rows: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint16]:
    """[n, 64] as it lies in shared memory.

    ISA, 128-byte swizzle: of an address bits 4 to 6 are xored with bits 7 to 9; a row is 128 bytes.
    """
    out = np.empty_like(rows).ravel()
    for row, column in np.ndindex(rows.shape):
        address = 128 * row + 2 * column
        out[(address ^ ((address >> 7 & 7) << 4)) // 2] = rows[row, column]
    return out.reshape(rows.shape)


def product_of(out: Words, num_columns: int) -> npt.NDArray[np.float32]:
    """[64, num_columns] from every thread's sums. ISA: warp w has rows 16 w on, each 8 columns as mma.m16n8k16's D."""
    d = np.empty((64, num_columns), np.float32)
    sums = out.view(np.float32).reshape(4, 32, num_columns // 8, 4)
    for row, column in np.ndindex(16, 8):
        lane, i = c_owner(row, column)
        for warp in range(4):
            d[16 * warp + row, column::8] = sums[warp, lane, :, i]
    return d


@pytest.mark.parametrize(
    ("kernel", "num_columns", "first_depth", "factor"), [("wgmma_64_f16", 64, 0, 2), ("wgmma_128_bf16", 128, 48, 1)]
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_wgmma_multiplies_what_the_descriptors_name(
    primitives: ModuleType,
    rng: np.random.Generator,
    kernel: str,
    num_columns: int,
    first_depth: int,
    factor: int,
    seed: int,
) -> None:
    # Small integers: every product and sum is exact, in any order.
    a, b = (rng.integers(-8, 9, (rows, 64)).astype(np.float32) for rows in (64, num_columns))
    element = kernel.rpartition("_")[2]
    stored = np.concatenate([swizzled(bits_of(a, element)), swizzled(bits_of(b, element))])
    out, _, _ = run(
        primitives, kernel, stored.view(np.uint32), 64 * num_columns, threads=128, seed=seed, shared_bytes=SHARED_BYTES
    )
    depth = slice(first_depth, first_depth + 16)
    assert np.array_equal(product_of(out, num_columns), factor * (a[:, depth] @ b[:, depth].T))


@pytest.mark.parametrize(
    ("kernel", "num_columns", "first_depth"),
    [("wgmma_registers_96_f16", 96, 16), ("wgmma_registers_128_bf16", 128, 112)],
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_wgmma_takes_fragments_and_rows_of_the_depth(
    primitives: ModuleType, rng: np.random.Generator, kernel: str, num_columns: int, first_depth: int, seed: int
) -> None:
    element = kernel.rpartition("_")[2]
    a = rng.integers(-8, 9, (64, 16)).astype(np.float32)
    b = rng.integers(-8, 9, (PANEL_BYTES // 128, 128)).astype(np.float32)
    fragments = np.zeros((4, 32, 4), np.uint32)
    halves = fragments.view(np.uint16)
    for (row, column), bits in np.ndenumerate(bits_of(a, element)):
        lane, i = a_owner(row % 16, column)
        halves[row // 16, lane, i] = bits
    panels = [swizzled(bits_of(b[:, 64 * p : 64 * p + 64], element)).view(np.uint32).ravel() for p in range(2)]
    out, _, _ = run(
        primitives,
        kernel,
        np.concatenate([fragments.ravel(), *panels]),
        64 * num_columns,
        threads=128,
        seed=seed,
        shared_bytes=SHARED_BYTES,
    )
    assert np.array_equal(product_of(out, num_columns), 1 + a @ b[first_depth : first_depth + 16, :num_columns])


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("wgmma_unfenced_memory", "written without fence_proxy_async"),
        ("wgmma_unfenced_registers", "wgmma without wgmma_fence"),
        ("wgmma_misaligned", "must start at a multiple of 1024 bytes"),
        ("wgmma_not_waited_for", "ends before its wgmma are done"),
    ],
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_wgmma_misuse_is_reported(primitives: ModuleType, kernel: str, message: str, seed: int) -> None:
    with pytest.raises(RuntimeError, match=message):
        run(primitives, kernel, np.zeros(64), 128, threads=128, seed=seed, shared_bytes=SHARED_BYTES)


@pytest.mark.parametrize("seed", SEEDS)
def test_wgmma_sums_are_nan_until_the_wait(primitives: ModuleType, seed: int) -> None:
    out, _, _ = run(
        primitives, "wgmma_read_early", np.zeros(64), 128, threads=128, seed=seed, shared_bytes=SHARED_BYTES
    )
    assert np.isnan(out.view(np.float32)).all()


def test_wgmma_reads_its_matrices_as_late_as_the_wait(primitives: ModuleType) -> None:
    ones = np.full(64, 0x3C003C00, np.uint32)  # 1 in float16
    outs = [
        run(primitives, "wgmma_overwritten_early", ones, 128, threads=128, seed=seed, shared_bytes=SHARED_BYTES)[0]
        for seed in SEEDS
    ]
    assert any((out.view(np.float32) != 16).any() for out in outs)
    for seed in LATE_SEEDS:
        assert (outs[seed].view(np.float32) == 0).all()


# ---- barriers in shared memory, registers ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_mbarrier_hands_over_phase_by_phase(primitives: ModuleType, rng: np.random.Generator, seed: int) -> None:
    words = rng.integers(0, 2**31, 64).astype(np.uint32)
    out, _, _ = run(primitives, "mbarrier", words, 64, threads=64, seed=seed)
    assert np.array_equal(out, words)


def test_mbarrier_wait_left_out_shows(primitives: ModuleType, rng: np.random.Generator) -> None:
    words = rng.integers(0, 2**31, 64).astype(np.uint32)
    outcomes = []
    for seed in SEEDS:
        try:
            out, _, _ = run(primitives, "mbarrier_unwaited", words, 64, threads=64, seed=seed)
            outcomes.append(bool((out[:32] == NAN_WORD).any()))
        except RuntimeError as error:
            assert "deadlock" in str(error)  # the writer waits for a phase that ended before its time
            outcomes.append(True)
    assert any(outcomes)


def test_mbarrier_that_is_not_there_is_reported(primitives: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="there is no barrier at this address"):
        run(primitives, "barrier_not_there", [0])


@pytest.mark.parametrize("seed", SEEDS)
def test_registers_change_hands(primitives: ModuleType, seed: int) -> None:
    out, _, _ = run(primitives, "registers", [0], 512, threads=512, seed=seed)
    assert np.array_equal(out, np.arange(512))


def test_registers_that_nobody_gives_are_a_deadlock(primitives: ModuleType) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)deadlock:.*setmaxnreg"):
        run(primitives, "too_many_registers", [0], threads=512)
