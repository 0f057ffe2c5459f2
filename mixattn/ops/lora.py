"""Adapters of low rank on the rows of a mixed batch; ``add_lora``. Triton on GPUs, plain torch elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from mixattn.ops.backends import has_triton_for
from mixattn.ops.checks import (
    Dims,
    check_device,
    check_dtype,
    check_float_dtype,
    check_index_layout,
    check_last_contiguous,
    check_no_grad,
    check_no_overlap,
    check_same_float_dtype,
    check_tensor,
    layout_of,
)
from mixattn.ops.library import is_plain, register_op
from mixattn.ops.reference import lora_reference


def add_lora(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scalings: Tensor, cu_seqlens_q: Tensor, adapter_ids: Tensor
) -> None:
    """Adds to each row of y scaling * (x a^T) b^T, with the adapter of the row's slice; chunks and decodes in one call.

    Args:
        y: [total_q, out_size], written; x: [total_q, in_size]; float32, bfloat16 or float16; the last dimension
            contiguous.
        a: [num_adapters, rank, in_size]; b: [num_adapters, out_size, rank]; in x's dtype, contiguous.
        scalings: [num_adapters] float32.
        cu_seqlens_q: [num_seqs + 1] int32, where each slice's rows start.
        adapter_ids: [num_seqs] int32, which adapter a slice has; below 0 for none.
    Raises:
        ValueError: a shape, dtype, device or stride is not as asked. Values in index tensors are not looked at.
    Source: SGMV, Punica, arXiv:2310.18547, section 4.
    """
    tensors = (y, x, a, b, scalings, cu_seqlens_q, adapter_ids)
    for name, tensor in zip(("y", "x", "a", "b", "scalings", "cu_seqlens_q", "adapter_ids"), tensors, strict=True):
        check_tensor(name, tensor)
    run = _add_lora if is_plain(*tensors) else torch.ops.mixattn.add_lora
    run(*tensors)


def _check(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scalings: Tensor, cu_seqlens_q: Tensor, adapter_ids: Tensor
) -> None:
    dims = Dims()
    layout_x = layout_of(x)
    check_float_dtype("x", layout_x)
    for name, tensor, names in (
        ("x", x, ("total_q", "in_size")),
        ("y", y, ("total_q", "out_size")),
        ("a", a, ("num_adapters", "rank", "in_size")),
        ("b", b, ("num_adapters", "out_size", "rank")),
    ):
        layout = layout_of(tensor)
        dims.check(name, layout, names)
        check_same_float_dtype(name, layout, "x", layout_x)
        check_device(name, layout, "x", layout_x)
        check_last_contiguous(name, layout)
        if name in ("a", "b") and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {list(tensor.stride())}")
    check_no_overlap("y", layout_of(y))
    dims.check("scalings", layout_of(scalings), ("num_adapters",))
    check_dtype("scalings", layout_of(scalings), torch.float32)
    check_device("scalings", layout_of(scalings), "x", layout_x)
    dims.check("adapter_ids", layout_of(adapter_ids), ("num_seqs",))
    dims.check("cu_seqlens_q", layout_of(cu_seqlens_q), ("num_seqs + 1",))
    if dims["num_seqs + 1"] != dims["num_seqs"] + 1:
        raise ValueError(f"cu_seqlens_q must be [{dims['num_seqs'] + 1}], got shape [{dims['num_seqs + 1']}]")
    check_index_layout("cu_seqlens_q", layout_of(cu_seqlens_q), torch.int32, "x", layout_x)
    check_index_layout("adapter_ids", layout_of(adapter_ids), torch.int32, "x", layout_x)


def _add_lora(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scalings: Tensor, cu_seqlens_q: Tensor, adapter_ids: Tensor
) -> None:
    """``mixattn::add_lora``."""
    arguments = (y, x, a, b, scalings, cu_seqlens_q, adapter_ids)
    _check(*arguments)
    check_no_grad(y, x, a, b)
    if has_triton_for(x.device.type):
        from mixattn.triton_kernels import lora as triton_lora

        triton_lora.add_lora(*arguments)
    else:
        y.copy_(lora_reference(*arguments))


register_op(
    "add_lora(Tensor(a!) y, Tensor x, Tensor a, Tensor b, Tensor scalings, Tensor cu_seqlens_q, Tensor adapter_ids) "
    "-> ()",
    _add_lora,
    _check,
)
