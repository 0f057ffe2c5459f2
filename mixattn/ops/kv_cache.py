"""Storing this step's keys and values in their pages, with RoPE on the way; ``mixattn.append_kv``."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from mixattn import _C, env
from mixattn.ops.backends import choose_backend
from mixattn.ops.checks import (
    Dims,
    check_device,
    check_dtype,
    check_float_dtype,
    check_head_dim,
    check_index_tensor,
    check_indices,
    check_last_contiguous,
    check_no_grad,
    check_same_float_dtype,
    check_tensor,
)
from mixattn.ops.library import DTYPE_NAMES, address, cache_strides, register_op, row_strides
from mixattn.ops.reference import append_kv_reference


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
    backend: str | None = None,
) -> Tensor | None:
    """The rotated q (None without q); every row of k, rotated, and of v is stored in its slot.

    Args:
        k, v: [total_q, num_kv_heads, head_dim] float32, bfloat16 or float16; any strides, the last dimension
            contiguous.
        k_cache, v_cache: [num_pages, page_size, num_kv_heads, head_dim] in k's dtype; written.
        slot_mapping: [total_q] int64, page_id * page_size + offset of each row; no slot twice.
        q: [total_q, num_q_heads, head_dim] in k's dtype, to be rotated in the same pass; left as it is.
        positions: [total_q] int64, the row of ``rope_cos_sin`` for each row of k and q.
        rope_cos_sin: [max_positions, rotary_dim] float32, rotary_dim / 2 cosines then as many sines (``ops.rope``); the
            leading rotary_dim dimensions of each head are rotated. None stores k as it is.
        interleaved: whether the pairs that turn together are (2i, 2i + 1); else (i, i + rotary_dim / 2).
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
    q_out = None
    if q is not None:
        check_tensor("q", q)
        q_out = q.new_empty(q.shape)
    torch.ops.mixattn.append_kv(
        k, v, k_cache, v_cache, slot_mapping, q, positions, rope_cos_sin, interleaved, backend, q_out
    )
    return q_out


def _check(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    q: Tensor | None,
    positions: Tensor | None,
    rope_cos_sin: Tensor | None,
    q_out: Tensor | None,
) -> None:
    """Raises unless shapes, dtypes, devices and strides are as ``append_kv`` asks; reads no tensor's values."""
    dims = Dims()
    dims.check("k", k, ("total_q", "num_kv_heads", "head_dim"))
    dims.check("v", v, ("total_q", "num_kv_heads", "head_dim"))
    dims.check("k_cache", k_cache, ("num_pages", "page_size", "num_kv_heads", "head_dim"))
    dims.check("v_cache", v_cache, ("num_pages", "page_size", "num_kv_heads", "head_dim"))
    dims.check("slot_mapping", slot_mapping, ("total_q",))
    check_head_dim(dims["head_dim"])
    if dims["page_size"] < 1:
        raise ValueError(f"page_size must be >= 1, got {dims['page_size']}")
    device = k.device
    check_float_dtype("k", k)
    check_last_contiguous("k", k)
    for name, tensor in (("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        check_device(name, tensor, "k", device)
        check_same_float_dtype(name, tensor, "k", k.dtype)
        check_last_contiguous(name, tensor)
    check_index_tensor("slot_mapping", slot_mapping, torch.int64, "k", device)
    check_no_grad(k, v, k_cache, v_cache, q)

    if (positions is None) != (rope_cos_sin is None):
        given, missing = ("rope_cos_sin", "positions") if positions is None else ("positions", "rope_cos_sin")
        raise ValueError(f"{given} is given without {missing}; a rotation needs both")
    if q is not None and rope_cos_sin is None:
        raise ValueError("q is given without positions and rope_cos_sin; append_kv only rotates q")
    if positions is not None and rope_cos_sin is not None:
        dims.check("positions", positions, ("total_q",))
        check_index_tensor("positions", positions, torch.int64, "k", device)
        dims.check("rope_cos_sin", rope_cos_sin, ("max_positions", "rotary_dim"))
        check_dtype("rope_cos_sin", rope_cos_sin, torch.float32)
        check_device("rope_cos_sin", rope_cos_sin, "k", device)
        check_last_contiguous("rope_cos_sin", rope_cos_sin)
        rotary_dim, head_dim = dims["rotary_dim"], dims["head_dim"]
        if rotary_dim % 2 != 0 or not 2 <= rotary_dim <= head_dim:
            raise ValueError(
                f"rope_cos_sin's rotary_dim must be even and in [2, head_dim] = [2, {head_dim}], got {rotary_dim}"
            )
    for name, query in (("q", q), ("q_out", q_out)):
        if query is not None:
            dims.check(name, query, ("total_q", "num_q_heads", "head_dim"))
            check_device(name, query, "k", device)
            check_same_float_dtype(name, query, "k", k.dtype)
            check_last_contiguous(name, query)


def _append_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    q: Tensor | None,
    positions: Tensor | None,
    rope_cos_sin: Tensor | None,
    interleaved: bool,
    backend: str | None,
    q_out: Tensor | None,
) -> None:
    """``mixattn::append_kv``: checks everything, then runs the backend."""
    _check(k, v, k_cache, v_cache, slot_mapping, q, positions, rope_cos_sin, q_out)
    chosen = choose_backend(k.device.type, backend)
    if k.shape[0] == 0:
        return
    if chosen == "cpu":
        _append_kv_cpu(k, v, k_cache, v_cache, slot_mapping, q, positions, rope_cos_sin, interleaved, q_out)
        return
    options: dict[str, Any] = {"q": q, "positions": positions, "rope_cos_sin": rope_cos_sin, "interleaved": interleaved}
    if chosen == "triton":
        from mixattn.triton_kernels import kv_cache as triton_kv_cache

        rotated = triton_kv_cache.append_kv(k, v, k_cache, v_cache, slot_mapping, **options)
    else:
        if k.device.type == "cpu":
            check_indices("slot_mapping", slot_mapping, "num_pages * page_size", k_cache.shape[0] * k_cache.shape[1])
            if positions is not None and rope_cos_sin is not None:
                check_indices("positions", positions, "max_positions", rope_cos_sin.shape[0])
        rotated = append_kv_reference(k, v, k_cache, v_cache, slot_mapping, **options)
    if q_out is not None:
        q_out.copy_(rotated)


def _append_kv_cpu(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    q: Tensor | None,
    positions: Tensor | None,
    rope_cos_sin: Tensor | None,
    interleaved: bool,
    q_out: Tensor | None,
) -> None:
    num_tokens, num_kv_heads, head_dim = k.shape
    num_pages, page_size = k_cache.shape[:2]
    max_positions, rotary_dim = (0, 0) if rope_cos_sin is None else rope_cos_sin.shape
    _C.append_kv(
        dtype=DTYPE_NAMES[k.dtype],
        k=address(k),
        v=address(v),
        k_cache=address(k_cache),
        v_cache=address(v_cache),
        slot_mapping=address(slot_mapping),
        q=address(q),
        q_out=address(q_out),
        positions=address(positions),
        rope_cos_sin=address(rope_cos_sin),
        num_tokens=num_tokens,
        num_q_heads=0 if q is None else q.shape[1],
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        num_pages=num_pages,
        page_size=page_size,
        max_positions=max_positions,
        rotary_dim=rotary_dim,
        k_strides=row_strides(k),
        v_strides=row_strides(v),
        q_strides=row_strides(q),
        q_out_strides=row_strides(q_out),
        k_cache_strides=cache_strides(k_cache),
        v_cache_strides=cache_strides(v_cache),
        rope_stride=0 if rope_cos_sin is None else rope_cos_sin.stride(0),
        interleaved=interleaved,
        num_threads=env.num_threads(),
        isa=env.cpu_isa(),
    )


def _append_kv_fake(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    q: Tensor | None,
    positions: Tensor | None,
    rope_cos_sin: Tensor | None,
    interleaved: bool,
    backend: str | None,
    q_out: Tensor | None,
) -> None:
    _check(k, v, k_cache, v_cache, slot_mapping, q, positions, rope_cos_sin, q_out)


register_op(
    "append_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, Tensor? q, "
    "Tensor? positions, Tensor? rope_cos_sin, bool interleaved, str? backend, Tensor(c!)? q_out) -> ()",
    _append_kv,
    _append_kv_fake,
)
