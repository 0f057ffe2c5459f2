"""A model's calls of the CPU operators, recorded once and run again without Python.

A step of a 30-layer model makes some 270 calls; each costs Python a few microseconds of checks and arguments, more than
small matrices themselves. Steps differ in what their tensors hold and in how many rows and sequences there are, not in
the calls: so a step as large as any is recorded (csrc/bindings/recording.h), and those that follow run as one call
each, in which every operator takes the first rows of its tensors.

While a function records, tensors get memory that the recording keeps, and reuses once no tensor lies in it any more,
as it will be in every run: the order is the same. What is not an operator of ours, a view or a new tensor would be
missing from the runs, and raises.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mixattn import _C, env
from mixattn.ops.library import kernel_of

_NEW_EMPTY = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}
_NEW_ZEROS = {torch.ops.aten.zeros.default}
"""Written once, when they are recorded: for tickets, which every call leaves zero. Their memory serves zeros alone."""
_Buffer = npt.NDArray[np.uint8]
_REFERENCES_WHEN_FREE = 3
"""Of a buffer that no tensor lies in: the list's, the loop variable's and that of getrefcount's argument."""


class Recording:
    """The calls that ``function(*arguments)`` makes, and what it returned.

    Args:
        function: calls operators of mixattn on the CPU; their tensors keep their addresses as long as the recording.
        num_rows: of the tensors that the operators take, the first dimension of each.
        num_seqs: of the batch that attention takes; without attention any will do.
    Attributes:
        result: of the function; its first rows hold values after ``run``.
        num_bytes: of the memory that is kept for tensors made on the way. What no run has reached is not resident.
    Raises:
        RuntimeError: the function calls something that cannot be recorded, or is being recorded already.
        ValueError: an operator gets another number of rows or sequences.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any, num_rows: int, num_seqs: int = 0) -> None:
        self._calls = _C.Recording(num_rows, num_seqs, env.num_threads())
        mode = _RecordingMode()
        self._calls.begin()
        try:
            with mode:
                self.result = function(*arguments)
        finally:
            self._calls.end()
        self._buffers = [*mode.empty_buffers, *mode.zero_buffers]
        self.num_bytes = sum(buffer.nbytes for buffer in self._buffers)

    def run(self, num_rows: int, num_seqs: int = 0) -> None:
        """Runs the calls with what the first rows, and sequences, of their tensors hold now.

        Raises:
            ValueError: there are more than were recorded, or what the tensors hold is out of bounds.
        """
        self._calls.run(num_rows, num_seqs)

    def profile(self, num_rows: int, num_seqs: int = 0) -> dict[str, float]:
        """Runs the calls, too; the microseconds that all calls of each operator took."""
        total_us: dict[str, float] = {}
        for name, us in self._calls.run_timed(num_rows, num_seqs):
            total_us[name] = total_us.get(name, 0.0) + us
        return total_us

    def __len__(self) -> int:
        return len(self._calls)


class _RecordingMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sends operators of ours to their kernels, gives new tensors memory from buffers, refuses what computes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.empty_buffers: list[_Buffer] = []
        self.zero_buffers: list[_Buffer] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: else the first token waits 1.5 s for torch._dynamo, imported only to keep torch.compile out."""
        return False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kernel = kernel_of(func)
        if kernel is not None:
            with self:  # the kernel's own new tensors come here, too
                return kernel(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if func in _NEW_EMPTY:
            return _moved(result, self.empty_buffers)
        if func in _NEW_ZEROS:
            return _moved(result, self.zero_buffers).zero_()
        if not func.is_view:
            raise RuntimeError(f"{func} computes outside of mixattn's operators: it cannot be recorded")
        return result


def _moved(tensor: Tensor, buffers: list[_Buffer]) -> Tensor:
    """A tensor like this one in one of these buffers, whatever the buffer holds."""
    num_bytes = tensor.untyped_storage().nbytes()
    if num_bytes == 0:
        return tensor
    moved = torch.from_numpy(_free_buffer(num_bytes, buffers)).view(tensor.dtype)
    return moved.as_strided(tensor.size(), tensor.stride())


def _free_buffer(num_bytes: int, buffers: list[_Buffer]) -> _Buffer:
    """[num_bytes]. A tensor from ``torch.from_numpy`` holds a reference to its array as long as any view lives."""
    for buffer in buffers:
        if buffer.nbytes == num_bytes and sys.getrefcount(buffer) == _REFERENCES_WHEN_FREE:
            return buffer
    buffers.append(torch.empty(num_bytes, dtype=torch.uint8).numpy())
    return buffers[-1]
