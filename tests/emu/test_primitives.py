"""Every device primitive, emulated, against tables written out from the PTX ISA, and what the emulator must catch."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest

from tests.emu.build import ROOT

FOLDER = Path(__file__).resolve().parent
SEEDS = range(9)
"""Three of each pair of schedule and arrival; seeds with seed % 3 != 1 let everything asynchronous come late."""
LATE_SEEDS = [seed for seed in SEEDS if seed % 3 != 1]
NAN_WORD = 0xFFFFFFFF
Words = npt.NDArray[np.uint32]


def run(
    primitives: ModuleType,
    kernel: str,
    words: npt.ArrayLike,
    num_out: int = 1,
    *,
    blocks: int = 1,
    threads: int = 32,
    seed: int = 0,
    shared_bytes: int = 4096,
) -> tuple[Words, int, int]:
    """(out, wavefronts, conflicts) of a kernel on these words; out starts as NaN."""
    # 16-byte aligned, with room to start at a multiple
    buffer = np.zeros(np.size(words) + 4, np.uint32)
    begin = -(buffer.ctypes.data // 4) % 4
    inputs = buffer[begin : begin + np.size(words)]
    inputs[:] = np.asarray(words, np.uint32).ravel()
    out = np.full(num_out, NAN_WORD, np.uint32)
    wavefronts, conflicts = primitives.run(kernel, inputs, out, blocks, threads, seed, shared_bytes)
    return out, wavefronts, conflicts


NVCC_SOURCE = """
#include "primitives.cuh"
using namespace mx;
#define KERNEL(...) template __global__ void primitives::__VA_ARGS__(const uint32_t*, uint32_t*);
KERNEL(ldmatrix<true>) KERNEL(mma<bf16>) KERNEL(mma<f16>) KERNEL(copy<true>) KERNEL(neighbour<2>) KERNEL(lanes<true>)
KERNEL(pack<bf16>) KERNEL(pack<f16>) KERNEL(banks<4>) KERNEL(banks<8>) KERNEL(banks<16>) KERNEL(banks<32>)
template __global__ void primitives::message<1>(uint32_t*, uint32_t*);
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc on PATH")
def test_primitives_compile_for_a_gpu_too(tmp_path: Path) -> None:
    source = tmp_path / "primitives.cu"
    source.write_text(NVCC_SOURCE)
    command = ["nvcc", "-std=c++17", "-arch=sm_80", "-cubin", f"-I{ROOT / 'csrc'}", f"-I{FOLDER}"]
    result = subprocess.run(
        [*command, "-o", tmp_path / "primitives.cubin", source], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


# ---- fragments ------------------------------------------------------------------------------------------------------

# PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type", for .f16 and .bf16: the formulas as printed
# there, from (lane, element) to (row, column), turned around by search. Elements lie two to a register.


def a_owner(row: int, column: int) -> tuple[int, int]:
    """(lane, element) of A's (row, column).

    ISA: groupID = %laneid >> 2, threadID_in_group = %laneid % 4; row = groupID for ai where 0 <= i < 2 || 4 <= i < 6,
    groupID + 8 otherwise; col = (threadID_in_group * 2) + (i & 0x1) for i < 4, that + 8 for i >= 4.
    """
    for lane in range(32):
        for i in range(8):
            group, in_group = lane >> 2, lane % 4
            is_upper = 0 <= i < 2 or 4 <= i < 6
            if (group if is_upper else group + 8, in_group * 2 + (i & 1) + (0 if i < 4 else 8)) == (row, column):
                return lane, i
    raise AssertionError


def b_owner(row: int, column: int) -> tuple[int, int]:
    """(lane, element) of B's (row, column).

    ISA: row = (threadID_in_group * 2) + (i & 0x1) for bi where i < 2, that + 8 for i >= 2; col = groupID.
    """
    for lane in range(32):
        for i in range(4):
            if ((lane % 4) * 2 + (i & 1) + (0 if i < 2 else 8), lane >> 2) == (row, column):
                return lane, i
    raise AssertionError


def c_owner(row: int, column: int) -> tuple[int, int]:
    """(lane, element) of C's and D's (row, column).

    ISA: row = groupID for ci where i < 2, groupID + 8 for i >= 2; col = (threadID_in_group * 2) + (i & 0x1).
    """
    for lane in range(32):
        for i in range(4):
            if ((lane >> 2) + (0 if i < 2 else 8), (lane % 4) * 2 + (i & 1)) == (row, column):
                return lane, i
    raise AssertionError


def bfloat16_words(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Values that bfloat16 holds exactly, as its bits."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    assert not (bits & 0xFFFF).any()
    return (bits >> 16).astype(np.uint16)


@pytest.mark.parametrize("element", ["f16", "bf16"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_mma_computes_the_product_of_the_isas_fragments(
    primitives: ModuleType, rng: np.random.Generator, element: str, seed: int
) -> None:
    # Small integers: every product and sum is exact, in any order.
    a, b, c = (rng.integers(-8, 9, shape).astype(np.float32) for shape in ((16, 16), (16, 8), (16, 8)))
    to_bits = bfloat16_words if element == "bf16" else lambda values: values.astype(np.float16).view(np.uint16)
    fragments = np.zeros((32, 10), np.uint32)
    halves = fragments.view(np.uint16)  # little endian: the lower half first
    for (row, column), bits in np.ndenumerate(to_bits(a)):
        lane, i = a_owner(row, column)
        halves[lane, i] = bits
    for (row, column), bits in np.ndenumerate(to_bits(b)):
        lane, i = b_owner(row, column)
        halves[lane, 8 + i] = bits
    for (row, column), value in np.ndenumerate(c):
        lane, i = c_owner(row, column)
        fragments[lane, 6 + i] = np.float32(value).view(np.uint32)
    out, _, _ = run(primitives, f"mma_{element}", fragments, 32 * 4, seed=seed)
    d = out.view(np.float32).reshape(32, 4)
    expected = a.astype(np.float64) @ b + c
    for (row, column), value in np.ndenumerate(expected):
        assert d[c_owner(row, column)] == value


LDMATRIX_FIGURE = """
 0  1  2  3
 4  5  6  7
 8  9 10 11
12 13 14 15
16 17 18 19
20 21 22 23
24 25 26 27
28 29 30 31
"""
"""PTX ISA, "Warp-level matrix load instruction: ldmatrix", the figure of one (8, 8) matrix of 16-bit elements: the lane
that gets each pair of neighbours of each row."""


@pytest.mark.parametrize("is_transposed", [False, True])
def test_ldmatrix_hands_out_the_isas_figure(
    primitives: ModuleType, rng: np.random.Generator, is_transposed: bool
) -> None:
    figure = np.array(LDMATRIX_FIGURE.split(), int).reshape(8, 4)
    matrices = rng.integers(0, 2**16, (4, 8, 8)).astype(np.uint16)
    kernel = "ldmatrix_trans" if is_transposed else "ldmatrix"
    out, _, conflicts = run(primitives, kernel, matrices.view(np.uint32), 32 * 4)
    registers = out.reshape(32, 4)
    for matrix in range(4):
        stored = matrices[matrix].T if is_transposed else matrices[matrix]
        for row in range(8):
            for pair in range(4):
                low, high = (int(stored[row, 2 * pair + half]) for half in range(2))
                assert registers[figure[row, pair], matrix] == low | high << 16
    assert conflicts == 12, "fill_shared's 4 stores, 16 bytes from lane to lane: 4 wavefronts each; ldmatrix none"


# ---- shuffles -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lane_mask", [1, 2, 4, 8, 16, 31])
def test_shfl_xor_takes_the_other_lanes_value(primitives: ModuleType, rng: np.random.Generator, lane_mask: int) -> None:
    values = rng.standard_normal(32).astype(np.float32)
    out, _, _ = run(primitives, "shuffle_xor", [lane_mask, *values.view(np.uint32)], 32, seed=1)
    assert np.array_equal(out.view(np.float32), [values[lane ^ lane_mask] for lane in range(32)])


def test_shfl_idx_moves_64_bits(primitives: ModuleType, rng: np.random.Generator) -> None:
    lanes = rng.integers(0, 32, 32)
    values = rng.integers(0, 2**63, 32).astype(np.uint64)
    words = np.stack([lanes, values & 0xFFFFFFFF, values >> np.uint64(32)], 1)
    out, _, _ = run(primitives, "shuffle_idx", words, 64, seed=2)
    assert np.array_equal(out.view(np.uint64), values[lanes])


@pytest.mark.parametrize("lanes", [[], [0], [31], [3, 17], list(range(32))])
def test_any_tells_every_lane_of_one(primitives: ModuleType, lanes: list[int]) -> None:
    out, _, _ = run(primitives, "any_lane", np.isin(np.arange(32), lanes), 32, seed=1)
    assert (out == bool(lanes)).all()


@pytest.mark.parametrize("threads", [32, 96])
def test_num_threads_are_the_blocks(threads: int, primitives: ModuleType) -> None:
    out, _, _ = run(primitives, "block_size", [0], 2 * threads, blocks=2, threads=threads)
    assert out.tolist() == [threads] * threads + [NAN_WORD] * threads


# ---- asynchronous copies --------------------------------------------------------------------------------------------


def copy_input(rng: np.random.Generator) -> tuple[Words, Words]:
    """in of the kernel copy, every third lane invalid, and what must arrive."""
    words = rng.integers(0, 2**31, (32, 8)).astype(np.uint32)
    words[:, 0] = np.arange(32) % 3 > 0
    return words, np.where(words[:, :1] != 0, words[:, 4:], 0).astype(np.uint32)


@pytest.mark.parametrize("seed", SEEDS)
def test_cp_async_has_landed_after_the_wait_and_fills_with_zeros(
    primitives: ModuleType, rng: np.random.Generator, seed: int
) -> None:
    words, expected = copy_input(rng)
    out, _, _ = run(primitives, "copy", words, 32 * 4, seed=seed)
    assert np.array_equal(out.reshape(32, 4), expected)


def test_cp_async_read_before_the_wait_is_nan(primitives: ModuleType, rng: np.random.Generator) -> None:
    words, expected = copy_input(rng)
    out, _, _ = run(primitives, "copy_unwaited", words, 32 * 4, seed=0)
    assert (out == NAN_WORD).all()
    out, _, _ = run(primitives, "copy_unwaited", words, 32 * 4, seed=1)
    is_there = (out.reshape(32, 4) == expected).all(1)
    assert 0 < is_there.sum() < 32, "with random arrival some copies land at once"


@pytest.mark.parametrize("seed", LATE_SEEDS)
def test_cp_async_wait_leaves_the_latest_group_under_way(
    primitives: ModuleType, rng: np.random.Generator, seed: int
) -> None:
    words = rng.integers(0, 2**31, (32, 8)).astype(np.uint32)
    out, _, _ = run(primitives, "copy_groups", words, 32 * 8, seed=seed)
    assert np.array_equal(out.reshape(32, 8)[:, :4], words[:, :4])
    assert (out.reshape(32, 8)[:, 4:] == NAN_WORD).all()


# ---- barriers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["neighbour_sync_threads", "neighbour_bar_sync"])
@pytest.mark.parametrize("seed", SEEDS)
def test_barrier_orders_warps(primitives: ModuleType, rng: np.random.Generator, kernel: str, seed: int) -> None:
    words = rng.integers(0, 2**31, 64).astype(np.uint32)
    out, _, _ = run(primitives, kernel, words, 64, threads=64, seed=seed)
    assert np.array_equal(out, np.roll(words, -32))


@pytest.mark.parametrize("kernel", ["neighbour_unsynced", "neighbour_sync_warp", "lanes_unsynced"])
def test_barrier_left_out_shows(primitives: ModuleType, rng: np.random.Generator, kernel: str) -> None:
    num_threads = 32 if kernel.startswith("lanes") else 64
    words = rng.integers(0, 2**31, num_threads).astype(np.uint32)
    outs = [run(primitives, kernel, words, num_threads, threads=num_threads, seed=seed)[0] for seed in SEEDS]
    assert any((out == NAN_WORD).any() for out in outs)


@pytest.mark.parametrize("seed", SEEDS)
def test_sync_warp_orders_lanes(primitives: ModuleType, rng: np.random.Generator, seed: int) -> None:
    words = rng.integers(0, 2**31, 32).astype(np.uint32)
    out, _, _ = run(primitives, "lanes", words, 32, seed=seed)
    assert np.array_equal(out, words[::-1])


@pytest.mark.parametrize("seed", SEEDS)
def test_bar_arrive_releases_who_waits(primitives: ModuleType, rng: np.random.Generator, seed: int) -> None:
    words = rng.integers(0, 2**31, 32).astype(np.uint32)
    out, _, _ = run(primitives, "arrive", words, 32, threads=64, seed=seed)
    assert np.array_equal(out, words)


# ---- memory between blocks ------------------------------------------------------------------------------------------

MESSAGE = np.arange(1, 65, dtype=np.float32)


def message(primitives: ModuleType, kernel: str, seed: int) -> npt.NDArray[np.float32]:
    """[2, 64]: what the later block read of the other's stores, by single words and by pairs."""
    out, _, _ = run(primitives, kernel, np.zeros(4 + 128), 128, blocks=2, threads=64, seed=seed)
    return out.view(np.float32).reshape(2, 64)


@pytest.mark.parametrize("seed", SEEDS)
def test_fence_before_the_ticket_shows_the_other_blocks_stores(primitives: ModuleType, seed: int) -> None:
    assert np.array_equal(message(primitives, "message", seed), [MESSAGE, MESSAGE])


@pytest.mark.parametrize("kernel", ["message_unfenced", "message_fenced_too_early"])
@pytest.mark.parametrize("seed", LATE_SEEDS)
def test_fence_left_out_or_before_the_barrier_does_not(primitives: ModuleType, kernel: str, seed: int) -> None:
    received = message(primitives, kernel, seed)
    assert (received[:, 1:] == 0).all(), "stores of threads that did not fence"


def test_global_stores_of_every_width_arrive(primitives: ModuleType, rng: np.random.Generator) -> None:
    values = rng.standard_normal(32).astype(np.float32)
    out, _, _ = run(primitives, "store_widths", values.view(np.uint32), 128, seed=2)
    assert np.array_equal(out.view(np.float32).reshape(32, 4), np.stack([values, values, values, -values], 1))


# ---- arithmetic -----------------------------------------------------------------------------------------------------


def test_functions_are_within_their_bounds(primitives: ModuleType, rng: np.random.Generator) -> None:
    x = np.exp2(rng.uniform(-20, 6, 32)).astype(np.float32)
    x[:3] = 0.0, 1.0, np.inf
    ex2, lg2, rcp = run(primitives, "functions", x.view(np.uint32), 96)[0].view(np.float32).reshape(32, 3).T
    exact = x.astype(np.float64)
    assert ex2[0] == 1.0 and ex2[1] == 2.0 and ex2[2] == np.inf
    assert lg2[0] == -np.inf and lg2[1] == 0.0 and lg2[2] == np.inf
    assert rcp[0] == np.inf and rcp[1] == 1.0 and rcp[2] == 0.0
    np.testing.assert_allclose(ex2[3:], np.exp2(exact[3:]), rtol=2**-22)
    np.testing.assert_allclose(lg2[3:], np.log2(exact[3:]), rtol=2**-22, atol=2**-22)
    np.testing.assert_allclose(rcp[3:], 1 / exact[3:], rtol=2**-23)
    negative = run(primitives, "functions", (-x).view(np.uint32), 96)[0].view(np.float32).reshape(32, 3)
    assert negative[2, 0] == 0.0, "2^-inf"
    subnormal = run(primitives, "functions", np.full(32, -126.5, np.float32).view(np.uint32), 96)[0]
    assert subnormal.view(np.float32)[0] == 0.0, "subnormal results are flushed"


@pytest.mark.parametrize("element", ["f16", "bf16"])
def test_pack2_rounds_to_nearest_even_and_puts_low_low(
    primitives: ModuleType, rng: np.random.Generator, element: str
) -> None:
    values = rng.standard_normal((32, 2)).astype(np.float32)
    # Halfway between two neighbours of either type, once with an even and once with an odd lower one.
    ulp = 2.0**-10 if element == "f16" else 2.0**-7
    values[:2] = [[1 + 0.5 * ulp, 1 + 1.5 * ulp], [np.inf, np.nan]]
    out, _, _ = run(primitives, f"pack_{element}", values.view(np.uint32), 32)
    halves = out.view(np.uint16).reshape(32, 2)
    if element == "f16":
        packed = halves.view(np.float16).astype(np.float64)
    else:
        packed = (halves.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    assert packed[0].tolist() == [1.0, 1 + 2 * ulp]
    assert np.isinf(packed[1, 0]) and np.isnan(packed[1, 1])
    relative = np.abs(packed[2:] / values[2:] - 1)
    assert relative.max() <= ulp / 2


# ---- banks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "stride_bytes", "wavefronts", "least"),
    [
        # 32 banks of 4 bytes: a stride of 2 words uses every other bank, of 32 words one bank.
        ("banks_4", 4, 1, 1),
        ("banks_4", 0, 1, 1),  # one word for all
        ("banks_4", 8, 2, 1),
        ("banks_4", 128, 32, 1),
        ("banks_4", 132, 1, 1),  # a row padded by one word
        # Half a warp at a time.
        ("banks_8", 8, 2, 2),
        ("banks_8", 16, 4, 2),
        ("banks_8", 128, 32, 2),
        # A quarter.
        ("banks_16", 16, 4, 4),
        ("banks_16", 32, 8, 4),
        ("banks_16", 128, 32, 4),
        ("banks_ldmatrix", 16, 4, 4),
        ("banks_ldmatrix", 128, 32, 4),
        ("banks_ldmatrix", 80, 4, 4),  # rows padded to 5 chunks of 16 bytes: 5 is odd
    ],
)
def test_banks_count_as_worked_out_by_hand(
    primitives: ModuleType, kernel: str, stride_bytes: int, wavefronts: int, least: int
) -> None:
    _, counted, conflicts = run(primitives, kernel, np.arange(32) * stride_bytes % 4096, seed=1)
    assert (counted, conflicts) == (wavefronts, wavefronts - least)


# ---- misuse ---------------------------------------------------------------------------------------------------------


def test_lanes_on_different_lines_are_reported(primitives: ModuleType) -> None:
    with pytest.raises(RuntimeError, match=r"divergent warp: sync_warp, .*primitives\.cuh:\d+"):
        run(primitives, "divergent", [0])


def test_deadlock_is_reported_with_every_warps_line(primitives: ModuleType) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)deadlock:.*warp 0 lane 0: barrier at .*\.cuh:\d+.*warp 1 .*: exited"):
        run(primitives, "deadlock", [0], threads=64)


def test_barrier_of_differing_counts_is_reported(primitives: ModuleType) -> None:
    with pytest.raises(RuntimeError, match=r"barrier 1 of .* threads is under way"):
        run(primitives, "barrier_counts", [0], threads=64)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (0, "shared address .* is not a multiple of 16"),
        (1, "global address is not a multiple of 16"),
        (2, "cp.async: outside of the tensors"),
        (3, "outside of shared memory"),
        (4, "outside of shared memory"),
        (5, "st.global: outside of the tensors"),
        (6, "ends before its cp.async have landed"),
        (7, "lane must be in"),
    ],
)
def test_bad_access_is_reported(primitives: ModuleType, what: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        run(primitives, "bad_access", [what, 0, 0, 0, 0], seed=0)


def test_launch_after_a_failed_one_starts_afresh(primitives: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="deadlock"):
        run(primitives, "deadlock", [0], threads=64)
    out, _, _ = run(primitives, "neighbour_sync_threads", np.arange(64), 64, threads=64)
    assert np.array_equal(out, np.roll(np.arange(64), -32))


@pytest.mark.parametrize("seed", SEEDS)
def test_launch_of_one_seed_repeats_itself(primitives: ModuleType, rng: np.random.Generator, seed: int) -> None:
    words, _ = copy_input(rng)
    outs = [run(primitives, "copy_unwaited", words, 32 * 4, seed=seed)[0] for _ in range(2)]
    assert np.array_equal(outs[0], outs[1])


# ---- vectors, elements and roundings that are not fused -------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_vectors_of_16_and_8_bytes_move_as_they_are(
    seed: int, primitives: ModuleType, rng: np.random.Generator
) -> None:
    words = rng.integers(0, 2**32, (32, 4), np.uint32)
    out, _, _ = run(primitives, "move_vectors", words, 256, seed=seed)
    expected = np.concatenate([words, words[:, 2:], np.full((32, 2), NAN_WORD, np.uint32)], 1)
    assert (out.reshape(32, 8) == expected).all()


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_unpack_gives_every_element_exactly(dtype: str, primitives: ModuleType) -> None:
    pairs = np.arange(2**16, dtype=np.uint32) | (np.arange(2**16, dtype=np.uint32) ^ 0xFFFF) << 16
    for words in pairs.reshape(-1, 32)[::37]:
        out, _, _ = run(primitives, f"unpack_{dtype}", words, 64)
        halves = words.view(np.uint16)
        expected = halves.view(np.float16).astype(np.float32) if dtype == "f16" else (halves.astype(np.uint32) << 16)
        np.testing.assert_array_equal(out.view(np.float32), expected.view(np.float32))


def test_products_and_sums_are_rounded_one_by_one_and_integers_to_nearest_even(primitives: ModuleType) -> None:
    rng = np.random.default_rng(3)
    inputs = rng.standard_normal((32, 4)).astype(np.float32)
    inputs[0, :3] = 1 + 2**-12, 1 + 2**-12, -(1 + 2**-11)  # fused, the sum would be 2^-24
    inputs[:6, 3] = 0.5, 1.5, 2.5, -0.5, -1.5, 100.75
    out, _, _ = run(primitives, "rounded", inputs.view(np.uint32), 96)
    results = out.reshape(32, 3)
    a, b, c = inputs[:, 0], inputs[:, 1], inputs[:, 2]
    assert (results[:, 0].view(np.float32) == a * b + c).all() and results[0, 0].view(np.float32) == 0.0
    assert (np.ascontiguousarray(results[:, 1]).view(np.float32) == a / b).all()
    assert np.ascontiguousarray(results[:6, 2]).view(np.int32).tolist() == [0, 2, 2, 0, -2, 101]


@pytest.mark.parametrize("seed", SEEDS)
def test_shared_vectors_of_16_bytes_move_whole(seed: int, primitives: ModuleType) -> None:
    words = np.arange(128, dtype=np.uint32).reshape(32, 4) * 0x01010101
    out, _, _ = run(primitives, "shared_vectors", words, 128, seed=seed)
    assert (out.reshape(32, 4) == np.roll(words, -1, axis=0)).all()


def test_byte_perm_picks_bytes_and_their_signs(primitives: ModuleType) -> None:
    a, b = 0x83020100, 0x87060584
    cases = {0x3210: a, 0x7654: b, 0x4140: 0x84018400, 0x9180: 0x00010000, 0xB3A2: 0xFF830002, 0xFEDC: 0xFF0000FF}
    words = np.array([(a, b, selector) for selector in cases] * 6, np.uint32)[:32]
    out, _, _ = run(primitives, "permute_bytes", words, 32)
    assert [f"{word:#x}" for word in out] == [f"{word:#x}" for word in ([*cases.values()] * 6)[:32]]


def test_fma2_f16_rounds_either_half_once_and_keeps_subnormals(primitives: ModuleType) -> None:
    rng = np.random.default_rng(5)
    a, b, c = rng.standard_normal((3, 64)).astype(np.float16)
    a[0], b[0], c[0] = 1 + 2**-10, 1 + 2**-10, -1 - 2**-9  # unfused, the product would lose 2^-20
    a[1], b[1], c[1] = 2**-12, 2**-12, 0
    words = np.stack([np.ascontiguousarray(x).view(np.uint32) for x in (a, b, c)], 1)
    out, _, _ = run(primitives, "fma_pairs", words, 32)
    expected = (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float16)
    assert expected[0] == np.float16(2.0**-20) and expected[1] == np.float16(2.0**-24)
    np.testing.assert_array_equal(out.view(np.float16), expected)
