"""Which tiles of K and V the sm_90 kernel loads in boxes of their pages (TMA), and that it gathers the others."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.cases import AttentionCase, make_inputs
from tests.cuda.attention_run import AttentionRun, prepare
from tests.cuda.conftest import forget
from tests.cuda.emulation import NUM_SMS, Emulation
from tests.cuda.test_door import HOPPER_CASE, run
from tests.cuda.test_mixed_attention import SEEDS, WINDOW_CASE, check, far_apart

TILE_KEYS, PANEL_COLUMNS = 128, 64
BOX_SLOTS = {1: 0, 7: 0, 8: 0, 16: 16, 24: 0, 32: 32, 48: 16, 64: 64, 96: 32, 128: 128, 256: 128, 384: 128}
"""Slots of a box by page size: the most that tile a page and 128 keys alike; below 16 there are none."""
NAMED_PAGE_SIZES = (1, 16, 32, 48, 64, 128)
KINDS_THAT_ARE_NOT_SMALL = (0, 1)


def boxes_case(head_dim: int, page_size: int, **changes: object) -> AttentionCase:
    """A chunk whose splits cut tiles, beside a decode."""
    return dataclasses.replace(
        AttentionCase(
            f"boxes-head-dim-{head_dim}-page-{page_size}", (70, 1), (420, 33), num_kv_heads=2, num_q_heads=2,
            head_dim=head_dim, page_size=page_size, num_workers=3,
        ),
        **changes,
    )  # fmt: skip


def num_boxes(run: AttentionRun, box_slots: int) -> int:
    """That the kernel is to load: of K and of V in every tile that is whole."""
    whole_tiles = 0
    for item in run.work_plan.items():
        if item["kind"] in KINDS_THAT_ARE_NOT_SMALL:
            first, end = -(-item["kv_begin"] // TILE_KEYS), item["kv_end"] // TILE_KEYS
            whole_tiles += max(0, int(end - first))
    panels = -(-run.case.head_dim // PANEL_COLUMNS)
    return 0 if box_slots == 0 else whole_tiles * 2 * panels * TILE_KEYS // box_slots


@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("page_size", NAMED_PAGE_SIZES)
def test_whole_tiles_and_no_others_come_in_boxes_on_every_schedule(
    page_size: int, head_dim: int, emulation: Emulation
) -> None:
    case = boxes_case(head_dim, page_size)
    inputs = make_inputs(case, torch.bfloat16)
    run = prepare(case, torch.bfloat16, inputs=inputs, capability=90)
    expected = num_boxes(run, BOX_SLOTS[page_size])
    assert (expected > 0) is (page_size > 1)
    for seed in SEEDS:
        counts = run.launch(emulation, seed=seed)
        check(run, inputs)
        assert counts["num_boxes"] == expected
        assert counts["num_copies"] > 0, "queries, and tiles that are cut"


@pytest.mark.parametrize(
    "page_size", [page_size for page_size in BOX_SLOTS if page_size not in (1, 16, 32, 48, 64, 128)]
)
def test_box_is_the_largest_that_tiles_page_and_tile(page_size: int, emulation: Emulation) -> None:
    case = boxes_case(64, page_size)
    inputs = make_inputs(case, torch.float16)
    run = prepare(case, torch.float16, inputs=inputs, capability=90)
    counts = run.launch(emulation, seed=1)
    check(run, inputs)
    assert counts["num_boxes"] == num_boxes(run, BOX_SLOTS[page_size])


def test_tile_whose_first_keys_no_row_sees_is_gathered(emulation: Emulation) -> None:
    inputs = make_inputs(WINDOW_CASE, torch.bfloat16)
    run = prepare(WINDOW_CASE, torch.bfloat16, inputs=inputs, capability=90)
    first_key, page_size = 528 - 40 - 200, WINDOW_CASE.page_size
    assert first_key % TILE_KEYS == 32
    assert inputs.v_cache[inputs.block_table[0, first_key // page_size - 1]].isnan().all()
    assert inputs.v_cache[0].isnan().any(), "where keys that are not the item's would be looked for"
    for seed in SEEDS:
        counts = run.launch(emulation, seed=seed)
        check(run, inputs)
        # Two kv heads, K and V, the keys from 384 to 511.
        assert counts["num_boxes"] == num_boxes(run, BOX_SLOTS[page_size]) == 2 * 2 * TILE_KEYS // 16


def with_caches(run: AttentionRun, k_cache: Tensor, v_cache: Tensor) -> None:
    run.inputs = dataclasses.replace(run.inputs, k_cache=k_cache, v_cache=v_cache)


def test_boxes_follow_strides_of_k_and_v_of_their_own(emulation: Emulation) -> None:
    """Heads outside of slots in K, pages far apart in V: offsets past 2^32."""
    case = boxes_case(64, 16)
    inputs = make_inputs(case, torch.bfloat16)
    run = prepare(case, torch.bfloat16, inputs=inputs, capability=90)
    heads_first = inputs.k_cache.transpose(1, 2).contiguous().transpose(1, 2)
    with_caches(run, heads_first, far_apart(inputs.v_cache, 2**28))
    assert inputs.v_cache.shape[0] * 2**28 > 2**32
    assert run.launch(emulation, seed=2)["num_boxes"] == num_boxes(run, 16)
    check(run, inputs)


def test_heads_that_share_their_memory_are_gathered(emulation: Emulation) -> None:
    """An expanded cache has a stride of 0, which a map must not have."""
    case = boxes_case(64, 16)
    inputs = make_inputs(case, torch.bfloat16)
    shared = dataclasses.replace(
        inputs, **{name: getattr(inputs, name)[:, :, :1].expand(-1, -1, 2, -1) for name in ("k_cache", "v_cache")}
    )
    run = prepare(case, torch.bfloat16, inputs=shared, capability=90)
    assert run.launch(emulation, seed=0)["num_boxes"] == 0
    check(run, shared)


def test_pages_further_apart_than_a_map_can_say_are_gathered(emulation: Emulation) -> None:
    case = boxes_case(64, 256, kv_lens=(300, 33))
    inputs = make_inputs(case, torch.bfloat16)
    run = prepare(case, torch.bfloat16, inputs=inputs, capability=90)
    with_caches(run, far_apart(inputs.k_cache, 2**39), inputs.v_cache)
    assert run.launch(emulation, seed=0)["num_boxes"] == 0
    check(run, inputs)


def test_launch_in_a_graph_keeps_its_maps(emulation: Emulation) -> None:
    case = boxes_case(128, 32)
    inputs = make_inputs(case, torch.bfloat16)
    run = prepare(case, torch.bfloat16, inputs=inputs, capability=90)
    with emulation.capture():
        run.launch(emulation, seed=1)
    for _ in range(2):
        run.out.fill_(torch.nan)
        emulation.replay()
        check(run, inputs)
        assert emulation.counts()["num_boxes"] == num_boxes(run, 32) > 0


def test_driver_that_makes_no_maps_has_all_tiles_gathered_to_the_same_bits(
    emulation: Emulation, tmp_path: Path
) -> None:
    """One of CUDA 11: the library, less the name of the function."""
    name = b"cuTensorMapEncodeTiled"
    library = emulation.path.read_bytes()
    assert name in library
    old = tmp_path / "old_driver.so"
    old.write_bytes(library.replace(name, name[::-1]))
    case = boxes_case(128, 16)
    inputs = make_inputs(case, torch.bfloat16)
    run = prepare(case, torch.bfloat16, inputs=inputs, capability=90)
    assert run.launch(emulation, seed=0)["num_boxes"] > 0
    expected = run.out.clone(), run.lse.clone()
    assert run.launch(Emulation(old), seed=0)["num_boxes"] == 0
    assert torch.equal(run.out, expected[0]) and torch.equal(run.lse, expected[1])


def test_map_that_the_driver_refuses_is_its_error(emulation: Emulation) -> None:
    """Not gathered in silence: box_slots of sm90/params.h is to know what a driver takes."""
    image = emulation.image(capability=90)
    words = torch.zeros(4096, dtype=torch.int32)
    boxed = words.data_ptr(), (64, 1, 16, 1), (64, 1028, 1024), (64, 1, 16, 1)
    with pytest.raises(RuntimeError, match="cuTensorMapEncodeTiled: CUDA_ERROR_INVALID_VALUE"):
        image.launch_pointers(
            kernel="mixattn_sm90_bf16_hd64_plain", num_blocks=NUM_SMS, num_threads=512, shared_bytes=1024,
            pointers=[], boxed=boxed, stream=0,
        )  # fmt: skip


def test_attention_on_hopper_loads_boxes(driver: Emulation) -> None:
    driver.configure(capability=90)
    forget()
    case = dataclasses.replace(HOPPER_CASE, q_lens=(1, 40), kv_lens=(300, 290))
    inputs = make_inputs(case, torch.bfloat16)
    run(case, inputs)
    assert driver.counts()["num_boxes"] > 0
    case = dataclasses.replace(case, page_size=8)
    run(case, make_inputs(case, torch.bfloat16))
    assert driver.counts()["num_boxes"] == 0
