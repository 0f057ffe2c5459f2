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
__global__ void load(const __grid_constant__ TensorMap map, const uint32_t* in, uint32_t* out) {
  primitives::box<64, primitives::BoxFault::kNone>(map, in, out);
}
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


# ---- boxes of tensors -----------------------------------------------------------------------------------------------

BOXED_AT = 16
"""Words of the input before the map's tensor: the coordinates of the two boxes."""
SIZES, STRIDES = (72, 3, 20, 4), (21 * 80, 80, 3 * 21 * 80)
"""Elements: rows of 72 in 80, heads, slots, pages. A head's slots lie together, so that strides do not rise."""


def run_boxes(
    primitives: ModuleType, kernel: str, data: npt.NDArray[np.uint16], places: npt.ArrayLike, *, seed: int = 0
) -> tuple[npt.NDArray[np.uint16], int]:
    """(the two boxes [2, rows, 64] as they lie in shared memory, how many were loaded)."""
    box_rows = 64 if kernel in ("box_64", "box_read_by_wgmma") else 16
    head = np.zeros(BOXED_AT, np.int32)
    head[:8] = np.ravel(places)
    inputs = np.zeros(BOXED_AT + data.size // 2 + 4, np.uint32)
    begin = -(inputs.ctypes.data // 4) % 4
    inputs = inputs[begin : begin + BOXED_AT + data.size // 2]
    inputs[:] = np.concatenate([head.view(np.uint32), data.view(np.uint32)])
    out = np.full(2 * 32 * box_rows, NAN_WORD, np.uint32)
    num_boxes = primitives.run_boxed(
        kernel, inputs, out, SIZES, [2 * stride for stride in STRIDES], (64, 1, box_rows, 1), 128, seed, SHARED_BYTES
    )
    return out.view(np.uint16).reshape(2, box_rows, 64), num_boxes


def box_at(data: npt.NDArray[np.uint16], place: tuple[int, int, int, int], num_rows: int) -> npt.NDArray[np.uint16]:
    """[num_rows, 64] from the coordinates (element, head, slot, page) on; 0 beside the tensor. Element by element."""
    box = np.zeros((num_rows, 64), np.uint16)
    for row, column in np.ndindex(box.shape):
        element, head, slot, page = place[0] + column, place[1], place[2] + row, place[3]
        if all(0 <= x < size for x, size in zip((element, head, slot, page), SIZES, strict=True)):
            box[row, column] = data[page * STRIDES[2] + slot * STRIDES[1] + head * STRIDES[0] + element]
    return box


@pytest.fixture
def boxed_data(rng: np.random.Generator) -> npt.NDArray[np.uint16]:
    return rng.integers(1, 2**16, SIZES[3] * STRIDES[2]).astype(np.uint16)


@pytest.mark.parametrize("kernel", ["box_16", "box_64"])
@pytest.mark.parametrize(
    "places",
    [
        [(0, 0, 0, 0), (64, 1, 2, 3)],  # whole; the row's last 8 elements and nothing behind them
        [(0, 2, 15, 1), (8, 0, -3, 2)],  # slots behind the page's last and before its first
        [(0, 3, 0, 0), (0, 0, 0, 4)],  # a head and a page that are not there
        [(-8, 0, 0, 0), (0, 0, 0, -1)],
    ],
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_box_lies_swizzled_and_is_zero_beside_the_tensor(
    primitives: ModuleType,
    boxed_data: npt.NDArray[np.uint16],
    kernel: str,
    places: list[tuple[int, int, int, int]],
    seed: int,
) -> None:
    out, num_boxes = run_boxes(primitives, kernel, boxed_data, places, seed=seed)
    assert num_boxes == 2
    for found, place in zip(out, places, strict=True):
        assert np.array_equal(found, swizzled(box_at(boxed_data, place, len(found))))


def test_box_is_nan_until_the_wait(primitives: ModuleType, boxed_data: npt.NDArray[np.uint16]) -> None:
    places = [(0, 0, 0, 0), (0, 1, 0, 0)]
    for seed in LATE_SEEDS:
        out, _ = run_boxes(primitives, "box_not_waited_for", boxed_data, places, seed=seed)
        assert (out[0] == 0xFFFF).all()


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("box_too_few_bytes", r"(?s)deadlock:.*lacks 0 arrivals and -1024 bytes"),
        ("box_too_many_bytes", r"(?s)deadlock:.*lacks 0 arrivals and 16 bytes"),
        ("box_no_bytes", r"1 boxes are still under way|(?s:deadlock:.*lacks 0 arrivals and -2048 bytes)"),
        ("box_misaligned", "load_box: shared address 2176 is not a multiple of 1024"),
        ("box_barrier_not_fenced", "load_box reports to shared memory that thread 0 has written without fence_proxy"),
        ("box_place_not_fenced", "load_box overwrites shared memory that thread 0 has written without fence_proxy"),
        ("box_never_waited_for", "the launch ends before a box has landed"),
    ],
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_box_misuse_is_reported(
    primitives: ModuleType, boxed_data: npt.NDArray[np.uint16], kernel: str, message: str, seed: int
) -> None:
    if kernel == "box_never_waited_for" and seed == 1:
        seed = 0  # a box that happens to come early is nothing to report
    with pytest.raises(RuntimeError, match=message):
        run_boxes(primitives, kernel, boxed_data, [(0, 0, 0, 0), (0, 1, 0, 0)], seed=seed)


def test_box_read_by_wgmma_on_its_way_is_reported(primitives: ModuleType, boxed_data: npt.NDArray[np.uint16]) -> None:
    for seed in LATE_SEEDS:
        with pytest.raises(RuntimeError, match="wgmma reads shared memory that a box is under way to"):
            run_boxes(primitives, "box_read_by_wgmma", boxed_data, [(0, 0, 0, 0), (0, 1, 0, 0)], seed=seed)


@pytest.mark.parametrize(
    ("changed", "refused"),
    [
        ({}, None),
        ({"data": 1 << 20 | 8}, "the tensor's address"),
        ({"sizes": (72, 0, 20, 4)}, "a size"),
        ({"sizes": (72, 3, 20, 2**32)}, None),
        ({"sizes": (72, 3, 20, 2**32 + 1)}, "a size"),
        ({"strides": (160, 168, 10080)}, "a stride"),
        ({"strides": (160, 480, 2**40)}, "a stride"),
        ({"strides": (160, 480, 2**40 - 16)}, None),
        ({"box": (64, 0, 16, 1)}, "the box"),
        ({"box": (64, 1, 257, 1)}, "the box"),
        ({"box": (72, 1, 16, 1)}, "the box's rows"),
        ({"box": (60, 1, 16, 1)}, "the box's rows"),
        ({"sizes": (), "strides": (), "box": ()}, "the number of dimensions"),
    ],
)
def test_map_that_the_driver_would_refuse_is_refused(
    primitives: ModuleType, changed: dict[str, object], refused: str | None
) -> None:
    """The bounds of the driver API's reference, cuTensorMapEncodeTiled."""
    right = {"data": 1 << 20, "sizes": (72, 3, 20, 4), "strides": (160, 480, 10080), "box": (64, 1, 16, 1)}
    arguments = (right | changed).values()
    if refused is None:
        primitives.encode(*arguments)
        return
    with pytest.raises(ValueError, match=f"^{refused}$"):
        primitives.encode(*arguments)


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
