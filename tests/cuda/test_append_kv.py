"""``append_kv(backend="cuda")`` on an emulated driver: the bits of the reference, and nothing else written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mixattn
from mixattn import _C
from mixattn.ops.kv_dtypes import QUANTIZED
from mixattn.ops.reference import append_kv_reference
from tests.cuda.emulation import Emulation
from tests.ops.test_append_kv import clone, make_inputs
from tests.ops.test_quantized_kv import NUM_PAGES, PAGE_SIZE, make_rows, make_scale, name_of

DTYPES = [torch.bfloat16, torch.float16]
CACHES = [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8]


def assert_same(ours: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same bits, but for those of NaN."""
    for name in ("k_cache", "v_cache", "k_scale", "v_scale", "q_out"):
        a, b = ours.get(name), expected.get(name)
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            assert a == b
            continue
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)) or (
            a.element_size() > 1 and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
        ), name


def append_both(inputs: dict[str, Any], **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the kernel and the reference have made of copies of the tensors."""
    ours, expected = clone(inputs), clone(inputs)
    ours["q_out"] = mixattn.append_kv(**ours, **options, backend="cuda")
    q_out = append_kv_reference(**expected, **options)
    expected["q_out"] = None if q_out is None else q_out.to(inputs["k"].dtype)
    return ours, expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "interleaved"])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"num_tokens": 1},
        {"num_tokens": 37, "page_size": 7},
        {"head_dim": 8, "page_size": 1},
        {"head_dim": 40, "rotary_dim": 24},
        {"head_dim": 96, "rotary_dim": 2},
        {"head_dim": 128},
        {"head_dim": 192, "rotary_dim": 64},
        {"head_dim": 256},
        {"head_dim": 192, "v_head_dim": 128, "rotary_dim": 64},
        {"head_dim": 24, "v_head_dim": 136, "page_size": 7},
    ],
    ids=str,
)
def test_append_kv_with_rope_stores_the_bits_of_the_reference(
    shape: dict[str, int], interleaved: bool, dtype: torch.dtype, driver: Emulation
) -> None:
    driver.configure(seed=shape.get("head_dim", 1))
    assert_same(*append_both(make_inputs(dtype, **shape), interleaved=interleaved))
    assert driver.counts()["num_switches"] > 0, "something else has run it"


@pytest.mark.parametrize("kind", ["none", "unit", "one", "head", "token"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 40, 128])
@pytest.mark.parametrize("cache_dtype", CACHES, ids=name_of)
def test_append_kv_quantises_to_the_bits_of_the_reference(
    cache_dtype: torch.dtype, head_dim: int, dtype: torch.dtype, kind: str, driver: Emulation
) -> None:
    if kind == "none" and QUANTIZED[cache_dtype].needs_scale:
        kind = "unit"
    k = make_rows(dtype, head_dim)
    rotation = make_inputs(dtype, num_tokens=len(k), head_dim=head_dim, rotary_dim=8)
    width = head_dim // 2 if cache_dtype == torch.uint8 else head_dim
    driver.configure(seed=head_dim)
    inputs = {
        "k": k,
        "v": k.flip(0),
        **{name: torch.full((NUM_PAGES, PAGE_SIZE, 2, width), 0x33, dtype=torch.uint8).view(cache_dtype)
           for name in ("k_cache", "v_cache")},
        "slot_mapping": torch.randperm(NUM_PAGES * PAGE_SIZE, generator=torch.Generator().manual_seed(7))[: len(k)],
        **{name: rotation[name] for name in ("positions", "rope_cos_sin")},
        **{name: make_scale(kind, 2) for name in ("k_scale", "v_scale")},
    }  # fmt: skip
    assert_same(*append_both(inputs))


@pytest.mark.parametrize(("head_dim", "v_head_dim"), [(192, 128), (40, 96)])
@pytest.mark.parametrize("cache_dtype", CACHES, ids=name_of)
def test_append_kv_quantises_heads_of_v_of_another_size_to_the_bits_of_the_reference(
    cache_dtype: torch.dtype, head_dim: int, v_head_dim: int, driver: Emulation
) -> None:
    widths = {"k": head_dim, "v": v_head_dim}
    rows = {name: make_rows(torch.bfloat16, width) for name, width in widths.items()}
    num_rows = len(rows["k"])
    packed = 2 if cache_dtype == torch.uint8 else 1
    inputs = {
        **rows,
        **{f"{name}_cache": torch.full((NUM_PAGES, PAGE_SIZE, 2, width // packed), 0x33, dtype=torch.uint8)
           .view(cache_dtype) for name, width in widths.items()},
        "slot_mapping": torch.randperm(NUM_PAGES * PAGE_SIZE, generator=torch.Generator().manual_seed(7))[:num_rows],
        **{f"{name}_scale": make_scale("token", 2) for name in widths},
    }  # fmt: skip
    assert_same(*append_both(inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_append_kv_without_rope_copies_every_bit(dtype: torch.dtype, driver: Emulation) -> None:
    inputs = make_inputs(dtype)
    for name in ("q", "positions", "rope_cos_sin"):
        inputs.pop(name)
    inputs["v"].view(torch.int16).copy_(torch.arange(inputs["v"].numel()).view_as(inputs["v"]))  # NaN of all kinds
    mixattn.append_kv(**inputs, backend="cuda")
    for name in ("k", "v"):
        stored = inputs[f"{name}_cache"].flatten(0, 1)[inputs["slot_mapping"]]
        assert torch.equal(stored.view(torch.int16), inputs[name].view(torch.int16))


def test_append_kv_of_strided_views_stores_what_contiguous_ones_do(driver: Emulation) -> None:
    plain = make_inputs(torch.bfloat16)
    fused = torch.cat((plain["q"], plain["k"], plain["v"]), dim=1)
    pool = torch.full((plain["k_cache"].shape[0], 2, 2, 16, 64), torch.nan, dtype=torch.bfloat16)
    views = {
        **plain, "q": fused[:, :6], "k": fused[:, 6:8], "v": fused[:, 8:], "k_cache": pool[:, 0].transpose(1, 2),
        "v_cache": pool[:, 1].transpose(1, 2),
    }  # fmt: skip
    views["q_out"] = mixattn.append_kv(**views, backend="cuda")
    plain["q_out"] = mixattn.append_kv(**plain, backend="cpu")
    assert_same(views, plain)


def test_append_kv_rotates_q_in_place(driver: Emulation) -> None:
    """The partner of a neox pair is read from memory: all of a row is read before any of it is written."""
    inputs = make_inputs(torch.bfloat16, head_dim=128)
    expected = mixattn.append_kv(**clone(inputs), backend="cpu")
    names = ("k", "v", "k_cache", "v_cache", "slot_mapping", "q", "positions", "rope_cos_sin")
    arguments = [inputs[name] for name in names]
    for seed in range(6):
        driver.configure(seed=seed)
        q = inputs["q"].clone()
        arguments[5] = q
        torch.ops.mixattn.append_kv(*arguments, None, None, None, None, False, "cuda", q)
        assert expected is not None and torch.equal(q, expected)


def test_append_kv_of_no_rows_writes_nothing(driver: Emulation) -> None:
    inputs = make_inputs(torch.bfloat16, num_tokens=0)
    q = mixattn.append_kv(**inputs, backend="cuda")
    assert q is not None and q.shape == (0, 6, 64) and bool(inputs["k_cache"].isnan().all())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": torch.float32}, "k.dtype float32 has no CUDA kernel; the nearest that has is bfloat16"),
        ({"cache": torch.float16}, "k_cache in another float dtype than k has no CUDA kernel; the nearest .* is k's"),
        ({"misaligned": "k"}, "k at a byte 2 past a multiple of 16 has no CUDA kernel"),
        ({"misaligned": "v_cache"}, "v_cache at a byte 2 past a multiple of 16 has no CUDA kernel"),
        ({"odd_stride": "v"}, "v with a stride 2 past a multiple of 8 has no CUDA kernel"),
    ],
    ids=str,
)
def test_append_kv_that_no_kernel_takes_is_refused_before_anything_is_written(
    changes: dict[str, Any], message: str, driver: Emulation
) -> None:
    inputs = make_inputs(changes.get("dtype", torch.bfloat16))
    for name in ("k_cache", "v_cache"):
        inputs[name] = inputs[name].to(changes.get("cache", inputs[name].dtype))
    if "misaligned" in changes:
        tensor = inputs[changes["misaligned"]]
        inputs[changes["misaligned"]] = tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)
    if "odd_stride" in changes:
        tensor = inputs[changes["odd_stride"]]
        inputs[changes["odd_stride"]] = tensor.new_empty(*tensor.shape[:2], 65)[..., :64].copy_(tensor)
    before = clone(inputs)
    with pytest.raises(NotImplementedError, match=message):
        mixattn.append_kv(**inputs, backend="cuda")
    for name in ("k_cache", "v_cache"):
        assert torch.equal(inputs[name].nan_to_num(7.0), before[name].nan_to_num(7.0))


def test_append_kv_checks_slots_of_cpu_tensors(driver: Emulation) -> None:
    inputs = make_inputs(torch.bfloat16)
    inputs["slot_mapping"][3] = -1
    with pytest.raises(ValueError, match=r"slot_mapping\[3\] must be in \[0, num_pages \* page_size\)"):
        mixattn.append_kv(**inputs, backend="cuda")


def test_append_kv_has_a_kernel_for_each_cache_and_they_are_listed() -> None:
    names = {kernel["name"] for kernel in _C.cuda_instances() if kernel["image"] == "sm80_append_kv"}
    expected = {
        f"mixattn_sm80_append_kv_{x}_{to}" for x in ("bf16", "f16") for to in (x, "int8", "e4m3", "e5m2", "int4")
    }
    assert names == expected
