"""attention on the CPU, on every ISA that this machine has: the named cases, random batches, views and huge strides."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mixattn
from mixattn import env
from mixattn.ops.plan import Hardware, WorkPlan, cpu_hardware
from mixattn.ops.reference import attention_reference, dequantize_reference
from tests.cases import (
    CASES,
    PREFIX_CASES,
    QUANTIZED_FORMATS,
    SCORE_CASES,
    V_HEAD_DIM_CASES,
    AttentionCase,
    AttentionInputs,
    KvFormat,
    assert_attention_close,
    make_inputs,
    plan_arguments,
    poisoned_out,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def splitting_hardware(num_workers: int) -> Hardware:
    """Many workers to whom an item costs nothing extra: the planner splits wherever a granule ends."""
    return dataclasses.replace(cpu_hardware(1), num_workers=num_workers, item_overhead_s=0.0, split_tokens=32)


def make_plan(case: AttentionCase, inputs: AttentionInputs) -> WorkPlan | None:
    if case.num_workers is None and not case.shared_pages:
        return None
    plan = mixattn.plan(
        inputs.cu_seqlens_q,
        inputs.seq_lens,
        **plan_arguments(case, inputs),
        hardware=splitting_hardware(case.num_workers or 1),
    )
    assert plan.num_merges > 0, "a case that names its workers is there for its splits"
    assert plan.num_groups > 0 or not case.shared_pages, "a case of shared pages is there for its groups"
    return plan


def run(
    case: AttentionCase, inputs: AttentionInputs, backend: str = "cpu", *, rounds_q: bool = False
) -> tuple[Tensor, Tensor]:
    """out and lse of the case; what was in ``out`` before is NaN."""
    out = poisoned_out(inputs)
    result, lse = mixattn.attention(
        inputs.q, inputs.k_cache, inputs.v_cache, **inputs.index_tensors, **inputs.score_tensors, **inputs.scales,
        **case.options, rounds_q=rounds_q, plan=make_plan(case, inputs), out=out, return_lse=True, backend=backend,
    )  # fmt: skip
    assert result is out
    return out, lse


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES + SCORE_CASES + PREFIX_CASES + V_HEAD_DIM_CASES, ids=lambda case: case.id)
def test_attention_of_named_case_is_within_twice_eager(case: AttentionCase, dtype: torch.dtype, isa: str) -> None:
    inputs = make_inputs(case, dtype)
    out, lse = run(case, inputs)
    assert_attention_close(case, inputs, out, lse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES + SCORE_CASES + V_HEAD_DIM_CASES, ids=lambda case: case.id)
def test_reference_backend_of_named_case_is_within_twice_eager(case: AttentionCase, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    out, lse = run(case, inputs, backend="reference")
    assert_attention_close(case, inputs, out, lse)


def quantized_cases() -> list[Any]:
    """Every case with two of the quantised dtypes, and those about splits, windows and page edges with all four."""
    made = []
    for idx, case in enumerate(CASES + SCORE_CASES + PREFIX_CASES + V_HEAD_DIM_CASES):
        has_all = case.num_workers is not None or case.window_left is not None or len(set(case.kv_lens)) > 2
        for offset in range(4 if has_all else 2):
            kv = QUANTIZED_FORMATS[(5 * idx + offset) % len(QUANTIZED_FORMATS)]
            dtype = DTYPES[(idx + offset) % len(DTYPES)]
            made.append(pytest.param(case, dtype, kv, id=f"{case.id}-{str(dtype).removeprefix('torch.')}-{kv.id}"))
    return made


@pytest.mark.parametrize(("case", "dtype", "kv"), quantized_cases())
def test_attention_of_named_case_with_quantized_kv_is_within_twice_eager(
    case: AttentionCase, dtype: torch.dtype, kv: KvFormat, isa: str
) -> None:
    inputs = make_inputs(case, dtype, kv=kv)
    out, lse = run(case, inputs)
    assert_attention_close(case, inputs, out, lse)


@pytest.mark.parametrize(("case", "dtype", "kv"), quantized_cases()[::7])
def test_reference_backend_of_named_case_with_quantized_kv_is_within_twice_eager(
    case: AttentionCase, dtype: torch.dtype, kv: KvFormat
) -> None:
    inputs = make_inputs(case, dtype, kv=kv)
    out, lse = run(case, inputs, backend="reference")
    assert_attention_close(case, inputs, out, lse)


@pytest.mark.parametrize("kv_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_of_float_kv_beside_q_of_any_dtype_is_within_twice_eager(
    dtype: torch.dtype, kv_dtype: torch.dtype, isa: str
) -> None:
    case = next(c for c in CASES if c.id == "chunk-beside-decodes")
    inputs = make_inputs(case, dtype, kv=KvFormat(kv_dtype))
    out, lse = run(case, inputs)
    assert out.dtype == dtype
    assert_attention_close(case, inputs, out, lse)


ROUNDING_CASES = [c for c in CASES if c.num_workers is not None or c.id == "chunk-beside-decodes"]


@pytest.mark.parametrize("kv", [KvFormat(torch.bfloat16), *(f for f in QUANTIZED_FORMATS if f.dtype == torch.int8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", ROUNDING_CASES, ids=lambda case: case.id)
def test_attention_that_rounds_a_q_of_bfloat16s_gives_what_it_gives_for_q_in_bfloat16(
    case: AttentionCase, dtype: torch.dtype, kv: KvFormat, isa: str
) -> None:
    inputs = make_inputs(case, torch.bfloat16, kv=kv)
    expected, expected_lse = run(case, inputs, rounds_q=True)
    wide = dataclasses.replace(inputs, q=inputs.q.to(dtype))
    assert torch.equal(wide.q.to(torch.bfloat16), inputs.q)
    out, lse = run(case, wide, rounds_q=True)
    assert out.dtype == dtype and torch.equal(lse, expected_lse)
    if dtype == torch.float32:  # float16 has not the range to be rounded once more
        assert torch.equal(out.to(torch.bfloat16), expected)


@pytest.mark.parametrize("case", CASES + SCORE_CASES + PREFIX_CASES + V_HEAD_DIM_CASES, ids=lambda case: case.id)
def test_attention_that_may_round_beside_int8_is_off_by_little(case: AttentionCase, isa: str) -> None:
    """Masks, splits, groups and heads, whatever the rounding is: 2^-8 of q and of weights, or 2^-16."""
    inputs = make_inputs(case, torch.float32, kv=KvFormat(torch.int8, "token"))
    out, lse = run(case, inputs, rounds_q=True)
    options = {**inputs.index_tensors, **inputs.score_tensors, **inputs.scales, **case.options}
    true_out, true_lse = attention_reference(
        inputs.q, inputs.k_cache, inputs.v_cache, **options, compute_dtype=torch.float64
    )
    loss = 1.0 if isa in ("amx", "avx512_bf16", "avx512_vnni") else 0.02  # they round to bytes
    torch.testing.assert_close(lse.double(), true_lse, rtol=0.01 * loss, atol=0.1 * loss)
    largest = dequantize_reference(inputs.v_cache, inputs.v_scale).nan_to_num().abs().max() if out.numel() else 1.0
    torch.testing.assert_close(out.double(), true_out, rtol=0, atol=0.05 * loss * float(largest))


def test_attention_rounds_q_only_on_request_and_only_where_pairs_are_faster(isa: str) -> None:
    case = next(c for c in CASES if c.id == "chunk-beside-decodes")
    for kv, rounding_isas in ((torch.bfloat16, {"amx", "avx512_bf16", "neon_bf16"}), (torch.float16, set())):
        inputs = make_inputs(case, torch.float32, kv=KvFormat(kv))
        exact, _ = run(case, inputs)
        rounded, _ = run(case, inputs, rounds_q=True)
        assert torch.equal(exact, rounded) == (isa not in rounding_isas)
        assert not torch.equal(exact, exact.to(torch.bfloat16).float())


@pytest.mark.parametrize("case", [c for c in CASES if c.kv_lens][::5], ids=lambda case: case.id)
def test_attention_returns_the_same_bits_whether_out_is_given(case: AttentionCase) -> None:
    inputs = make_inputs(case, torch.float32)
    out, lse = run(case, inputs)
    plan = make_plan(case, inputs)
    arguments = (inputs.q, inputs.k_cache, inputs.v_cache)
    options = {**inputs.index_tensors, **case.options, "plan": plan}
    new_out, new_lse = mixattn.attention(*arguments, **options, return_lse=True)
    assert torch.equal(new_out, out) and torch.equal(new_lse, lse)
    assert torch.equal(mixattn.attention(*arguments, **options), out)
    if plan is not None:
        assert torch.equal(mixattn.attention(*arguments, **{**options, "plan": torch.from_numpy(plan.buffer)}), out)


def test_attention_repeated_with_one_plan_gives_the_same_bits() -> None:
    """The tickets of a plan's merges are zero again after each call, and merging in split order has one result."""
    case = next(c for c in CASES if c.id == "splits-chunk-beside-decodes")
    inputs = make_inputs(case, torch.float32)
    plan = make_plan(case, inputs)
    results = [
        mixattn.attention(
            inputs.q, inputs.k_cache, inputs.v_cache, **inputs.index_tensors, **case.options, plan=plan
        )
        for _ in range(20)
    ]  # fmt: skip
    assert all(torch.equal(result, results[0]) for result in results)


@st.composite
def random_cases(draw: st.DrawFn) -> AttentionCase:
    num_seqs = draw(st.integers(1, 6))
    num_kv_heads = draw(st.integers(1, 3))
    causal = draw(st.booleans())
    q_lens = draw(st.lists(st.integers(0, 40), min_size=num_seqs, max_size=num_seqs))
    has_tree = causal and draw(st.booleans())
    words = st.sampled_from([-1, 0, 1]) | st.integers(-(2**63), 2**63 - 1)
    return AttentionCase(
        id="random",
        q_lens=tuple(q_lens),
        kv_lens=tuple(draw(st.lists(st.integers(0, 300), min_size=num_seqs, max_size=num_seqs))),
        num_q_heads=num_kv_heads * draw(st.integers(1, 9)),
        num_kv_heads=num_kv_heads,
        head_dim=8 * draw(st.integers(1, 32)),
        v_head_dim=draw(st.none() | st.integers(1, 32).map(lambda n: 8 * n)),
        page_size=draw(st.integers(1, 70)),
        causal=causal,
        window_left=draw(st.none() | st.integers(0, 200)),
        soft_cap=draw(st.none() | st.floats(0.5, 50.0)),
        softmax_scale=draw(st.none() | st.floats(0.01, 2.0)),
        logit_std=draw(st.sampled_from([0.5, 1.0, 4.0])),
        alibi=draw(st.sampled_from([None, "per-head", "per-seq"])),
        has_sinks=draw(st.booleans()),
        tree_mask=tuple(draw(st.lists(words, min_size=sum(q_lens), max_size=sum(q_lens)))) if has_tree else None,
    )


@settings(max_examples=60)
@given(
    case=random_cases(),
    dtype=st.sampled_from(DTYPES),
    kv=st.none() | st.sampled_from(QUANTIZED_FORMATS),
    seed=st.integers(0, 2**31),
    num_workers=st.sampled_from([1, 64]),
)
def test_attention_of_random_batch_is_within_twice_eager(
    case: AttentionCase, dtype: torch.dtype, kv: KvFormat | None, seed: int, num_workers: int
) -> None:
    inputs = make_inputs(case, dtype, seed=seed, kv=kv)
    plan = mixattn.plan(
        inputs.cu_seqlens_q, inputs.seq_lens, **case.plan_options, kv_element_bytes=inputs.k_cache.element_size(),
        hardware=splitting_hardware(num_workers),
    )  # fmt: skip
    out, lse = mixattn.attention(
        inputs.q, inputs.k_cache, inputs.v_cache, **inputs.index_tensors, **inputs.score_tensors, **inputs.scales,
        **case.options, plan=plan, return_lse=True,
    )  # fmt: skip
    assert_attention_close(case, inputs, out, lse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_of_strided_views_gives_the_bits_of_contiguous(dtype: torch.dtype, isa: str) -> None:
    """q out of a fused projection, K head-major, V and out with room behind each row."""
    case = next(c for c in CASES if c.id == "chunk-beside-decodes")
    inputs = make_inputs(case, dtype)
    expected, expected_lse = run(case, inputs)
    fused = torch.cat((inputs.q, inputs.q), dim=1)
    head_major_k = inputs.k_cache.transpose(1, 2).contiguous()
    wide_v = torch.cat((inputs.v_cache, inputs.v_cache), dim=-1)
    wide_out = torch.full((case.total_q, case.num_q_heads + 1, case.head_dim + 8), torch.nan, dtype=dtype)
    wide_table = torch.cat((inputs.block_table, torch.full_like(inputs.block_table, -1)), dim=1)
    out, lse = mixattn.attention(
        fused[:, case.num_q_heads :], head_major_k.transpose(1, 2), wide_v[..., : case.head_dim],
        cu_seqlens_q=inputs.cu_seqlens_q, seq_lens=inputs.seq_lens,
        block_table=wide_table[:, : inputs.block_table.shape[1]],
        out=wide_out[:, :-1, : case.head_dim], return_lse=True,
    )  # fmt: skip
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    assert bool(wide_out[:, -1].isnan().all()) and bool(wide_out[:, :, case.head_dim :].isnan().all())


def test_attention_of_slopes_in_a_wider_table_gives_the_bits_of_contiguous() -> None:
    case = next(c for c in SCORE_CASES if c.id == "alibi-per-seq-chunk-beside-decodes")
    inputs = make_inputs(case, torch.float32)
    expected, _ = run(case, inputs)
    assert inputs.alibi_slopes is not None
    wide = torch.cat((inputs.alibi_slopes, torch.full_like(inputs.alibi_slopes, torch.nan)), dim=1)
    view = dataclasses.replace(inputs, alibi_slopes=wide[:, : case.num_q_heads])
    assert torch.equal(run(case, view)[0], expected)


def test_attention_with_page_offsets_beyond_int32_reads_the_right_pages(isa: str) -> None:
    """A pool of more than 2^31 elements, mapped but, apart from the pages in use, never touched."""
    case = AttentionCase("huge-offsets", (1, 5), (40, 20), num_q_heads=2, num_kv_heads=1, page_size=16, head_dim=64)
    inputs = make_inputs(case, torch.float16)
    num_pages = inputs.k_cache.shape[0]
    page_stride, far_page = 2**22, 2**9  # elements; their product is the first offset that int32 cannot hold
    pool = torch.empty((far_page + num_pages) * page_stride, dtype=inputs.q.dtype)
    strides = (page_stride, *inputs.k_cache.stride()[1:])
    shape = (far_page + num_pages, *inputs.k_cache.shape[1:])
    k_cache, v_cache = pool.as_strided(shape, strides), pool.as_strided(shape, strides, page_stride // 2)
    k_cache[far_page:] = inputs.k_cache
    v_cache[far_page:] = inputs.v_cache
    expected, _ = run(case, inputs)
    far_table = torch.where(inputs.block_table < num_pages, inputs.block_table + far_page, -1)
    out = mixattn.attention(
        inputs.q, k_cache, v_cache, cu_seqlens_q=inputs.cu_seqlens_q,
        seq_lens=inputs.seq_lens, block_table=far_table,
    )  # fmt: skip
    assert torch.equal(out, expected)


@pytest.fixture
def many_torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("many_torch_threads")
def test_attention_between_torch_calls_on_more_threads_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """One OpenMP pool serves torch and the kernel in turn, whatever number of threads each asks for."""
    case = next(c for c in CASES if c.id == "splits-chunk-beside-decodes")
    inputs = make_inputs(case, torch.float32)
    expected, _ = run(case, inputs)
    for num_threads in (1, 3, 2):
        monkeypatch.setattr(env, "num_threads", lambda n=num_threads: n)
        torch.randn(300, 300) @ torch.randn(300, 300)
        assert torch.equal(run(case, inputs)[0], expected)
