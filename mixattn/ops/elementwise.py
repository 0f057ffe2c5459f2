"""What a decoder layer does between its matrix products: ``rms_norm``, ``add_rms_norm`` and ``silu_mul``.

Compiled on the CPU in float32 (csrc/cpu/elementwise-inl.h), Triton on GPUs (triton_kernels/elementwise.py), else torch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mixattn import _C, env
from mixattn.ops.backends import has_triton_for
from mixattn.ops.checks import check_last_contiguous, check_no_grad, check_no_overlap, check_tensor, layout_of
from mixattn.ops.library import DTYPE_NAMES, is_plain, register_op


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32.

    Args:
        x: [num_rows, size] or [num_rows, num_heads, size], a float dtype; the last dimension contiguous.
        weight: [size] in x's dtype, contiguous.
        eps: added to the mean of squares.
    Returns:
        As x in shape and dtype, contiguous.
    Raises:
        ValueError: a shape, dtype, device or stride is not as asked.
    Source: arXiv:1910.07467, equation 4.
    """
    check_tensor("x", x)
    check_tensor("weight", weight)
    run = _rms_norm if is_plain(x, weight) else torch.ops.mixattn.rms_norm
    y: Tensor = run(x, weight, eps)
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``rms_norm`` of x + residual, which is rounded to their dtype and becomes ``residual``.

    Args:
        x, residual: [num_rows, size], a float dtype; the last dimension contiguous. residual is written.
        weight, eps: as for ``rms_norm``.
    Returns:
        As x in shape and dtype, contiguous.
    Raises:
        ValueError: a shape, dtype, device or stride is not as asked.
    """
    for name, tensor in (("x", x), ("residual", residual), ("weight", weight)):
        check_tensor(name, tensor)
    run = _add_rms_norm if is_plain(x, residual, weight) else torch.ops.mixattn.add_rms_norm
    y: Tensor = run(x, residual, weight, eps)
    return y


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, with silu(g) = g / (1 + e^-g).

    Args:
        gate_up: [num_rows, 2 * size], a float dtype: gates, then what they are multiplied with; the last dimension
            contiguous.
    Returns:
        [num_rows, size] in the dtype of ``gate_up``.
    Raises:
        ValueError: the shape or stride is not as asked.
    Source: SwiGLU, arXiv:2002.05202.
    """
    check_tensor("gate_up", gate_up)
    run = _silu_mul if is_plain(gate_up) else torch.ops.mixattn.silu_mul
    y: Tensor = run(gate_up)
    return y


def _check_norm(x: Tensor, weight: Tensor) -> None:
    if x.ndim not in (2, 3):
        raise ValueError(f"x must be [num_rows, size] or [num_rows, num_heads, size], got shape {list(x.shape)}")
    if weight.shape != x.shape[-1:] or not weight.is_contiguous():
        raise ValueError(f"weight must be [{x.shape[-1]}] and contiguous, got shape {list(weight.shape)}")
    if (weight.dtype, weight.device) != (x.dtype, x.device):
        raise ValueError(f"weight must be {x.dtype} on {x.device} as x is, got {weight.dtype} on {weight.device}")
    check_last_contiguous("x", layout_of(x))


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``mixattn::rms_norm``."""
    _check_norm(x, weight)
    check_no_grad(x, weight)
    if has_triton_for(x.device.type) and x.dtype in DTYPE_NAMES:
        from mixattn.triton_kernels import elementwise as triton_elementwise

        on_gpu: Tensor = triton_elementwise.rms_norm(x, weight, eps)
        return on_gpu
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps).contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel() == 0:
        return y
    _C.rms_norm(
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        y=y.data_ptr(),
        num_rows=x.shape[0],
        num_groups=1 if x.ndim == 2 else x.shape[1],
        size=x.shape[-1],
        x_row_stride=x.stride(0),
        x_group_stride=0 if x.ndim == 2 else x.stride(1),
        eps=eps,
        num_threads=env.num_threads(),
        isa=env.cpu_isa(),
    )
    return y


def _rms_norm_fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    _check_norm(x, weight)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _check_residual(x: Tensor, residual: Tensor, weight: Tensor) -> None:
    _check_norm(x, weight)
    if x.ndim != 2 or residual.shape != x.shape:
        raise ValueError(
            f"x and residual must be [num_rows, size], got shapes {list(x.shape)} and {list(residual.shape)}"
        )
    if (residual.dtype, residual.device) != (x.dtype, x.device):
        raise ValueError(f"residual must be {x.dtype} on {x.device} as x is, got {residual.dtype} on {residual.device}")
    layout = layout_of(residual)
    check_last_contiguous("residual", layout)
    check_no_overlap("residual", layout)


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``mixattn::add_rms_norm``."""
    _check_residual(x, residual, weight)
    check_no_grad(x, residual, weight)
    if has_triton_for(x.device.type) and x.dtype in DTYPE_NAMES:
        from mixattn.triton_kernels import elementwise as triton_elementwise

        on_gpu: Tensor = triton_elementwise.rms_norm(x, weight, eps, residual)
        return on_gpu
    residual.add_(x)
    return _rms_norm(residual, weight, eps)


def _add_rms_norm_fake(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    _check_residual(x, residual, weight)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _check_gate_up(gate_up: Tensor) -> None:
    if gate_up.ndim != 2 or gate_up.shape[1] % 2 or gate_up.shape[1] == 0:
        raise ValueError(f"gate_up must be [num_rows, 2 * size] with size >= 1, got shape {list(gate_up.shape)}")
    check_last_contiguous("gate_up", layout_of(gate_up))


def _silu_mul(gate_up: Tensor) -> Tensor:
    """``mixattn::silu_mul``."""
    _check_gate_up(gate_up)
    check_no_grad(gate_up)
    if has_triton_for(gate_up.device.type) and gate_up.dtype in DTYPE_NAMES:
        from mixattn.triton_kernels import elementwise as triton_elementwise

        on_gpu: Tensor = triton_elementwise.silu_mul(gate_up)
        return on_gpu
    size = gate_up.shape[1] // 2
    if gate_up.device.type != "cpu" or gate_up.dtype != torch.float32:
        return F.silu(gate_up[:, :size]) * gate_up[:, size:]
    y = gate_up.new_empty(gate_up.shape[0], size)
    _C.silu_mul(
        gate_up=gate_up.data_ptr(),
        y=y.data_ptr(),
        num_rows=gate_up.shape[0],
        size=size,
        gate_up_stride=gate_up.stride(0),
        num_threads=env.num_threads(),
        isa=env.cpu_isa(),
    )
    return y


def _silu_mul_fake(gate_up: Tensor) -> Tensor:
    _check_gate_up(gate_up)
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


register_op("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", _rms_norm, _rms_norm_fake)
register_op(
    "add_rms_norm(Tensor x, Tensor(a!) residual, Tensor weight, float eps) -> Tensor", _add_rms_norm, _add_rms_norm_fake
)
register_op("silu_mul(Tensor gate_up) -> Tensor", _silu_mul, _silu_mul_fake)
