"""The Triton attention kernel on every named case, and what the cases do not reach: strides, offsets, the workspace."""

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
from tests.triton.attention_run import AttentionRun, prepare

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SPLIT_CASE = AttentionCase(
    "splits-chunk-and-decode", (1, 9), (300, 200), num_q_heads=4, num_kv_heads=2, head_dim=16, num_workers=8
)


def check(run: AttentionRun, inputs: AttentionInputs) -> None:
    assert_attention_close(run.case, inputs, run.out.cpu(), run.lse.cpu())
    assert not run.tickets.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES + V_HEAD_DIM_CASES, ids=lambda case: case.id)
def test_mixed_attention_named_case_is_within_twice_eager(
    case: AttentionCase, dtype: torch.dtype, device: torch.device
) -> None:
    inputs = make_inputs(case, dtype)
    run = prepare(case, dtype, device, inputs=inputs)
    assert run.work_plan.num_merges > 0 or case.num_workers is None, "the case is to force splits"
    run.launch()
    check(run, inputs)


@pytest.mark.parametrize("case", SCORE_CASES + PREFIX_CASES, ids=lambda case: case.id)
def test_mixed_attention_score_option_or_shared_prefix_is_within_twice_eager(
    case: AttentionCase, device: torch.device
) -> None:
    # In one dtype, the strictest: scores are float32 whatever that of q and K is.
    inputs = make_inputs(case, torch.float32)
    run = prepare(case, torch.float32, device, inputs=inputs)
    run.launch()
    check(run, inputs)


def test_mixed_attention_second_launch_on_the_same_workspace_gives_the_same_bits(device: torch.device) -> None:
    run = prepare(SPLIT_CASE, torch.bfloat16, device)
    assert run.work_plan.num_merges > 0
    results = []
    for _ in range(2):
        run.launch()
        assert not run.tickets.any()
        results.append((run.out.clone(), run.lse.clone()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("num_programs", [1, 3, 100])
def test_mixed_attention_any_number_of_programs_gives_the_same_bits(num_programs: int, device: torch.device) -> None:
    run = prepare(SPLIT_CASE, torch.float16, device)
    assert 3 < run.work_plan.num_items < 100
    run.launch()
    expected = run.out.clone(), run.lse.clone()
    run.launch(num_programs=num_programs)
    assert not run.tickets.any()
    assert torch.equal(run.out, expected[0])
    assert torch.equal(run.lse, expected[1])


def test_mixed_attention_without_lse_leaves_it_alone(device: torch.device) -> None:
    inputs = make_inputs(SPLIT_CASE, torch.float32)
    run = prepare(SPLIT_CASE, torch.float32, device, inputs=inputs)
    run.launch(wants_lse=False)
    assert run.lse.isnan().all()
    assert_attention_close(SPLIT_CASE, inputs, run.out.cpu(), None)


@pytest.mark.parametrize("window_left", [None, 40])
def test_mixed_attention_splits_that_cut_a_tile_are_exact(window_left: int | None, device: torch.device) -> None:
    case = AttentionCase(
        "odd-splits", (2, 70), (250, 190), head_dim=16, window_left=window_left, num_workers=8, logit_std=3.0
    )
    inputs = make_inputs(case, torch.float32)
    run = prepare(case, torch.float32, device, split_tokens=24, inputs=inputs)
    assert any(item["kv_begin"] % 64 for item in run.work_plan.items())
    run.launch()
    check(run, inputs)


def strided(tensor: Tensor) -> Tensor:
    """The same values behind other strides, with gaps of NaN; the last dimension stays contiguous."""
    order = [*range(tensor.dim() - 2, -1, -1), tensor.dim() - 1]
    shape = [tensor.shape[i] for i in order[:-1]]
    wide = torch.full((*shape, 2 * tensor.shape[-1]), torch.nan, dtype=tensor.dtype, device=tensor.device)
    view = wide.permute(*np.argsort(order))[..., : tensor.shape[-1]]
    return view.copy_(tensor)


@pytest.mark.parametrize("has_same_strides", [True, False])
def test_mixed_attention_any_strides_give_the_same_bits(has_same_strides: bool, device: torch.device) -> None:
    run = prepare(SPLIT_CASE, torch.float16, device)
    run.launch()
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
    run.lse = torch.empty(run.lse.shape[0], 2 * run.lse.shape[1], device=device)[:, : run.lse.shape[1]]
    run.launch()
    assert torch.equal(run.out, expected[0])
    assert torch.equal(run.lse, expected[1])


def before_guard_page(table: Tensor) -> Tensor:
    """A copy of the int32 table whose last entry is the last word of a mapping: reading one more is a crash."""
    num_bytes = table.numel() * table.element_size()
    num_pages = -(-num_bytes // mmap.PAGESIZE)
    mapping = mmap.mmap(-1, (num_pages + 1) * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    libc = ctypes.CDLL(None, use_errno=True)
    guard = ctypes.c_void_p(address + num_pages * mmap.PAGESIZE)
    assert libc.mprotect(guard, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    offset = num_pages * mmap.PAGESIZE - num_bytes
    copy = torch.from_numpy(np.frombuffer(mapping, np.int32, table.numel(), offset)).view(table.shape)
    return copy.copy_(table)


def test_mixed_attention_block_table_is_not_read_past_the_last_page(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("needs the interpreter: a GPU's memory has no guard pages")
    case = AttentionCase("guarded-table", (1, 5), (3, 20), num_q_heads=2, num_kv_heads=1, head_dim=16, page_size=1)
    inputs = make_inputs(case, torch.float16)
    run = prepare(case, torch.float16, device, inputs=inputs)
    max_pages = max(case.kv_lens)
    run.inputs = dataclasses.replace(
        run.inputs, block_table=before_guard_page(inputs.block_table[:, :max_pages].contiguous())
    )
    run.launch()
    check(run, inputs)


FAR_CASE = AttentionCase("far-pages", (1, 3), (20, 40), num_q_heads=2, num_kv_heads=1, head_dim=16)
FAR_PAGE_STRIDE = 2**30


def far_apart(cache: Tensor, page_stride: int, *, before: int = 0) -> Tensor:
    """A copy of the cache with its pages this many elements apart, in address space that takes no memory.

    ``before`` elements of zeros lie before its first.
    """
    num_bytes = (before + page_stride * cache.shape[0]) * cache.element_size()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    space = torch.from_numpy(np.frombuffer(mmap.mmap(-1, num_bytes, flags=flags), dtype=np.int16)).view(cache.dtype)
    view = space.as_strided(cache.shape, (page_stride, *cache.stride()[1:]), before)
    return view.copy_(cache)


def test_mixed_attention_page_offsets_past_2_31_do_not_wrap(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type == "cpu":
        # After a launch the interpreter copies every argument's storage back to where it came from, here onto itself.
        monkeypatch.setattr("triton.runtime.interpreter.GridExecutor._restore_args_dev", lambda *_: None)
    else:
        pytest.skip("needs 14 GiB of address space that takes no memory, which a GPU does not give")
    inputs = make_inputs(FAR_CASE, torch.bfloat16)
    run = prepare(FAR_CASE, torch.bfloat16, device, inputs=inputs)
    assert inputs.k_cache.shape[0] * FAR_PAGE_STRIDE > 2**32
    run.inputs = AttentionInputs(
        q=inputs.q,
        k_cache=far_apart(inputs.k_cache, FAR_PAGE_STRIDE),
        v_cache=far_apart(inputs.v_cache, FAR_PAGE_STRIDE),
        **inputs.index_tensors,
    )
    run.launch()
    check(run, inputs)
