"""The CUDA attention kernel over K and V in int8, float8 and int4, emulated."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

import mixattn
from mixattn.ops.kv_dtypes import QUANTIZED
from mixattn.ops.reference import dequantize_reference
from tests.cases import (
    CASES,
    QUANTIZED_FORMATS,
    SCORE_CASES,
    V_HEAD_DIM_CASES,
    AttentionCase,
    AttentionInputs,
    KvFormat,
    make_inputs,
)
from tests.cuda.attention_run import prepare
from tests.cuda.emulation import Emulation
from tests.cuda.test_mixed_attention import (
    ALL_KINDS_CASES,
    DTYPES,
    HEAD_DIMS,
    HEADS,
    SEEDS,
    SPLIT_CASE,
    check,
    far_apart,
)

QUANTISED_CASES = [
    case
    for case in [*CASES, *SCORE_CASES, *V_HEAD_DIM_CASES, *ALL_KINDS_CASES, SPLIT_CASE]
    if (case.head_dim, case.value_dim) in HEADS
]
DTYPE_FORMATS = QUANTIZED_FORMATS[:4]
"""One of each dtype."""
RUNS = [
    pytest.param(
        case, DTYPES[(i + j) % 2], QUANTIZED_FORMATS[(5 * i + j) % len(QUANTIZED_FORMATS)],
        80 if j % 2 == 0 else 90, marks=[pytest.mark.slow] * (j > 0),
        id=f"{case.id}-{QUANTIZED_FORMATS[(5 * i + j) % len(QUANTIZED_FORMATS)].id}",
    )
    for i, case in enumerate(QUANTISED_CASES)
    for j in range(4)
]  # fmt: skip
"""Every case in one format, and in one of each dtype under ``slow``."""


@pytest.mark.parametrize(("case", "dtype", "kv", "capability"), RUNS)
def test_quantised_attention_named_case_is_within_twice_eager_on_every_schedule(
    case: AttentionCase, dtype: torch.dtype, kv: KvFormat, capability: int, emulation: Emulation
) -> None:
    inputs = make_inputs(case, dtype, kv=kv)
    run = prepare(case, dtype, inputs=inputs, capability=capability)
    results = []
    for seed in SEEDS:
        run.launch(emulation, seed=seed)
        check(run, inputs)
        results.append((run.out.clone(), run.lse.clone()))
    assert all(torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1]) for out, lse in results)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("kv_dtype", QUANTIZED, ids=lambda dtype: QUANTIZED[dtype].name)
def test_every_code_comes_out_as_what_it_stands_for(kv_dtype: torch.dtype, head_dim: int, driver: Emulation) -> None:
    """A row that sees one key returns its value, exactly: float16 holds all of them, NaN and infinity too."""
    num_bytes = head_dim // 2 if kv_dtype == torch.uint8 else head_dim
    num_seqs = -(-256 // num_bytes)
    codes = torch.arange(num_seqs * num_bytes).to(torch.uint8).view(num_seqs, 1, 1, num_bytes).view(kv_dtype)
    lengths = torch.ones(num_seqs, dtype=torch.int32)
    out = mixattn.attention(
        torch.zeros(num_seqs, 1, head_dim, dtype=torch.float16), torch.zeros_like(codes), codes,
        cu_seqlens_q=torch.arange(num_seqs + 1, dtype=torch.int32), seq_lens=lengths,
        block_table=torch.arange(num_seqs, dtype=torch.int32)[:, None], k_scale=1.0, v_scale=1.0, backend="cuda",
    )  # fmt: skip
    expected = dequantize_reference(codes, 1.0, compute_dtype=torch.float64)
    assert torch.equal(out.view(-1).double().nan_to_num(nan=1e9), expected.view(-1).nan_to_num(nan=1e9))
    if kv_dtype == torch.float8_e4m3fn:
        assert int(out.view(-1)[:256].isnan().sum()) == 2


@pytest.mark.parametrize(
    ("dtype", "magnitude_log2"), [(torch.bfloat16, -40), (torch.bfloat16, 20), (torch.float16, -12)]
)
def test_quantised_attention_scales_outside_of_float16_lose_nothing(
    dtype: torch.dtype, magnitude_log2: int, emulation: Emulation
) -> None:
    """Scales per token that differ from each other, about a magnitude at which weights times them would not fit."""
    inputs = make_inputs(SPLIT_CASE, dtype, kv=KvFormat(torch.int8, "token"))
    assert isinstance(inputs.v_scale, Tensor)
    spread = torch.randint(-4, 5, inputs.v_scale.shape, generator=torch.Generator().manual_seed(0))
    inputs = dataclasses.replace(inputs, v_scale=inputs.v_scale * 2.0 ** (spread + magnitude_log2))
    run = prepare(SPLIT_CASE, dtype, inputs=inputs)
    run.launch(emulation, seed=1)
    check(run, inputs)


@pytest.mark.parametrize("scale", [2.0**-30, 1.0, 2.0**30])
def test_quantised_attention_queries_of_any_magnitude_fit_float16(scale: float, emulation: Emulation) -> None:
    case = dataclasses.replace(SPLIT_CASE, softmax_scale=64**-0.5 / scale)
    inputs = make_inputs(case, torch.bfloat16, kv=KvFormat(torch.float8_e4m3fn, "token"))
    run = prepare(case, torch.bfloat16, inputs=inputs)
    run.launch(emulation, seed=2)
    check(run, inputs)


def test_quantised_attention_row_over_a_nan_scale_is_nan_and_no_other(emulation: Emulation) -> None:
    """As of a row that append_kv has found NaN in."""
    case = AttentionCase("nan", (1, 1), (40, 70), num_q_heads=2, num_kv_heads=1)
    inputs = make_inputs(case, torch.bfloat16, kv=KvFormat(torch.int8, "token"))
    for name in ("k_scale", "v_scale"):
        scale = getattr(inputs, name).clone()
        scale[int(inputs.block_table[1, 0]), 3] = torch.nan
        run = prepare(case, torch.bfloat16, inputs=dataclasses.replace(inputs, **{name: scale}))
        run.launch(emulation, seed=1)
        assert run.out[1].isnan().all(), name
        assert not run.out[0].isnan().any(), name


@pytest.mark.parametrize("kv", DTYPE_FORMATS, ids=lambda kv: kv.id)
def test_quantised_attention_any_strides_give_the_same_bits(kv: KvFormat, emulation: Emulation) -> None:
    inputs = make_inputs(SPLIT_CASE, torch.float16, kv=kv)
    run = prepare(SPLIT_CASE, torch.float16, inputs=inputs)
    run.launch(emulation, seed=0)
    expected = run.out.clone(), run.lse.clone()

    def strided_bytes(tensor: Tensor) -> Tensor:
        shape = [tensor.shape[i] for i in (2, 1, 0)]
        wide = torch.full((*shape, 2 * tensor.shape[3]), 0x7F, dtype=torch.uint8)
        view = wide.permute(2, 1, 0, 3)[..., : tensor.shape[3]]
        return view.copy_(tensor.view(torch.uint8)).view(tensor.dtype)

    changed = {name: strided_bytes(getattr(inputs, name)) for name in ("k_cache", "v_cache")}
    for name in ("k_scale", "v_scale"):
        scale = getattr(inputs, name)
        if isinstance(scale, Tensor):
            changed[name] = scale.movedim(0, -1).contiguous().movedim(-1, 0)
    run.inputs = dataclasses.replace(inputs, **changed)
    run.launch(emulation, seed=0)
    assert torch.equal(run.out, expected[0]) and torch.equal(run.lse, expected[1])


def test_quantised_attention_page_offsets_past_2_31_do_not_wrap(emulation: Emulation) -> None:
    case = AttentionCase("far-pages", (1, 30), (20, 40), num_q_heads=2, num_kv_heads=1)
    inputs = make_inputs(case, torch.bfloat16, kv=KvFormat(torch.int8, "one"))
    run = prepare(case, torch.bfloat16, inputs=inputs)
    far = {name: far_apart(getattr(inputs, name), 2**30) for name in ("k_cache", "v_cache")}
    run.inputs = dataclasses.replace(inputs, **far)
    run.launch(emulation, seed=0)
    check(run, inputs)


def refused_cases() -> list[tuple[AttentionCase, AttentionInputs, str]]:
    narrow_heads = dataclasses.replace(SPLIT_CASE, head_dim=32)
    kv = KvFormat(torch.uint8, "one")
    inputs = make_inputs(SPLIT_CASE, torch.bfloat16, kv=kv)
    narrow = torch.zeros(*inputs.k_cache.shape[:3], 40, dtype=torch.uint8)[..., :32]
    return [
        (narrow_heads, make_inputs(narrow_heads, torch.bfloat16, kv=kv), "head_dim 32 has no .* nearest .* is 64$"),
        (SPLIT_CASE, dataclasses.replace(inputs, k_cache=narrow), "k_cache .* stride .* nearest .* multiple of 16"),
        (SPLIT_CASE, make_inputs(SPLIT_CASE, torch.float32, kv=kv), "q.dtype float32 has no CUDA kernel"),
        (
            SPLIT_CASE,
            make_inputs(SPLIT_CASE, torch.bfloat16, kv=KvFormat(torch.float16)),
            "k_cache in another float dtype than q",
        ),
    ]


@pytest.mark.parametrize("index", range(4))
def test_quantised_attention_that_has_no_kernel_names_the_nearest(index: int, emulation: Emulation) -> None:
    case, inputs, message = refused_cases()[index]
    with pytest.raises(NotImplementedError, match=message):
        prepare(case, inputs.q.dtype, inputs=inputs).launch(emulation, seed=0)
