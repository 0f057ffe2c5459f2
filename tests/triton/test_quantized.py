"""K and V of other dtypes than q's in the Triton kernels: every code, every kind of scale, and what is not finite."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mixattn.ops.kv_dtypes import QUANTIZED, kv_format
from mixattn.ops.reference import append_kv_reference, dequantize_reference
from mixattn.triton_kernels import _quantized
from mixattn.triton_kernels.kv_cache import append_kv
from tests.cases import (
    CASES,
    QUANTIZED_FORMATS,
    SCORE_CASES,
    V_HEAD_DIM_CASES,
    AttentionCase,
    AttentionInputs,
    KvFormat,
    assert_attention_close,
    make_inputs,
)
from tests.ops.test_quantized_kv import all_codes, make_rows, make_scale, name_of
from tests.triton import ptx
from tests.triton.attention_run import AttentionRun, prepare
from tests.triton.test_kv_cache import table

DTYPES = list(QUANTIZED)
Q_DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NUM_PAGES, PAGE_SIZE = 3, 16
SHAPES = (
    "q1-kv100-page16-gqa3", "q1-kv6,7,8-page7-gqa2", "q40-kv100-page1-gqa8", "chunk-beside-decodes", "head-dim-96",
    "q-without-keys", "splits-chunk-beside-decodes", "window-chunk-beside-decodes", "non-causal",
    "soft-cap-window-splits", "alibi-soft-cap-window-splits", "sinks-chunk-beside-decodes",
    "tree-keys-that-no-row-sees", *(case.id for case in V_HEAD_DIM_CASES),
)  # fmt: skip


def check(run: AttentionRun, inputs: AttentionInputs) -> None:
    assert_attention_close(run.case, inputs, run.out.cpu(), run.lse.cpu())
    assert not run.tickets.any()


@pytest.mark.parametrize(
    ("assembly", "dtype"),
    [(_quantized.INT8_ASM, torch.int8), (_quantized.E4M3_ASM, torch.float8_e4m3fn), (_quantized.INT4_ASM, torch.uint8)],
    ids=["int8", "float8_e4m3fn", "int4"],
)
def test_assembly_of_every_code_gives_its_float16(assembly: Any, dtype: torch.dtype) -> None:
    codes = np.arange(256, dtype=np.uint8)
    num_outputs = 4 if dtype == torch.uint8 else 2
    words = ptx.run(assembly.value, num_outputs, [codes.view(np.uint32)])
    values = torch.from_numpy(np.stack([ptx.halves(word) for word in words], axis=1)).float()  # [64, outputs, 2]
    if dtype == torch.uint8:
        low, high = values.flatten(1).chunk(2, dim=1)
        values = torch.stack((low.flatten(), high.flatten()), dim=-1)
    expected = dequantize_reference(torch.from_numpy(codes).view(dtype)[:, None], None)
    torch.testing.assert_close(values.flatten(), expected.flatten(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(("num_rows", "q_dtype"), [(1, torch.float16), (20, torch.bfloat16), (1, torch.float32)])
def test_attention_over_one_key_returns_v_of_every_code(
    dtype: torch.dtype, num_rows: int, q_dtype: torch.dtype, device: torch.device
) -> None:
    head_dim = 32
    v_cache = all_codes(dtype, head_dim)
    num_kv_heads = v_cache.shape[2]
    case = AttentionCase("codes", (num_rows,), (1,), num_kv_heads, num_kv_heads, head_dim, page_size=1, causal=False)
    inputs = make_inputs(case, q_dtype, kv=KvFormat(dtype, "one"))
    page = int(inputs.block_table[0, 0])
    inputs.v_cache[page] = v_cache[0]
    run = prepare(case, q_dtype, device, inputs=inputs)
    run.inputs = AttentionInputs(
        **{**vars(run.inputs), "k_cache": torch.zeros_like(run.inputs.k_cache), "v_scale": 0.5}
    )
    run.launch()
    expected = dequantize_reference(v_cache, 0.5).view(1, num_kv_heads, head_dim).expand(num_rows, -1, -1)
    is_finite = expected.isfinite()
    out = run.out.cpu().float()
    assert torch.equal(out.isfinite(), is_finite) and bool(is_finite.all()) != dtype.is_floating_point
    assert torch.equal(out[is_finite], expected.to(q_dtype).float()[is_finite])


@pytest.mark.parametrize(
    ("case_id", "kv", "q_dtype"),
    [
        (case_id, QUANTIZED_FORMATS[(i + j) % len(QUANTIZED_FORMATS)], Q_DTYPES[i % 3])
        for i, case_id in enumerate(SHAPES)
        for j in (0, 4, 7)
    ],
    ids=lambda value: value.id if isinstance(value, KvFormat) else str(value).removeprefix("torch."),
)
def test_quantized_attention_of_named_case_is_within_twice_eager(
    case_id: str, kv: KvFormat, q_dtype: torch.dtype, device: torch.device
) -> None:
    case = next(case for case in CASES + SCORE_CASES + V_HEAD_DIM_CASES if case.id == case_id)
    inputs = make_inputs(case, q_dtype, kv=kv)
    run = prepare(case, q_dtype, device, inputs=inputs)
    run.launch()
    check(run, inputs)


@pytest.mark.parametrize(
    ("q_dtype", "kv_dtype"), [*itertools.permutations(Q_DTYPES, 2)], ids=lambda d: str(d).removeprefix("torch.")
)
def test_attention_over_float_caches_of_another_dtype_is_within_twice_eager(
    q_dtype: torch.dtype, kv_dtype: torch.dtype, device: torch.device
) -> None:
    case = AttentionCase("mixed-dtypes", (1, 20), (70, 60), num_workers=8)
    inputs = make_inputs(case, q_dtype, kv=KvFormat(kv_dtype))
    run = prepare(case, q_dtype, device, inputs=inputs)
    run.launch()
    check(run, inputs)


@pytest.mark.parametrize("kv", QUANTIZED_FORMATS[:4], ids=lambda kv: kv.id)
@pytest.mark.parametrize("q_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_quantized_attention_of_values_far_from_1_keeps_its_bits(
    kv: KvFormat, q_dtype: torch.dtype, device: torch.device
) -> None:
    """The products are of float16: neither small scales of V nor queries past its range may get lost in it."""
    case = AttentionCase("far-from-1", (1, 9), (90, 40), softmax_scale=1.0, num_workers=4)
    inputs = make_inputs(case, q_dtype, kv=kv)
    small = 2.0**-14 if q_dtype == torch.float16 else 2.0**-40
    large = 1.0 if q_dtype == torch.float16 else 2.0**60
    inputs = AttentionInputs(
        **{
            **vars(inputs), "q": inputs.q * large, "k_scale": inputs.k_scale / large, "v_scale": inputs.v_scale * small,
        }
    )  # fmt: skip
    run = prepare(case, q_dtype, device, inputs=inputs)
    run.launch()
    check(run, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("q_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_attention_over_a_row_that_was_not_finite_is_nan_for_every_row_that_sees_it(
    dtype: torch.dtype, poison: float, q_dtype: torch.dtype, device: torch.device
) -> None:
    case = AttentionCase("not-finite", (1, 1), (12, 13), 1, 1, 8)
    k, v = torch.ones(20, 1, 8, dtype=q_dtype), torch.ones(20, 1, 8, dtype=q_dtype)
    v[12, 0, 5] = poison
    width = 4 if dtype == torch.uint8 else 8
    caches = [torch.zeros(2, 16, 1, width, dtype=dtype) for _ in "kv"]
    scales = {"k_scale": torch.zeros(2, 16, 1, device=device), "v_scale": torch.zeros(2, 16, 1, device=device)}
    caches = [cache.to(device) for cache in caches]
    append_kv(
        k.to(device), v.to(device), *caches, torch.arange(20, device=device), **scales, kv_format=kv_format(dtype)
    )
    inputs = make_inputs(case, q_dtype, kv=KvFormat(dtype, "token"))
    inputs = AttentionInputs(
        **{
            **vars(inputs), "k_cache": caches[0], "v_cache": caches[1], **scales,
            "block_table": torch.tensor([[0, 1]] * 2, dtype=torch.int32),
        }
    )  # fmt: skip
    run = prepare(case, q_dtype, device, inputs=inputs)
    run.launch()
    assert bool(run.out[0].isfinite().all()) and bool(run.out[1].isnan().all())


@pytest.mark.parametrize("kind", ["none", "unit", "one", "head", "token"])
@pytest.mark.parametrize(
    ("x_dtype", "head_dim", "v_head_dim", "interleaved"),
    [
        (torch.float32, 8, 8, False), (torch.bfloat16, 40, 16, True), (torch.float16, 128, 128, False),
        (torch.float32, 24, 136, False),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_append_kv_stores_the_bits_of_the_reference(
    dtype: torch.dtype,
    x_dtype: torch.dtype,
    head_dim: int,
    v_head_dim: int,
    interleaved: bool,
    kind: str,
    device: torch.device,
) -> None:
    if kind == "none" and QUANTIZED[dtype].needs_scale:
        kind = "unit"
    k, v = make_rows(x_dtype, head_dim), make_rows(x_dtype, v_head_dim).flip(0)
    widths = [size // 2 if dtype == torch.uint8 else size for size in (head_dim, v_head_dim)]
    tensors = {
        "k": k, "v": v, "slot_mapping": torch.randperm(48, generator=torch.Generator().manual_seed(7))[: len(k)],
        "positions": torch.randint(0, 50, (len(k),), generator=torch.Generator().manual_seed(6)),
        "rope_cos_sin": table(8),
    }  # fmt: skip
    results = []
    for append, place in ((append_kv, device), (append_kv_reference, torch.device("cpu"))):
        caches = [torch.full((NUM_PAGES, PAGE_SIZE, 2, size), 0x33, dtype=torch.uint8).view(dtype) for size in widths]
        cache_tensors = dict(zip(("k_cache", "v_cache"), (cache.to(place) for cache in caches), strict=True))
        scales = {"k_scale": make_scale(kind, 2), "v_scale": make_scale(kind, 2)}
        scales = {name: scale.to(place) if isinstance(scale, Tensor) else scale for name, scale in scales.items()}
        on_device = {name: tensor.to(place) for name, tensor in tensors.items()}
        if append is append_kv:
            scales["kv_format"] = kv_format(dtype)
        append(**on_device, **cache_tensors, **scales, interleaved=interleaved)
        stored = [*cache_tensors.values(), *(scale for scale in scales.values() if isinstance(scale, Tensor))]
        results.append([tensor.cpu() for tensor in stored])
    for ours, expected in zip(*results, strict=True):
        if ours.dtype == torch.float32:
            assert torch.equal(ours.nan_to_num(9.0), expected.nan_to_num(9.0))
        else:
            differing = (ours.view(torch.uint8) != expected.view(torch.uint8)).nonzero()
            assert not len(differing), f"{len(differing)} bytes differ, first at {differing[0].tolist()}"


@pytest.mark.parametrize(("x_dtype", "cache_dtype"), [*itertools.permutations(Q_DTYPES, 2)], ids=str)
def test_append_kv_into_another_float_dtype_rounds_like_the_reference(
    x_dtype: torch.dtype, cache_dtype: torch.dtype, device: torch.device
) -> None:
    k = torch.randn(5, 2, 16, generator=torch.Generator().manual_seed(1)).to(x_dtype)
    slots = torch.tensor([3, 17, 0, 40, 9])
    results = []
    for append, place in ((append_kv, device), (append_kv_reference, torch.device("cpu"))):
        caches = [torch.zeros(NUM_PAGES, PAGE_SIZE, 2, 16, dtype=cache_dtype, device=place) for _ in "kv"]
        append(k.to(place), k.to(place), *caches, slots.to(place))
        results.append([cache.cpu() for cache in caches])
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
