"""Storing this step's keys and values in their pages, with RoPE on the way; ``mixattn.append_kv``."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from mixattn import _C, env
from mixattn.ops import kv_cache_cuda
from mixattn.ops.backends import choose_backend
from mixattn.ops.checks import (
    Dims,
    Layout,
    check_device,
    check_dtype,
    check_float_dtype,
    check_head_dim,
    check_index_layout,
    check_indices,
    check_last_contiguous,
    check_no_grad,
    check_no_overlap,
    check_same_float_dtype,
    check_tensor,
    layout_of,
    optional_layout,
)
from mixattn.ops.kv_dtypes import (
    Scale,
    ScaleLayout,
    check_caches,
    check_scales,
    kv_dtype_name,
    kv_format,
    scale_sizes,
    split_scale,
)
from mixattn.ops.library import DTYPE_NAMES, is_plain, register_op
from mixattn.ops.reference import append_kv_reference

BACKENDS = ("cpu", "triton", "cuda", "reference")
"""The backends that have ``append_kv``."""


@overload
def append_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    q: Tensor,
    positions: Tensor | None = None,
    rope_cos_sin: Tensor | None = None,
    interleaved: bool = False,
    k_scale: Scale = None,
    v_scale: Scale = None,
    backend: str | None = None,
) -> Tensor: ...


@overload
def append_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    q: None = None,
    positions: Tensor | None = None,
    rope_cos_sin: Tensor | None = None,
    interleaved: bool = False,
    k_scale: Scale = None,
    v_scale: Scale = None,
    backend: str | None = None,
) -> None: ...


def append_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    q: Tensor | None = None,
    positions: Tensor | None = None,
    rope_cos_sin: Tensor | None = None,
    interleaved: bool = False,
    k_scale: Scale = None,
    v_scale: Scale = None,
    backend: str | None = None,
) -> Tensor | None:
    """The rotated q (None without q); every row of k, rotated, and of v is stored in its slot.

    Args:
        k, v: [total_q, num_kv_heads, head_dim] and [total_q, num_kv_heads, v_head_dim] float32, bfloat16 or float16;
            any strides, the last dimension contiguous.
        k_cache, v_cache: [num_pages, page_size, num_kv_heads, head_dim], and with v_head_dim, of a dtype that
            ``attention`` takes; written.
        slot_mapping: [total_q] int64, page_id * page_size + offset of each row; no slot twice.
        q: [total_q, num_q_heads, head_dim] in k's dtype, to be rotated in the same pass; left as it is.
        positions: [total_q] int64, the row of ``rope_cos_sin`` for each row of k and q.
        rope_cos_sin: [max_positions, rotary_dim] float32, rotary_dim / 2 cosines then as many sines (``ops.rope``); the
            leading rotary_dim dimensions of each head are rotated. None stores k as it is.
        interleaved: whether the pairs that turn together are (2i, 2i + 1); else (i, i + rotary_dim / 2).
        k_scale, v_scale: of a quantised cache, as for ``attention``. Stored is x / scale, rounded to nearest and
            saturated. Scales per token and head are written: a row's largest |x| / the largest stored value, or NaN if
            the row is not finite. With other scales int8 and int4 store NaN as 0.
        backend: as for ``attention``.
    Returns:
        [total_q, num_q_heads, head_dim], q rotated and rounded once, or None.
    Raises:
        ValueError: an argument's shape, dtype, device, stride or value is out of bounds. Nothing has been written.
            On a GPU the values in index tensors are not looked at.
        NotImplementedError: valid, but not supported; the message names the nearest that is.
    Source: arXiv:2104.09864, equation 34.
    """
    for name, tensor in (
        ("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache), ("slot_mapping", slot_mapping),
    ):  # fmt: skip
        check_tensor(name, tensor)
    for name, optional in (("q", q), ("positions", positions), ("rope_cos_sin", rope_cos_sin)):
        if optional is not None:
            check_tensor(name, optional)
    q_out = None
    if q is not None:
        q_out = torch.empty_like(q, memory_format=torch.contiguous_format)
    k_scales, k_scale_value = split_scale("k_scale", k_scale)
    v_scales, v_scale_value = split_scale("v_scale", v_scale)
    tensors = (k, v, k_cache, v_cache, slot_mapping, q, positions, rope_cos_sin, k_scales, v_scales)
    run = _append_kv if is_plain(*tensors) else torch.ops.mixattn.append_kv
    run(*tensors, k_scale_value, v_scale_value, interleaved, backend, q_out)
    return q_out


class _Call(NamedTuple):
    """The arguments of ``mixattn::append_kv``, in the order of its schema."""

    k: Tensor
    v: Tensor
    k_cache: Tensor
    v_cache: Tensor
    slot_mapping: Tensor
    q: Tensor | None
    positions: Tensor | None
    rope_cos_sin: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None
    k_scale_value: float | None
    v_scale_value: float | None
    interleaved: bool
    backend: str | None
    q_out: Tensor | None


class _Layout(NamedTuple):
    """What a call is apart from addresses and contents."""

    k: Layout
    v: Layout
    k_cache: Layout
    v_cache: Layout
    slot_mapping: Layout
    q: Layout | None
    positions: Layout | None
    rope_cos_sin: Layout | None
    k_scale: ScaleLayout
    v_scale: ScaleLayout
    q_out: Layout | None


def _layout(call: _Call) -> _Layout:
    return _Layout(
        layout_of(call.k),
        layout_of(call.v),
        layout_of(call.k_cache),
        layout_of(call.v_cache),
        layout_of(call.slot_mapping),
        optional_layout(call.q),
        optional_layout(call.positions),
        optional_layout(call.rope_cos_sin),
        ScaleLayout(optional_layout(call.k_scale), call.k_scale_value),
        ScaleLayout(optional_layout(call.v_scale), call.v_scale_value),
        optional_layout(call.q_out),
    )


def _check(layout: _Layout) -> None:
    """Raises unless shapes, dtypes, devices and strides are as ``append_kv`` asks."""
    k = layout.k
    dims = Dims()
    dims.check("k", k, ("total_q", "num_kv_heads", "head_dim"))
    dims.check("v", layout.v, ("total_q", "num_kv_heads", "v_head_dim"))
    check_caches(dims, layout.k_cache, layout.v_cache, "k", k)
    dims.check("slot_mapping", layout.slot_mapping, ("total_q",))
    check_head_dim("head_dim", dims["head_dim"])
    check_head_dim("v_head_dim", dims["v_head_dim"])
    if dims["num_kv_heads"] < 1:
        raise ValueError(f"num_kv_heads must be >= 1, got {dims['num_kv_heads']}")
    check_float_dtype("k", k)
    check_last_contiguous("k", k)
    check_device("v", layout.v, "k", k)
    check_same_float_dtype("v", layout.v, "k", k)
    check_last_contiguous("v", layout.v)
    check_scales(dims, layout.k_scale, layout.v_scale, layout.k_cache, is_written=True)
    check_no_overlap("k_cache", layout.k_cache)
    check_no_overlap("v_cache", layout.v_cache)
    check_index_layout("slot_mapping", layout.slot_mapping, torch.int64, "k", k)

    positions, rope_cos_sin = layout.positions, layout.rope_cos_sin
    if (positions is None) != (rope_cos_sin is None):
        given, missing = ("rope_cos_sin", "positions") if positions is None else ("positions", "rope_cos_sin")
        raise ValueError(f"{given} is given without {missing}; a rotation needs both")
    if layout.q is not None and rope_cos_sin is None:
        raise ValueError("q is given without positions and rope_cos_sin; append_kv only rotates q")
    if (layout.q is None) != (layout.q_out is None):
        raise ValueError("q and q_out must be given together")
    if positions is not None and rope_cos_sin is not None:
        dims.check("positions", positions, ("total_q",))
        check_index_layout("positions", positions, torch.int64, "k", k)
        dims.check("rope_cos_sin", rope_cos_sin, ("max_positions", "rotary_dim"))
        check_dtype("rope_cos_sin", rope_cos_sin, torch.float32)
        check_device("rope_cos_sin", rope_cos_sin, "k", k)
        check_last_contiguous("rope_cos_sin", rope_cos_sin)
        rotary_dim, head_dim = dims["rotary_dim"], dims["head_dim"]
        if rotary_dim % 2 != 0 or not 2 <= rotary_dim <= head_dim:
            raise ValueError(
                f"rope_cos_sin's rotary_dim must be even and in [2, head_dim] = [2, {head_dim}], got {rotary_dim}"
            )
    for name, query in (("q", layout.q), ("q_out", layout.q_out)):
        if query is not None:
            dims.check(name, query, ("total_q", "num_q_heads", "head_dim"))
            check_device(name, query, "k", k)
            check_same_float_dtype(name, query, "k", k)
            check_last_contiguous(name, query)


@functools.lru_cache(maxsize=256)
def _native_sizes(layout: _Layout) -> Mapping[str, Any]:
    """The arguments of ``_C.append_kv`` that follow from the layout, once ``_check`` has passed it; remembered."""
    _check(layout)
    q, q_out, rope = layout.q, layout.q_out, layout.rope_cos_sin
    return MappingProxyType(
        {
            "dtype": DTYPE_NAMES[layout.k.dtype],
            "kv_dtype": kv_dtype_name(layout.k_cache.dtype),
            "num_tokens": layout.k.shape[0],
            "num_q_heads": 0 if q is None else q.shape[1],
            "num_kv_heads": layout.k.shape[1],
            "head_dim": layout.k.shape[2],
            "v_head_dim": layout.v.shape[2],
            "num_pages": layout.k_cache.shape[0],
            "page_size": layout.k_cache.shape[1],
            "max_positions": 0 if rope is None else rope.shape[0],
            "rotary_dim": 0 if rope is None else rope.shape[1],
            "k_strides": layout.k.strides[:2],
            "v_strides": layout.v.strides[:2],
            "q_strides": (0, 0) if q is None else q.strides[:2],
            "q_out_strides": (0, 0) if q_out is None else q_out.strides[:2],
            "k_cache_strides": layout.k_cache.strides[:3],
            "v_cache_strides": layout.v_cache.strides[:3],
            "k_scale_sizes": scale_sizes(layout.k_scale),
            "v_scale_sizes": scale_sizes(layout.v_scale),
            "rope_stride": 0 if rope is None else rope.strides[0],
        }
    )


def append_kv_sizes(tensors: Mapping[str, Tensor | None], interleaved: bool) -> Mapping[str, Any]:
    """What ``kv_cache_cuda`` asks of a call's layout. Args: tensors: the call's, by name, scales and q_out included."""
    missing: dict[str, Any] = dict.fromkeys(_Call._fields)
    return _native_sizes(_layout(_Call(**{**missing, **tensors, "interleaved": interleaved})))


def _append_kv(*arguments: Any) -> None:
    """``mixattn::append_kv``: checks everything, then runs the backend."""
    call = _Call(*arguments)
    sizes = _native_sizes(_layout(call))
    check_no_grad(call.k, call.v, call.k_cache, call.v_cache, call.q)
    backend = choose_backend(call.k.device.type, call.backend, lambda name: _why_not(name, call, sizes))
    if (reason := _why_not(backend, call, sizes)) is not None:
        raise NotImplementedError(reason)
    if sizes["num_tokens"] == 0:
        return
    if backend == "cpu":
        _append_kv_cpu(call, sizes)
        return
    if call.k.device.type == "cpu":
        check_indices(
            "slot_mapping", call.slot_mapping, "num_pages * page_size", sizes["num_pages"] * sizes["page_size"]
        )
        if call.positions is not None:
            check_indices("positions", call.positions, "max_positions", sizes["max_positions"])
    if backend == "cuda":
        kv_cache_cuda.run(_tensors(call), sizes, call.interleaved)
        return
    inputs = (call.k, call.v, call.k_cache, call.v_cache, call.slot_mapping)
    options: dict[str, Any] = {
        "q": call.q,
        "positions": call.positions,
        "rope_cos_sin": call.rope_cos_sin,
        "interleaved": call.interleaved,
        "k_scale": call.k_scale_value if call.k_scale is None else call.k_scale,
        "v_scale": call.v_scale_value if call.v_scale is None else call.v_scale,
    }
    if backend == "triton":
        from mixattn.triton_kernels import kv_cache as triton_kv_cache

        rotated = triton_kv_cache.append_kv(*inputs, **options, kv_format=kv_format(call.k_cache.dtype))
    else:
        rotated = append_kv_reference(*inputs, **options)
    if call.q_out is not None and rotated is not None:
        call.q_out.copy_(rotated)


def _why_not(backend: str, call: _Call, sizes: Mapping[str, Any]) -> str | None:
    """The reason why this backend does not take the call; None if it does."""
    if backend not in BACKENDS:
        return f"append_kv has no {backend!r} kernel; backends that have it: {', '.join(BACKENDS)}"
    if backend == "cuda":
        try:
            kv_cache_cuda.kernel_for(_tensors(call), sizes, call.interleaved)
        except NotImplementedError as error:
            return str(error)
    return None


def _tensors(call: _Call) -> dict[str, Tensor | None]:
    """The call's tensors, by name."""
    return {name: value for name, value in call._asdict().items() if value is None or isinstance(value, Tensor)}


def _append_kv_cpu(call: _Call, sizes: Mapping[str, Any]) -> None:
    """Slots and positions are checked by the compiled code, before it writes."""
    _C.append_kv(
        **sizes,
        k=call.k.data_ptr(),
        v=call.v.data_ptr(),
        k_cache=call.k_cache.data_ptr(),
        v_cache=call.v_cache.data_ptr(),
        k_scale=0 if call.k_scale is None else call.k_scale.data_ptr(),
        v_scale=0 if call.v_scale is None else call.v_scale.data_ptr(),
        slot_mapping=call.slot_mapping.data_ptr(),
        q=0 if call.q is None else call.q.data_ptr(),
        q_out=0 if call.q_out is None else call.q_out.data_ptr(),
        positions=0 if call.positions is None else call.positions.data_ptr(),
        rope_cos_sin=0 if call.rope_cos_sin is None else call.rope_cos_sin.data_ptr(),
        interleaved=call.interleaved,
        num_threads=env.num_threads(),
        isa=env.cpu_isa(),
    )


def _append_kv_fake(*arguments: Any) -> None:
    _check(_layout(_Call(*arguments)))


register_op(
    "append_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, Tensor? q, "
    "Tensor? positions, Tensor? rope_cos_sin, Tensor(c!)? k_scale, Tensor(d!)? v_scale, float? k_scale_value, "
    "float? v_scale_value, bool interleaved, str? backend, Tensor(e!)? q_out) -> ()",
    _append_kv,
    _append_kv_fake,
)
