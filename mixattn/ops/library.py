"""Between torch and ``mixattn._C``: registering an op with torch, and the names of dtypes there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
"""What every backend computes in, and the name that ``mixattn._C`` knows it by."""

_KERNELS: dict[str, Callable[..., Any]] = {}
_LIBRARY = torch.library.Library("mixattn", "DEF")  # type: ignore[no-untyped-call]


def register_op(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Makes ``torch.ops.mixattn.<name>`` of a schema ``name(arguments) -> results``.

    Registered by schema, not with ``torch.library.custom_op``: that takes 20 us more per call (2 cores of an EPYC), and
    a model makes two calls per layer.

    Args:
        kernel: called with the arguments in the schema's order, on every device.
        fake: likewise, with tensors that have no memory; returns results of the right shapes.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"mixattn::{name}", fake, lib=_LIBRARY)
    _KERNELS[f"mixattn::{name}"] = kernel


def kernel_of(op: Any) -> Callable[..., Any] | None:
    """The kernel that an op of ours was registered with; None for an op of others."""
    return _KERNELS.get(op.name())


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether a call on these tensors concerns the kernel alone: nothing traces it, and no mode or subclass listens.

    Such a call may skip the dispatcher, in which Python's part of it takes twice as long (57 us instead of 30 us for 32
    decodes; 2 cores of an EPYC): a model makes two calls per layer.
    """
    return (
        not torch.compiler.is_compiling()
        and not is_in_torch_dispatch_mode()
        and all(tensor is None or type(tensor) is Tensor for tensor in tensors)
    )
