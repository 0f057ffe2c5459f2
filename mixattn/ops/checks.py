"""Checks at the door of ``ops``: one name, one size, across all tensors of a call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mixattn.ops.library import DTYPE_NAMES

MAX_HEAD_DIM = 256
"""The widest head that every kernel has registers for."""
HEAD_DIM_MULTIPLE = 8
"""Rows of K and V are read in pieces of 8 elements: 16 bytes of a 2-byte dtype."""


class Layout(NamedTuple):
    """A tensor apart from its address and contents."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def layout_of(tensor: Tensor) -> Layout:
    """The layout of ``tensor``."""
    return Layout(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


def optional_layout(tensor: Tensor | None) -> Layout | None:
    """The layout of ``tensor`` where there is one."""
    return None if tensor is None else layout_of(tensor)


class Dims:
    """The sizes that the tensors of one call have given to the names of their dimensions."""

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}
        self._givers: dict[str, str] = {}

    def __getitem__(self, name: str) -> int:
        return self._sizes[name]

    def set_default(self, argument: str, name: str, size: int) -> None:
        """Binds this size, which ``argument`` tells, to ``name`` if no earlier tensor gave it one."""
        if name not in self._sizes:
            self._sizes[name] = size
            self._givers[name] = argument

    def check(self, argument: str, layout: Layout, names: Sequence[str]) -> None:
        """Binds the sizes of a tensor to ``names``.

        Raises:
            ValueError: another number of dimensions, or a size that differs from what an earlier tensor gave the name.
        """
        if len(layout.shape) != len(names):
            raise ValueError(f"{argument} must be [{', '.join(names)}], got shape {list(layout.shape)}")
        for name, size in zip(names, layout.shape, strict=True):
            self.set_default(argument, name, size)
            if self._sizes[name] != size:
                raise ValueError(
                    f"{argument} is [{', '.join(names)}] with {name} {size}, but {self._givers[name]} has {name} "
                    f"{self._sizes[name]}"
                )


def check_tensor(argument: str, value: object) -> None:
    """Raises TypeError unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument} must be a torch.Tensor, got {type(value).__name__}")


def check_dtype(argument: str, layout: Layout, dtype: torch.dtype) -> None:
    """Raises ValueError unless the tensor has exactly this dtype."""
    if layout.dtype != dtype:
        raise ValueError(f"{argument} must be {dtype}, got {layout.dtype}")


def check_float_dtype(argument: str, layout: Layout) -> None:
    """Raises NotImplementedError unless the dtype is one that every backend computes in."""
    if layout.dtype not in DTYPE_NAMES:
        raise NotImplementedError(
            f"{argument} is {layout.dtype}; supported are float32, bfloat16 and float16 (the nearest: cast to float32)"
        )


def check_same_float_dtype(argument: str, layout: Layout, of: str, other: Layout) -> None:
    """Raises NotImplementedError unless the tensor has the dtype that argument ``of`` has."""
    if layout.dtype != other.dtype:
        raise NotImplementedError(
            f"{argument} is {layout.dtype} and {of} is {other.dtype}; supported is one dtype for both: cast one"
        )


def check_head_dim(argument: str, head_dim: int) -> None:
    """Raises NotImplementedError unless every kernel takes heads of this size."""
    if not 1 <= head_dim <= MAX_HEAD_DIM or head_dim % HEAD_DIM_MULTIPLE != 0:
        nearest = min(max(-(-head_dim // HEAD_DIM_MULTIPLE), 1) * HEAD_DIM_MULTIPLE, MAX_HEAD_DIM)
        raise NotImplementedError(
            f"{argument} {head_dim} is not supported; multiples of {HEAD_DIM_MULTIPLE} up to {MAX_HEAD_DIM} are, the "
            f"nearest is {nearest}"
        )


def check_device(argument: str, layout: Layout, of: str, other: Layout) -> None:
    """Raises ValueError unless the tensor lies on the device that argument ``of`` lies on."""
    if layout.device != other.device:
        raise ValueError(f"{argument} must be on {of}'s device {other.device}, got {layout.device}")


def check_last_contiguous(argument: str, layout: Layout) -> None:
    """Raises ValueError unless the elements of the last dimension are adjacent in memory."""
    if layout.strides[-1] != 1 and layout.shape[-1] > 1:
        raise ValueError(f"the last dimension of {argument} must be contiguous (stride 1), got {layout.strides[-1]}")


def check_no_overlap(argument: str, layout: Layout) -> None:
    """Raises ValueError when two elements of a tensor to be written are one in memory (``expand`` makes such)."""
    if any(size > 1 and stride == 0 for size, stride in zip(layout.shape, layout.strides, strict=True)):
        raise ValueError(f"{argument} is written and must not have stride 0, got strides {list(layout.strides)}")


def check_index_layout(argument: str, layout: Layout, dtype: torch.dtype, of: str, other: Layout) -> None:
    """Raises ValueError unless the tensor is of this integer dtype, on that device, its last dimension contiguous."""
    check_dtype(argument, layout, dtype)
    check_device(argument, layout, of, other)
    check_last_contiguous(argument, layout)


def check_positive_finite(argument: str, value: float) -> None:
    """Raises ValueError unless 0 < value < inf (NaN included)."""
    if not 0.0 < value < math.inf:
        raise ValueError(f"{argument} must be finite and > 0, got {value}")


def check_no_grad(*tensors: Tensor | None) -> None:
    """Raises NotImplementedError when autograd would expect a backward of these inputs."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise NotImplementedError("mixattn ops have no backward: call them under torch.no_grad() or detach the inputs")


def check_indices(argument: str, indices: Tensor, bound_name: str, bound: int) -> None:
    """Raises ValueError unless every one of these indices, on the CPU, is in [0, bound)."""
    is_bad = (indices < 0) | (indices >= bound)
    if is_bad.any():
        at = is_bad.nonzero()[0].tolist()
        raise ValueError(f"{argument}{at} must be in [0, {bound_name}) = [0, {bound}), got {int(indices[tuple(at)])}")


def check_lengths(cu_seqlens_q: Tensor, seq_lens: Tensor, total_q: int, max_kv_len: int) -> None:
    """Raises ValueError unless the lengths, on the CPU, describe slices of these rows and of tables this wide."""
    starts, lens = cu_seqlens_q.tolist(), seq_lens.tolist()
    if starts[0] != 0:
        raise ValueError(f"cu_seqlens_q[0] must be 0, got {starts[0]}")
    if starts[-1] != total_q:
        raise ValueError(f"cu_seqlens_q[{len(lens)}] must be total_q, {total_q}, got {starts[-1]}")
    if starts != sorted(starts):
        at = next(i for i in range(1, len(starts)) if starts[i] < starts[i - 1])
        raise ValueError(f"cu_seqlens_q must not decrease, got {starts[at - 1]} then {starts[at]} at {at}")
    if lens and (min(lens) < 0 or max(lens) > max_kv_len):
        at = next(i for i, kv_len in enumerate(lens) if not 0 <= kv_len <= max_kv_len)
        raise ValueError(f"seq_lens[{at}] must be in [0, max_pages * page_size] = [0, {max_kv_len}], got {lens[at]}")


def check_block_ids(block_table: Tensor, seq_lens: Tensor, page_size: int, num_pages: int) -> None:
    """Raises ValueError unless the pages of every sequence, on the CPU, are in [0, num_pages)."""
    num_used = (seq_lens + (page_size - 1)) // page_size
    is_used = torch.arange(block_table.shape[1]) < num_used.unsqueeze(1)
    check_indices("block_table", torch.where(is_used, block_table, 0), "num_pages", num_pages)
