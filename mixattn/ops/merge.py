"""Merging attention over disjoint key sets; ``mixattn.merge_states``."""

from __future__ import annotations

import torch
from torch import Tensor

from mixattn import _C, env
from mixattn.ops.checks import (
    Dims,
    Layout,
    check_device,
    check_dtype,
    check_float_dtype,
    check_head_dim,
    check_last_contiguous,
    check_no_grad,
    check_tensor,
    layout_of,
)
from mixattn.ops.library import DTYPE_NAMES, register_op
from mixattn.ops.reference import merge_states_reference


def merge_states(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint key sets, from the result over each (ring attention, shared prefixes).

    Args:
        outs: [num_states, total_q, num_q_heads, head_dim] float32, bfloat16 or float16, each normalised by its own sum;
            any strides, the last dimension contiguous.
        lses: [num_states, total_q, num_q_heads] float32, natural log; -inf marks a state without keys, whose out is
            not read.
    Returns:
        out [total_q, num_q_heads, head_dim] in the dtype of ``outs``, summed in float32, and lse
        [total_q, num_q_heads] float32; 0 and -inf where no state has keys.
    Raises:
        ValueError: an argument's shape, dtype, device or stride is out of bounds.
        NotImplementedError: the dtype of ``outs`` is not supported.
    Source: merge of online-softmax states, arXiv:1805.02867.
    """
    check_tensor("outs", outs)
    check_tensor("lses", lses)
    out, lse = torch.ops.mixattn.merge_states(outs, lses)
    return out, lse


def _check(outs: Layout, lses: Layout) -> None:
    """Raises unless shapes, dtypes, devices and strides are as ``merge_states`` asks."""
    dims = Dims()
    dims.check("outs", outs, ("num_states", "total_q", "num_q_heads", "head_dim"))
    dims.check("lses", lses, ("num_states", "total_q", "num_q_heads"))
    if dims["num_states"] < 1:
        raise ValueError("outs must hold at least 1 state, got num_states 0")
    check_head_dim(dims["head_dim"])
    check_float_dtype("outs", outs)
    check_dtype("lses", lses, torch.float32)
    check_device("lses", lses, "outs", outs)
    check_last_contiguous("outs", outs)
    check_last_contiguous("lses", lses)


def _allocate(outs: Tensor) -> tuple[Tensor, Tensor]:
    return outs.new_empty(outs.shape[1:]), outs.new_empty(outs.shape[1:-1], dtype=torch.float32)


def _merge_states(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """``mixattn::merge_states``: compiled on the CPU; a few torch operations elsewhere, where the sum is small."""
    _check(layout_of(outs), layout_of(lses))
    check_no_grad(outs, lses)
    if outs.device.type != "cpu":
        out, lse = merge_states_reference(outs, lses)
        return out.to(outs.dtype), lse
    out, lse = _allocate(outs)
    num_states, num_tokens, num_heads, head_dim = outs.shape
    _C.merge_states(
        dtype=DTYPE_NAMES[outs.dtype],
        outs=outs.data_ptr(),
        lses=lses.data_ptr(),
        out=out.data_ptr(),
        lse=lse.data_ptr(),
        num_states=num_states,
        num_tokens=num_tokens,
        num_heads=num_heads,
        head_dim=head_dim,
        outs_strides=(outs.stride(0), outs.stride(1), outs.stride(2)),
        lses_strides=(lses.stride(0), lses.stride(1)),
        num_threads=env.num_threads(),
        isa=env.cpu_isa(),
    )
    return out, lse


def _merge_states_fake(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    _check(layout_of(outs), layout_of(lses))
    return _allocate(outs)


register_op("merge_states(Tensor outs, Tensor lses) -> (Tensor out, Tensor lse)", _merge_states, _merge_states_fake)
