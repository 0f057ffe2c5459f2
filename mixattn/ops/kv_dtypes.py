"""What K and V are stored as, and the scales that go with it, at the doors of ``attention`` and ``append_kv``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixattn.ops.checks import (
    Dims,
    Layout,
    check_device,
    check_dtype,
    check_last_contiguous,
    check_no_overlap,
    check_positive_finite,
    check_tensor,
)
from mixattn.ops.library import DTYPE_NAMES


class Quantization(NamedTuple):
    """A dtype of a byte or less: stored value * scale = real value.

    Args:
        name: as ``mixattn._C`` knows it.
        low, high: the stored values that saturation ends at.
        row_max: the stored value that the largest of a row gets where each row has its own scale.
        needs_scale: whether a call must say the scale; else None is 1.
    """

    name: str
    low: float
    high: float
    row_max: float
    needs_scale: bool


QUANTIZED = {
    torch.int8: Quantization("int8", -128.0, 127.0, 127.0, True),
    torch.float8_e4m3fn: Quantization("float8_e4m3fn", -448.0, 448.0, 448.0, False),
    torch.float8_e5m2: Quantization("float8_e5m2", -57344.0, 57344.0, 57344.0, False),
    torch.uint8: Quantization("int4", -8.0, 7.0, 7.0, True),
}
"""By the dtype of the cache. uint8 holds int4: [num_pages, page_size, num_kv_heads, head_dim / 2], the element with the
even index in the low nibble, value = nibble - 8."""

KV_DTYPE_BACKENDS = ("cpu", "triton", "reference")
"""The backends that keep K and V in any other dtype than q, k and v come in; cuda, in those of ``QUANTIZED``."""

MIN_ROW_SCALE = 2.0**-126
"""The least scale of a row, the smallest normal float32: a row of zeros must have one to divide by."""

Scale = float | Tensor | None
"""Of all elements, of a kv head ([num_kv_heads] float32), or of a token's kv head ([num_pages, page_size, num_kv_heads]
float32, beside the pages)."""


class KvCache(NamedTuple):
    """One layer's pages.

    Args:
        k_cache, v_cache: [num_pages, page_size, num_kv_heads, head_dim], and with v_head_dim.
        k_scale, v_scale: [num_pages, page_size, num_kv_heads] float32; None where K and V are not quantised.
    """

    k_cache: Tensor
    v_cache: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None


class ScaleLayout(NamedTuple):
    """A scale apart from its contents: a tensor's layout, or the one value, or neither."""

    tensor: Layout | None
    value: float | None


class ScaleSizes(NamedTuple):
    """What ``mixattn._C`` must know of a scale besides its address; of a value only that."""

    value: float
    is_per_token: bool
    strides: tuple[int, int, int]


def kv_dtype_name(dtype: torch.dtype) -> str:
    """The name that ``mixattn._C`` knows the dtype of a cache by."""
    return QUANTIZED[dtype].name if dtype in QUANTIZED else DTYPE_NAMES[dtype]


def v_head_dim(v_cache: Tensor | Layout) -> int:
    """The elements of a head of V that a cache holds."""
    return v_cache.shape[3] * (2 if v_cache.dtype == torch.uint8 else 1)


def kv_format(dtype: torch.dtype) -> str | None:
    """What a cache of this dtype is quantised to, None for a float dtype."""
    return QUANTIZED[dtype].name if dtype in QUANTIZED else None


def split_scale(argument: str, scale: Scale) -> tuple[Tensor | None, float | None]:
    """A scale as an op's schema holds it: as a tensor or as a value."""
    if scale is None or isinstance(scale, (float, int)):
        return None, scale
    check_tensor(argument, scale)
    return scale, None


def check_caches(dims: Dims, k_cache: Layout, v_cache: Layout, of: str, other: Layout) -> None:
    """Raises unless the caches are pages of heads of dims' head_dim, on the device of argument ``of``.

    ``dims`` has v_head_dim afterwards.

    Raises:
        ValueError: a shape, a device or a stride.
        NotImplementedError: a dtype.
    """
    for name, cache, width in (("k_cache", k_cache, "head_dim"), ("v_cache", v_cache, "v_head_dim")):
        is_packed = cache.dtype == torch.uint8
        dims.check(name, cache, ("num_pages", "page_size", "num_kv_heads", f"{width} / 2" if is_packed else width))
        if not is_packed:
            continue
        dims.set_default(name, width, 2 * cache.shape[3])
        if 2 * cache.shape[3] != dims[width]:
            raise ValueError(
                f"{name} holds int4, its last dimension must be {width} / 2 = {dims[width] / 2:g}, got {cache.shape[3]}"
            )
    if dims["page_size"] < 1:
        raise ValueError(f"page_size must be >= 1, got {dims['page_size']}")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_device(name, cache, of, other)
        if cache.dtype not in DTYPE_NAMES and cache.dtype not in QUANTIZED:
            raise NotImplementedError(
                f"{name} is {cache.dtype}; supported are float32, bfloat16, float16, int8, float8_e4m3fn, float8_e5m2 "
                "and uint8 holding int4 (the nearest: cast to float32)"
            )
        check_last_contiguous(name, cache)
    if v_cache.dtype != k_cache.dtype:
        raise NotImplementedError(
            f"v_cache is {v_cache.dtype} and k_cache is {k_cache.dtype}; supported is one dtype for both: cast one"
        )


def check_kv_dtype_backend(kv_dtype: torch.dtype, of: str, dtype: torch.dtype, backend: str) -> None:
    """Raises NotImplementedError unless the backend takes caches of this dtype beside an argument ``of`` of that."""
    if kv_dtype == dtype or backend in KV_DTYPE_BACKENDS or (backend == "cuda" and kv_dtype in QUANTIZED):
        return
    raise NotImplementedError(
        f"k_cache is {kv_dtype} and {of} is {dtype}: backend {backend!r} supports caches in the dtype of {of} and "
        f"quantised ones; backends that have the others: {', '.join(KV_DTYPE_BACKENDS)}"
    )


def check_scales(
    dims: Dims, k_scale: ScaleLayout, v_scale: ScaleLayout, k_cache: Layout, *, is_written: bool = False
) -> None:
    """Raises unless the scales fit caches that ``check_caches`` has passed.

    Args:
        is_written: whether the call writes the scales that tokens have of their own.
    Raises:
        ValueError: a shape, dtype, device, stride or value; or none where the dtype needs one.
        NotImplementedError: a scale for caches that are not quantised.
    """
    quantization = QUANTIZED.get(k_cache.dtype)
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale.tensor is None and scale.value is None:
            if quantization is not None and quantization.needs_scale:
                raise ValueError(
                    f"{name} must be a float, [num_kv_heads] or [num_pages, page_size, num_kv_heads] with k_cache of "
                    f"{quantization.name}, got None"
                )
            continue
        if quantization is None:
            raise NotImplementedError(
                f"{name} is given and k_cache is {k_cache.dtype}; scales are supported with int8, float8_e4m3fn, "
                "float8_e5m2 and int4, the nearest here is None"
            )
        if scale.value is not None:
            check_positive_finite(name, scale.value)
        if scale.tensor is not None:
            is_per_token = len(scale.tensor.shape) != 1
            pages = ("num_pages", "page_size") if is_per_token else ()
            dims.check(name, scale.tensor, (*pages, "num_kv_heads"))
            check_dtype(name, scale.tensor, torch.float32)
            check_device(name, scale.tensor, "k_cache", k_cache)
            if is_written and is_per_token:
                check_no_overlap(name, scale.tensor)


def scale_sizes(scale: ScaleLayout) -> ScaleSizes:
    """The sizes of a scale that ``check_scales`` has passed."""
    if scale.tensor is None:
        return ScaleSizes(1.0 if scale.value is None else scale.value, False, (0, 0, 0))
    strides = scale.tensor.strides
    if len(strides) == 1:
        return ScaleSizes(1.0, False, (0, 0, strides[0]))
    return ScaleSizes(1.0, True, (strides[0], strides[1], strides[2]))
