"""Merging attention over disjoint key sets; ``mixattn.merge_states``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixattn import _C, env
from mixattn.ops import cuda_images
from mixattn.ops.backends import choose_backend
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


def merge_states(outs: Tensor, lses: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint key sets, from the result over each (ring attention, shared prefixes).

    Args:
        outs: [num_states, total_q, num_q_heads, head_dim] float32, bfloat16 or float16, each normalised by its own sum;
            any strides, the last dimension contiguous.
        lses: [num_states, total_q, num_q_heads] float32, natural log; -inf marks a state without keys, whose out is
            not read.
        backend: as for ``attention``.
    Returns:
        out [total_q, num_q_heads, head_dim] in the dtype of ``outs``, summed in float32, and lse
        [total_q, num_q_heads] float32; 0 and -inf where no state has keys.
    Raises:
        ValueError: an argument's shape, dtype, device or stride is out of bounds.
        NotImplementedError: valid, but not supported; the message names the nearest that is.
    Source: merge of online-softmax states, arXiv:1805.02867.
    """
    check_tensor("outs", outs)
    check_tensor("lses", lses)
    out, lse = torch.ops.mixattn.merge_states(outs, lses, backend)
    return out, lse


def _check(outs: Layout, lses: Layout) -> None:
    """Raises unless shapes, dtypes, devices and strides are as ``merge_states`` asks."""
    dims = Dims()
    dims.check("outs", outs, ("num_states", "total_q", "num_q_heads", "head_dim"))
    dims.check("lses", lses, ("num_states", "total_q", "num_q_heads"))
    if dims["num_states"] < 1:
        raise ValueError("outs must hold at least 1 state, got num_states 0")
    check_head_dim("head_dim", dims["head_dim"])
    check_float_dtype("outs", outs)
    check_dtype("lses", lses, torch.float32)
    check_device("lses", lses, "outs", outs)
    check_last_contiguous("outs", outs)
    check_last_contiguous("lses", lses)


def _allocate(outs: Tensor) -> tuple[Tensor, Tensor]:
    return outs.new_empty(outs.shape[1:]), outs.new_empty(outs.shape[1:-1], dtype=torch.float32)


def _sizes(outs: Tensor, lses: Tensor) -> dict[str, Any]:
    """The arguments of ``_C.merge_states`` that both compiled backends take, without the results."""
    num_states, num_tokens, num_heads, head_dim = outs.shape
    return {
        "dtype": DTYPE_NAMES[outs.dtype],
        "outs": outs.data_ptr(),
        "lses": lses.data_ptr(),
        "num_states": num_states,
        "num_tokens": num_tokens,
        "num_heads": num_heads,
        "head_dim": head_dim,
        "outs_strides": outs.stride()[:3],
        "lses_strides": lses.stride()[:2],
    }


def _why_not(backend: str, outs: Tensor, lses: Tensor) -> str | None:
    """The reason why this backend does not take the call; None if it does."""
    if backend != "cuda":
        return None
    reason = cuda_images.why_device_lacks(outs.device.index or 0)
    if reason is not None:
        return reason
    try:
        _C.cuda_merge_states_kernel(**_sizes(outs, lses), out=0, lse=0)
    except NotImplementedError as error:
        return str(error)
    return None


def _merge_states(outs: Tensor, lses: Tensor, backend: str | None) -> tuple[Tensor, Tensor]:
    """``mixattn::merge_states``: checks everything, then runs the backend."""
    _check(layout_of(outs), layout_of(lses))
    check_no_grad(outs, lses)
    chosen = choose_backend(outs.device.type, backend, lambda name: _why_not(name, outs, lses))
    if (reason := _why_not(chosen, outs, lses)) is not None:
        raise NotImplementedError(reason)
    if chosen == "reference":
        exact_out, exact_lse = merge_states_reference(outs, lses)
        return exact_out.to(outs.dtype), exact_lse
    out, lse = _allocate(outs)
    if out.numel() == 0:
        return out, lse
    if chosen == "triton":
        from mixattn.triton_kernels.merge_states import merge_states as merge_states_triton

        merge_states_triton(outs, lses, out, lse)
    elif chosen == "cuda":
        device = outs.device
        sizes = _sizes(outs, lses)
        kernel = _C.cuda_merge_states_kernel(**sizes, out=0, lse=0)
        _C.cuda_merge_states(
            **sizes,
            out=out.data_ptr(),
            lse=lse.data_ptr(),
            image=cuda_images.image(device.index or 0, kernel["image"]),
            stream=torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0,
        )
    else:
        _C.merge_states(
            **_sizes(outs, lses),
            out=out.data_ptr(),
            lse=lse.data_ptr(),
            num_threads=env.num_threads(),
            isa=env.cpu_isa(),
        )
    return out, lse


def _merge_states_fake(outs: Tensor, lses: Tensor, backend: str | None) -> tuple[Tensor, Tensor]:
    _check(layout_of(outs), layout_of(lses))
    return _allocate(outs)


register_op(
    "merge_states(Tensor outs, Tensor lses, str? backend) -> (Tensor out, Tensor lse)",
    _merge_states,
    _merge_states_fake,
)
