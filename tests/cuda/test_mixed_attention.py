"""The CUDA attention kernel, emulated, on every named case, and what the cases do not reach: strides, the workspace."""

from __future__ import annotations

import ctypes
import dataclasses
import mmap

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.cases import (
    CASES,
    PREFIX_CASES,
    SCORE_CASES,
    V_HEAD_DIM_CASES,
    AttentionCase,
    AttentionInputs,
    assert_attention_close,
    make_inputs,
)
from tests.cuda.attention_run import AttentionRun, prepare
from tests.cuda.emulation import Emulation

DTYPES = [torch.bfloat16, torch.float16]
HEAD_DIMS = (64, 96, 128, 192, 256)
HEADS = {(head_dim, head_dim) for head_dim in HEAD_DIMS} | {(192, 128)}
"""head_dim and v_head_dim."""
SUPPORTED_CASES = [
    case for case in CASES + SCORE_CASES + PREFIX_CASES + V_HEAD_DIM_CASES if (case.head_dim, case.value_dim) in HEADS
]
SM90_HEAD_DIMS = (64, 96, 128)
SM90_CASES = [
    case
    for case in SUPPORTED_CASES
    if case.head_dim == case.value_dim in SM90_HEAD_DIMS and case.alibi is None and case.tree_mask is None
]
"""Those that the kernel for sm_90 takes; on the others the kernel for sm_80 runs there too."""
SEEDS = range(3)
"""One of each pair of schedule and arrival."""
SPLIT_CASE = AttentionCase("splits-chunk-and-decode", (1, 40, 9), (300, 90, 200), num_q_heads=6, num_workers=8)
ALL_KINDS_CASES = [
    AttentionCase(
        f"all-kinds-head-dim-{head_dim}" + (f"-v{v_head_dim}" if v_head_dim != head_dim else ""),
        (70, 1, 20),
        (200, 333, 150),
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        window_left=180,
        num_workers=6,
    )
    for head_dim, v_head_dim in sorted(HEADS)
]
"""140 packed rows, of which 128 are one large item: more than one tile of a wide head has."""

LONG_CHUNK_CASE = AttentionCase(
    "long-chunk-beside-decode-head-dim-128",
    (40, 1),
    (900, 130),
    num_q_heads=4,
    num_kv_heads=1,
    head_dim=128,
    num_workers=3,
)
"""More tiles of keys than the ring of sm_90's kernel has places, by few threads."""

WINDOW_CASE = AttentionCase(
    "chunk-whose-window-begins-inside-a-tile", (40,), (528,), num_q_heads=4, num_kv_heads=2, page_size=48,
    window_left=200, num_workers=1,
)  # fmt: skip
"""Of its first tile of 128 keys the kernels must not read the first 32, which are NaN; the second it sees whole."""

KERNELS = [
    *(pytest.param(case, dtype, 80, id=f"{case.id}-{dtype}-sm_80") for case in SUPPORTED_CASES for dtype in DTYPES),
    *(pytest.param(case, torch.bfloat16, 90, id=f"{case.id}-sm_90") for case in SM90_CASES),
]
CAPABILITIES = [80, 90]


def check(run: AttentionRun, inputs: AttentionInputs, *, has_lse: bool = True) -> None:
    assert_attention_close(run.case, inputs, run.out, run.lse if has_lse else None)
    assert not run.tickets.any()


@pytest.mark.parametrize(("case", "dtype", "capability"), KERNELS)
def test_mixed_attention_named_case_is_within_twice_eager_on_every_schedule(
    case: AttentionCase, dtype: torch.dtype, capability: int, emulation: Emulation
) -> None:
    inputs = make_inputs(case, dtype)
    run = prepare(case, dtype, inputs=inputs, capability=capability)
    assert run.work_plan.num_merges > 0 or case.num_workers is None, "the case is to force splits"
    results = []
    for seed in SEEDS:
        run.launch(emulation, seed=seed)
        check(run, inputs)
        results.append((run.out.clone(), run.lse.clone()))
    assert all(torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1]) for out, lse in results)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("case", ALL_KINDS_CASES, ids=lambda case: case.id)
def test_mixed_attention_items_of_every_kind_are_within_twice_eager(
    case: AttentionCase, capability: int, emulation: Emulation
) -> None:
    inputs = make_inputs(case, torch.float16)
    run = prepare(case, torch.float16, inputs=inputs, capability=capability)
    for seed in SEEDS:
        run.launch(emulation, seed=seed)
        check(run, inputs)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("num_blocks", [1, 2, 7])
def test_mixed_attention_any_number_of_blocks_gives_the_same_bits(
    num_blocks: int, capability: int, emulation: Emulation
) -> None:
    run = prepare(SPLIT_CASE, torch.float16, capability=capability)
    run.launch(emulation, seed=0)
    expected = run.out.clone(), run.lse.clone()
    for seed in SEEDS:
        run.launch(emulation, seed=seed, num_blocks=num_blocks)
        assert not run.tickets.any()
        assert torch.equal(run.out, expected[0])
        assert torch.equal(run.lse, expected[1])


def test_mixed_attention_with_a_plan_that_mixes_kinds_runs_the_kernel_of_one_queue(emulation: Emulation) -> None:
    inputs = make_inputs(SPLIT_CASE, torch.bfloat16)
    run = prepare(SPLIT_CASE, torch.bfloat16, inputs=inputs)
    run.launch(emulation, seed=0)
    expected = run.out.clone()
    run.capability = 90
    run.launch(emulation, seed=0)
    check(run, inputs)
    assert torch.equal(run.out, expected)


def test_mixed_attention_without_lse_leaves_it_alone(emulation: Emulation) -> None:
    inputs = make_inputs(SPLIT_CASE, torch.bfloat16)
    run = prepare(SPLIT_CASE, torch.bfloat16, inputs=inputs)
    run.launch(emulation, seed=1, wants_lse=False)
    assert run.lse.isnan().all()
    check(run, inputs, has_lse=False)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("window_left", [None, 40])
def test_mixed_attention_splits_that_cut_a_tile_are_exact(
    window_left: int | None, capability: int, emulation: Emulation
) -> None:
    case = AttentionCase("odd-splits", (2, 70), (250, 190), window_left=window_left, num_workers=8, logit_std=3.0)
    inputs = make_inputs(case, torch.float16)
    run = prepare(case, torch.float16, split_tokens=24, inputs=inputs, capability=capability)
    assert any(item["kv_begin"] % 64 for item in run.work_plan.items())
    run.launch(emulation, seed=2)
    check(run, inputs)


def strided(tensor: Tensor) -> Tensor:
    """The same values behind other strides, with gaps of NaN; the last dimension stays contiguous."""
    order = [*range(tensor.dim() - 2, -1, -1), tensor.dim() - 1]
    shape = [tensor.shape[i] for i in order[:-1]]
    wide = torch.full((*shape, 2 * tensor.shape[-1]), torch.nan, dtype=tensor.dtype)
    view = wide.permute(*np.argsort(order))[..., : tensor.shape[-1]]
    return view.copy_(tensor)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("has_same_strides", [True, False])
def test_mixed_attention_any_strides_give_the_same_bits(
    has_same_strides: bool, capability: int, emulation: Emulation
) -> None:
    run = prepare(SPLIT_CASE, torch.float16, capability=capability)
    run.launch(emulation, seed=0)
    expected = run.out.clone(), run.lse.clone()
    inputs = run.inputs
    run.inputs = AttentionInputs(
        q=strided(inputs.q),
        k_cache=strided(inputs.k_cache),
        v_cache=strided(inputs.v_cache) if has_same_strides else inputs.v_cache,
        cu_seqlens_q=inputs.cu_seqlens_q,
        seq_lens=inputs.seq_lens,
        block_table=torch.nn.functional.pad(inputs.block_table, (0, 3), value=-1)[:, :-3],
    )
    assert not run.inputs.q.is_contiguous() and not run.inputs.k_cache.is_contiguous()
    run.out = strided(run.out)
    run.lse = torch.empty(run.lse.shape[0], 2 * run.lse.shape[1])[:, : run.lse.shape[1]]
    run.launch(emulation, seed=0)
    assert torch.equal(run.out, expected[0])
    assert torch.equal(run.lse, expected[1])


def far_apart(cache: Tensor, page_stride: int) -> Tensor:
    """A copy of the cache with its pages this many elements apart, in address space that takes no memory."""
    num_bytes = page_stride * cache.shape[0] * cache.element_size()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    space = torch.from_numpy(np.frombuffer(mmap.mmap(-1, num_bytes, flags=flags), dtype=np.int16)).view(cache.dtype)
    view = space.as_strided(cache.shape, (page_stride, *cache.stride()[1:]))
    return view.copy_(cache)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_mixed_attention_page_offsets_past_2_31_do_not_wrap(capability: int, emulation: Emulation) -> None:
    case = AttentionCase("far-pages", (1, 30), (20, 40), num_q_heads=2, num_kv_heads=1)
    inputs = make_inputs(case, torch.bfloat16)
    run = prepare(case, torch.bfloat16, inputs=inputs, capability=capability)
    page_stride = 2**30
    assert inputs.k_cache.shape[0] * page_stride > 2**32
    run.inputs = AttentionInputs(
        q=inputs.q,
        k_cache=far_apart(inputs.k_cache, page_stride),
        v_cache=far_apart(inputs.v_cache, page_stride),
        **inputs.index_tensors,
    )
    run.launch(emulation, seed=0)
    check(run, inputs)


def before_guard_page(table: Tensor) -> Tensor:
    """A copy of the int32 table whose last entry is the last word of a mapping: reading one more is a crash."""
    num_bytes = table.numel() * table.element_size()
    num_pages = -(-num_bytes // mmap.PAGESIZE)
    mapping = mmap.mmap(-1, (num_pages + 1) * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    guard = ctypes.c_void_p(address + num_pages * mmap.PAGESIZE)
    assert ctypes.CDLL(None).mprotect(guard, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    offset = num_pages * mmap.PAGESIZE - num_bytes
    copy = torch.from_numpy(np.frombuffer(mapping, np.int32, table.numel(), offset)).view(table.shape)
    return copy.copy_(table)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_mixed_attention_block_table_is_not_read_past_the_last_page(capability: int, emulation: Emulation) -> None:
    case = AttentionCase("guarded-table", (1, 15), (3, 20), num_q_heads=2, num_kv_heads=1, page_size=1)
    inputs = make_inputs(case, torch.float16)
    run = prepare(case, torch.float16, inputs=inputs, capability=capability)
    table = before_guard_page(inputs.block_table[:, : max(case.kv_lens)].contiguous())
    run.inputs = dataclasses.replace(run.inputs, block_table=table)
    run.launch(emulation, seed=0)
    check(run, inputs)


@pytest.mark.parametrize(
    ("case", "dtype", "message"),
    [
        (dataclasses.replace(SPLIT_CASE, head_dim=40), torch.bfloat16, "head_dim 40 .* nearest .* is 64"),
        (dataclasses.replace(SPLIT_CASE, head_dim=248), torch.bfloat16, "head_dim 248 .* nearest .* is 256"),
        (
            dataclasses.replace(SPLIT_CASE, head_dim=136, v_head_dim=40),
            torch.bfloat16,
            "head_dim 136 with v_head_dim 40 has no .* nearest .* is 192 with v_head_dim 128$",
        ),
        (
            dataclasses.replace(SPLIT_CASE, v_head_dim=256),
            torch.bfloat16,
            "head_dim 64 with v_head_dim 256 has no .* nearest .* is 256 with v_head_dim 256$",
        ),
        (SPLIT_CASE, torch.float32, "float32 has no CUDA kernel"),
    ],
)
def test_mixed_attention_unsupported_call_names_the_nearest_supported(
    case: AttentionCase, dtype: torch.dtype, message: str, emulation: Emulation
) -> None:
    with pytest.raises(NotImplementedError, match=message):
        prepare(case, dtype).launch(emulation, seed=0)


def test_mixed_attention_misaligned_tensors_are_refused(emulation: Emulation) -> None:
    run = prepare(SPLIT_CASE, torch.float16)
    inputs = run.inputs
    odd_stride = torch.zeros(*inputs.q.shape[:2], inputs.q.shape[2] + 4, dtype=inputs.q.dtype)[..., :64]
    run.inputs = dataclasses.replace(inputs, q=odd_stride)
    with pytest.raises(NotImplementedError, match=r"q head stride 68 .* multiple of 8"):
        run.launch(emulation, seed=0)
    odd_start = torch.zeros(inputs.q.numel() + 4, dtype=inputs.q.dtype)[4:].view(inputs.q.shape)
    run.inputs = dataclasses.replace(inputs, q=odd_start)
    with pytest.raises(NotImplementedError, match="q must start at a multiple of 16 bytes"):
        run.launch(emulation, seed=0)
    run.inputs, run.tickets = inputs, torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="num_tickets must be in"):
        run.launch(emulation, seed=0)
