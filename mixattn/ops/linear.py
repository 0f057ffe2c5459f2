"""Linear maps over weights that stay as a checkpoint stores them; ``mixattn::linear``, ``mixattn::gated_linear``.

A matrix is packed once, when it is loaded, into panels that the CPU kernel reads from front to back
(csrc/cpu/linear-inl.h). No weight is rounded: a packed matrix has exactly the stored values. Arithmetic is in float32,
unless a quantised matrix asks for inputs that are rounded to int8 (csrc/cpu/linear_int8-inl.h).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixattn import _C, env
from mixattn.ops.checks import (
    Dims,
    Layout,
    check_device,
    check_dtype,
    check_index_layout,
    check_last_contiguous,
    check_no_grad,
    check_tensor,
    layout_of,
)
from mixattn.ops.elementwise import silu_mul
from mixattn.ops.library import is_plain, register_op

PLAIN_FORMS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTISED_FORMS = ("q8_0", "q4_0", "q4_1")
"""GGUF's, by their names there in lower case."""
WEIGHT_FORMS = (*PLAIN_FORMS, *QUANTISED_FORMS)
"""How a matrix may be stored."""
QUANTISED_DEPTH_MULTIPLE = 32
"""Elements of a row that share a scale in a quantised form."""
_PANEL_ALIGNMENT = 64
"""A cache line: no vector of a panel crosses one."""


@dataclass(frozen=True)
class PackedWeight:
    """A matrix [num_cols, depth] in panels; column n of y is row n of it, as in torch's ``Linear``.

    Args:
        panels: [num_panels * panel_bytes] uint8, for the kernels of ``isa`` only.
        form: one of ``WEIGHT_FORMS``.
        isa: of the kernels that read it.
        rounds_x: whether ``linear`` first rounds inputs to int8, each 32 of a row with a scale of their own.
    """

    panels: Tensor
    form: str
    num_cols: int
    depth: int
    isa: str
    rounds_x: bool


def row_bytes(form: str, depth: int) -> int:
    """Bytes of a row of ``depth`` elements as a checkpoint stores it.

    Raises:
        ValueError: there is no such form.
    """
    return _C.weight_row_bytes(form, depth)


def pack_weight(rows: Tensor, form: str, depth: int, *, rounds_x: bool = False, isa: str | None = None) -> PackedWeight:
    """The matrix whose rows, as a checkpoint stores them, are ``rows``.

    Args:
        rows: [num_cols, depth] of the form's dtype, or [num_cols, row_bytes] uint8 of a quantised form; contiguous, on
            the CPU; copied.
        form: one of ``WEIGHT_FORMS``.
        depth: elements of a row.
        rounds_x: round the inputs to int8, in the quantised forms.
        isa: the kernels to pack for; None is what ``linear`` runs here.
    Raises:
        ValueError: the form is unknown or cannot round inputs, or the rows' shape, dtype or layout is not what it asks.
    """
    check_tensor("rows", rows)
    if form not in WEIGHT_FORMS:
        raise ValueError(f"form must be one of {', '.join(WEIGHT_FORMS)}, got {form!r}")
    is_quantised = form in QUANTISED_FORMS
    if rounds_x and not is_quantised:
        raise ValueError(f"rounds_x must be False for {form}; forms with rounded inputs: {', '.join(QUANTISED_FORMS)}")
    if is_quantised and (depth < 1 or depth % QUANTISED_DEPTH_MULTIPLE):
        raise ValueError(f"depth must be a positive multiple of {QUANTISED_DEPTH_MULTIPLE} in {form}, got {depth}")
    check_dtype("rows", layout_of(rows), torch.uint8 if is_quantised else PLAIN_FORMS[form])
    width = row_bytes(form, depth) if is_quantised else depth
    if rows.ndim != 2 or rows.shape[1] != width or 0 in rows.shape:
        raise ValueError(f"rows must be [num_cols >= 1, {width}] for {form} of depth {depth}, got {list(rows.shape)}")
    if not rows.is_contiguous() or rows.device.type != "cpu":
        raise ValueError(f"rows must be contiguous and on the CPU, got strides {rows.stride()} on {rows.device}")
    chosen = isa or env.cpu_isa() or _C.cpu_info()["isa"]
    num_panels = -(-rows.shape[0] // _C.panel_cols(chosen))
    num_bytes = num_panels * _C.weight_panel_bytes(form, depth, chosen)
    memory = torch.empty(num_bytes + _PANEL_ALIGNMENT, dtype=torch.uint8)
    begin = -memory.data_ptr() % _PANEL_ALIGNMENT
    panels = memory[begin : begin + num_bytes]
    _C.pack_weight(
        form=form,
        rows=rows.data_ptr(),
        num_rows=rows.shape[0],
        depth=depth,
        panels=panels.data_ptr(),
        num_threads=env.num_threads(),
        isa=chosen,
    )
    return PackedWeight(panels, form, rows.shape[0], depth, chosen, rounds_x)


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x W^T + bias + residual.

    Args:
        x: [num_rows, depth] float32 on the CPU; any strides, the last dimension contiguous.
        weight: the matrix.
        bias: [num_cols] float32, contiguous.
        residual: [num_rows, num_cols] float32, the last dimension contiguous.
    Returns:
        [num_rows, num_cols] float32.
    Raises:
        ValueError: an argument's shape, dtype, device or stride is out of bounds.
    """
    check_tensor("x", x)
    for name, optional in (("bias", bias), ("residual", residual)):
        if optional is not None:
            check_tensor(name, optional)
    run = _linear if is_plain(x, weight.panels, bias, residual) else torch.ops.mixattn.linear
    y: Tensor = run(x, weight.panels, weight.form, weight.num_cols, weight.isa, weight.rounds_x, bias, residual)
    return y


def gated_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """``silu_mul`` of x W^T + bias, without writing that: the gates are multiplied while a cache has them.

    Args:
        x, bias: as for ``linear``.
        weight: the matrix, whose first half makes gates and whose second half what they are multiplied with.
    Returns:
        [num_rows, num_cols / 2] float32.
    Raises:
        ValueError: as for ``linear``, or num_cols is odd.
    Source: SwiGLU, arXiv:2002.05202.
    """
    if weight.num_cols % 2:
        raise ValueError(f"weight must have as many gates as columns that they are for, got {weight.num_cols} in all")
    check_tensor("x", x)
    if bias is not None:
        check_tensor("bias", bias)
    run = _gated_linear if is_plain(x, weight.panels, bias) else torch.ops.mixattn.gated_linear
    y: Tensor = run(x, weight.panels, weight.form, weight.num_cols, weight.isa, weight.rounds_x, bias)
    return y


def weight_rows(weight: PackedWeight, ids: Tensor) -> Tensor:
    """[num_ids, depth] float32: these rows of the matrix, its values exactly.

    Args:
        ids: [num_ids] int64 on the CPU, each in [0, num_cols).
    Raises:
        ValueError: an id, or the shape, dtype or layout of ``ids``, is out of bounds.
    """
    check_tensor("ids", ids)
    run = _weight_rows if is_plain(ids, weight.panels) else torch.ops.mixattn.weight_rows
    rows: Tensor = run(weight.panels, weight.form, weight.num_cols, weight.depth, weight.isa, ids)
    return rows


class _Layout(NamedTuple):
    """What a call of ``linear`` or ``gated_linear`` is apart from addresses and contents."""

    x: Layout
    panels: Layout
    form: str
    num_cols: int
    isa: str
    rounds_x: bool
    is_gated: bool
    bias: Layout | None
    residual: Layout | None


def _check_panels(panels: Layout, form: str, num_cols: int, depth: int, isa: str) -> None:
    check_dtype("panels", panels, torch.uint8)
    num_bytes = -(-num_cols // _C.panel_cols(isa)) * _C.weight_panel_bytes(form, depth, isa)
    if panels.shape != (num_bytes,) or panels.device.type != "cpu" or panels.strides != (1,):
        raise ValueError(
            f"panels must be {num_bytes} contiguous bytes on the CPU for {num_cols} columns of depth {depth} in "
            f"{form}, got {list(panels.shape)} on {panels.device}"
        )


@functools.lru_cache(maxsize=1024)
def _native_sizes(layout: _Layout) -> Mapping[str, Any]:
    """The arguments of ``_C.linear`` that follow from the layout, once it has passed the checks; remembered."""
    x, residual = layout.x, layout.residual
    dims = Dims()
    dims.check("x", x, ("num_rows", "depth"))
    check_dtype("x", x, torch.float32)
    check_last_contiguous("x", x)
    _check_panels(layout.panels, layout.form, layout.num_cols, dims["depth"], layout.isa)
    check_device("x", x, "panels", layout.panels)
    for name, tensor, shape in (
        ("bias", layout.bias, (layout.num_cols,)),
        ("residual", residual, (dims["num_rows"], layout.num_cols)),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} must have the shape {list(shape)}, got {list(tensor.shape)}")
        check_dtype(name, tensor, torch.float32)
        check_device(name, tensor, "x", x)
        check_last_contiguous(name, tensor)
    return MappingProxyType(
        {
            "form": layout.form,
            "num_rows": dims["num_rows"],
            "num_cols": layout.num_cols,
            "depth": dims["depth"],
            "x_stride": x.strides[0],
            "residual_stride": 0 if residual is None else residual.strides[0],
            "y_stride": layout.num_cols // 2 if layout.is_gated else layout.num_cols,
            "is_gated": layout.is_gated,
            "isa": layout.isa,
            "rounds_x": layout.rounds_x,
        }
    )


def _linear(
    x: Tensor,
    panels: Tensor,
    form: str,
    num_cols: int,
    isa: str,
    rounds_x: bool,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    is_gated: bool = False,
) -> Tensor:
    """``mixattn::linear``: checks everything, then runs the CPU kernel."""
    bias_layout, residual_layout = (None if t is None else layout_of(t) for t in (bias, residual))
    sizes = _native_sizes(
        _Layout(layout_of(x), layout_of(panels), form, num_cols, isa, rounds_x, is_gated, bias_layout, residual_layout)
    )
    check_no_grad(x, bias, residual)
    y = torch.empty(x.shape[0], sizes["y_stride"])
    _C.linear(
        **sizes,
        panels=panels.data_ptr(),
        x=x.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        residual=0 if residual is None else residual.data_ptr(),
        y=y.data_ptr(),
        num_threads=env.num_threads(),
    )
    return y


def _linear_fake(
    x: Tensor,
    panels: Tensor,
    form: str,
    num_cols: int,
    isa: str,
    rounds_x: bool,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    if len(x.shape) != 2:
        raise ValueError(f"x must be [num_rows, depth], got shape {list(x.shape)}")
    return x.new_empty(x.shape[0], num_cols)


def _gated_linear(
    x: Tensor, panels: Tensor, form: str, num_cols: int, isa: str, rounds_x: bool, bias: Tensor | None
) -> Tensor:
    """``mixattn::gated_linear``; in two steps where a panel would have gates and others."""
    if num_cols % (2 * _C.panel_cols(isa)):
        return silu_mul(_linear(x, panels, form, num_cols, isa, rounds_x, bias, None))
    return _linear(x, panels, form, num_cols, isa, rounds_x, bias, None, is_gated=True)


def _gated_linear_fake(
    x: Tensor, panels: Tensor, form: str, num_cols: int, isa: str, rounds_x: bool, bias: Tensor | None
) -> Tensor:
    return _linear_fake(x, panels, form, num_cols // 2, isa, rounds_x, bias, None)


def _weight_rows(panels: Tensor, form: str, num_cols: int, depth: int, isa: str, ids: Tensor) -> Tensor:
    """``mixattn::weight_rows``: ids are checked by the compiled code, before it writes."""
    layout = layout_of(ids)
    Dims().check("ids", layout, ("num_ids",))
    check_index_layout("ids", layout, torch.int64, "panels", layout_of(panels))
    _check_panels(layout_of(panels), form, num_cols, depth, isa)
    out = torch.empty(len(ids), depth)
    _C.unpack_weight_rows(
        form=form,
        panels=panels.data_ptr(),
        num_rows=num_cols,
        depth=depth,
        ids=ids.data_ptr(),
        num_ids=len(ids),
        out=out.data_ptr(),
        num_threads=env.num_threads(),
        isa=isa,
    )
    return out


def _weight_rows_fake(panels: Tensor, form: str, num_cols: int, depth: int, isa: str, ids: Tensor) -> Tensor:
    return panels.new_empty(ids.shape[0], depth, dtype=torch.float32)


register_op(
    "linear(Tensor x, Tensor panels, str form, int num_cols, str isa, bool rounds_x, Tensor? bias, Tensor? residual) "
    "-> Tensor",
    _linear,
    _linear_fake,
)
register_op(
    "gated_linear(Tensor x, Tensor panels, str form, int num_cols, str isa, bool rounds_x, Tensor? bias) -> Tensor",
    _gated_linear,
    _gated_linear_fake,
)
register_op(
    "weight_rows(Tensor panels, str form, int num_cols, int depth, str isa, Tensor ids) -> Tensor",
    _weight_rows,
    _weight_rows_fake,
)
