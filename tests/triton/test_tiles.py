"""The tile choice: within the hardware's limits everywhere, and what it is meant to be where it matters."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest

from mixattn.ops.plan import A100, H100, Hardware, with_workers
from mixattn.triton_kernels.tiles import PLAN_BLOCK_ROWS, SHARED_BYTES, TileChoice, choose_tiles, shared_bytes

HEAD_DIMS = range(8, 257, 8)


def is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


@pytest.mark.parametrize("capability", [*SHARED_BYTES, (11, 0)])
def test_choose_tiles_every_supported_head_fits_shared_memory(capability: tuple[int, int]) -> None:
    limit = SHARED_BYTES.get(capability, min(SHARED_BYTES.values()))
    for head_dim, v_head_dim, element_bytes in itertools.product(HEAD_DIMS, HEAD_DIMS, (2, 4)):
        tiles = choose_tiles(head_dim, element_bytes, capability, v_head_dim=v_head_dim)
        assert max(head_dim, 16) <= sum(tiles.block_d) < 2 * max(head_dim, 9)
        assert max(v_head_dim, 16) <= tiles.block_dv < 2 * max(v_head_dim, 9)
        assert tiles.block_m[0] <= PLAN_BLOCK_ROWS[0] and tiles.block_m == tuple(sorted(tiles.block_m, reverse=True))
        sizes = (*tiles.block_d, tiles.block_dv, *tiles.block_m, *tiles.block_n)
        assert all(is_power_of_two(size) and size >= 16 for size in sizes)
        assert tiles.programs_per_sm * (shared_bytes(tiles, element_bytes, capability) + 1024) <= limit + 1024


@pytest.mark.parametrize(("capability", "programs_per_sm", "max_registers"), [((8, 0), 1, None), ((9, 0), 2, 128)])
def test_choose_tiles_head_dim_128_bfloat16_is_what_the_contracts_measure(
    capability: tuple[int, int], programs_per_sm: int, max_registers: int | None
) -> None:
    assert choose_tiles(128, 2, capability) == TileChoice(
        block_m=(128, 16),
        block_n=(64, 128),
        num_stages=(2, 2),
        block_d=(128,),
        block_dv=128,
        num_warps=8,
        programs_per_sm=programs_per_sm,
        max_registers=max_registers,
    )


@pytest.mark.parametrize(
    ("head_dim", "columns"),
    [(8, (16,)), (24, (32,)), (96, (128,)), (128, (128,)), (136, (128, 16)), (160, (128, 32)), (192, (128, 64)),
     (200, (256,)), (256, (256,))],
)  # fmt: skip
def test_choose_tiles_wide_head_of_k_is_in_two_tiles_where_they_have_fewer_columns(
    head_dim: int, columns: tuple[int, ...]
) -> None:
    assert choose_tiles(head_dim, 2, (9, 0)).block_d == columns


@pytest.mark.parametrize(("capability", "num_keys"), [((8, 0), 64), ((9, 0), 128), ((10, 0), 128)])
def test_choose_tiles_head_dim_192_with_values_of_128_is_what_the_contracts_measure(
    capability: tuple[int, int], num_keys: int
) -> None:
    assert choose_tiles(192, 2, capability, v_head_dim=128) == TileChoice(
        block_m=(128, 16),
        block_n=(num_keys, 128),
        num_stages=(2, 2),
        block_d=(128, 64),
        block_dv=128,
        num_warps=8,
        programs_per_sm=1,
        max_registers=None,
    )
    num_quantized_keys = 128 if capability == (9, 0) else 64
    assert choose_tiles(192, 2, capability, v_head_dim=128, stored_bits=8).block_n == (num_quantized_keys, 128)
    assert choose_tiles(192, 2, capability, v_head_dim=128, has_row_terms=True).block_n == (64, 128)


@pytest.mark.parametrize(
    ("capability", "has_row_terms", "num_rows"),
    [((8, 0), False, 64), ((8, 0), True, 32), ((9, 0), False, 128), ((9, 0), True, 128), ((10, 0), True, 128)],
)
def test_choose_tiles_wide_head_has_as_many_rows_as_registers_hold(
    capability: tuple[int, int], has_row_terms: bool, num_rows: int
) -> None:
    for head_dim, stored_bits in itertools.product((192, 256), (16, 8, 4)):
        tiles = choose_tiles(head_dim, 2, capability, stored_bits=stored_bits, has_row_terms=has_row_terms)
        assert tiles.block_m[0] == num_rows
    assert choose_tiles(128, 2, capability, has_row_terms=has_row_terms).block_m[0] == 128


@pytest.mark.parametrize("hardware", [H100, A100], ids=lambda hardware: hardware.name)
def test_choose_tiles_fit_the_plans_of_the_gpu(hardware: Hardware) -> None:
    assert hardware.block_rows == PLAN_BLOCK_ROWS
    for capability, head_dim, v_head_dim in itertools.product(SHARED_BYTES, HEAD_DIMS, HEAD_DIMS):
        # Otherwise the first tile of a split would not start where an unsplit walk has a tile start.
        for block_n in choose_tiles(head_dim, 2, capability, v_head_dim=v_head_dim).block_n:
            assert hardware.split_tokens % block_n == 0


@pytest.mark.parametrize(("hardware", "capability"), [(H100, (9, 0)), (A100, (8, 0))], ids=["H100", "A100"])
def test_choose_tiles_programs_are_the_workers_of_the_hardware(hardware: Hardware, capability: tuple[int, int]) -> None:
    tiles = choose_tiles(128, 2, capability)
    num_sms = {"H100-SXM": 132, "A100-SXM": 108}[hardware.name]
    assert hardware.num_workers == num_sms * tiles.programs_per_sm
    assert with_workers(hardware, num_sms, tiles.programs_per_sm) == hardware
    alone = with_workers(hardware, num_sms, 1)
    assert alone.num_workers * alone.flops_per_s == pytest.approx(hardware.num_workers * hardware.flops_per_s)
    assert alone.num_workers * alone.bytes_per_s == pytest.approx(hardware.num_workers * hardware.bytes_per_s)


def test_choose_tiles_before_ampere_is_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"compute capability 7\.5 is not supported; the nearest is 8\.0"):
        choose_tiles(128, 2, (7, 5))


def test_choose_tiles_head_past_shared_memory_is_refused() -> None:
    message = r"head_dim 4096 and v_head_dim 4096 with 2-byte .* 99 KiB .* 8\.6; the nearest"
    with pytest.raises(NotImplementedError, match=message):
        choose_tiles(4096, 2, (8, 6))


def test_choose_tiles_needs_neither_torch_nor_triton() -> None:
    script = (
        "import sys; sys.modules['torch'] = sys.modules['triton'] = None\n"
        "from mixattn.triton_kernels.tiles import choose_tiles; choose_tiles(128, 2, (9, 0))"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
