"""From a checkpoint's named tensors to a model's parameters, whatever the file format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

_INITIALIZER_RANGE = 0.02
"""Standard deviation of random weights; the ``initializer_range`` of all supported families."""


class WeightSource(Protocol):
    """Where weights come from. Tensors are named as Hugging Face's checkpoints name them."""

    location: str
    """The file or folder, for messages."""

    def names(self) -> Iterable[str]:
        """Every tensor that a model should take."""

    def stored_name(self, name: str) -> str:
        """The name that the tensor has in the file."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def form(self, name: str) -> str:
        """How a matrix is stored, if ``ops.linear`` knows the form; else ``float32``, which holds it exactly."""
        ...

    def read_into(self, name: str, destination: Tensor) -> None:
        """Writes the tensor's values, rounded to the dtype of ``destination`` (contiguous). Called from threads.

        A uint8 ``destination`` [rows, bytes of a row] gets the rows of a quantised form as they are stored.
        """


def check_weights(slots: Mapping[str, Tensor], source: WeightSource) -> None:
    """Raises unless the source has exactly the model's tensors, in their shapes.

    Args:
        slots: the model's parameters by name; only their shapes are read, they may be on the meta device.
    Raises:
        ValueError: naming the file, the tensor and what was expected.
    """
    names = set(source.names())
    missing = [name for name in slots if name not in names]
    if missing:
        raise ValueError(
            f"{source.location}: tensor {source.stored_name(missing[0])!r} is missing "
            f"({len(missing)} of {len(slots)} tensors are)"
        )
    unknown = sorted(names - slots.keys())
    if unknown:
        raise ValueError(
            f"{source.location}: tensor {source.stored_name(unknown[0])!r} has no place in this architecture "
            f"({len(unknown)} tensors have none)"
        )
    for name, slot in slots.items():
        if source.shape(name) != tuple(slot.shape):
            raise ValueError(
                f"{source.location}: tensor {source.stored_name(name)!r} must have the shape {list(slot.shape)}, "
                f"got {list(source.shape(name))}"
            )


def load_weights(slots: Mapping[str, Tensor], source: WeightSource, *, show_progress: bool) -> None:
    """Fills the slots from the source, on as many threads as torch uses, with a bar on stderr when it is a terminal.

    Args:
        slots: the model's parameters by name, checked by ``check_weights``; written.
    """
    total_bytes = sum(slot.nbytes for slot in slots.values())
    with (
        ThreadPoolExecutor(torch.get_num_threads()) as pool,
        tqdm(
            total=total_bytes,
            desc="Loading weights",
            unit="B",
            unit_scale=True,
            leave=False,
            disable=None if show_progress else True,
        ) as bar,
    ):
        # Largest first, so that no thread is left with a large tensor at the end.
        order = sorted(slots, key=lambda name: slots[name].nbytes, reverse=True)
        for name, _ in zip(order, pool.map(lambda name: source.read_into(name, slots[name]), order), strict=True):
            bar.update(slots[name].nbytes)


def fill_randomly(slots: Mapping[str, Tensor], seed: int) -> None:
    """Random weights, the same for the same seed: normal matrices, norms of ones, biases of zeros."""
    generator = torch.Generator().manual_seed(seed)
    for name, slot in slots.items():
        if name.endswith(".bias"):
            slot.zero_()
        elif slot.ndim == 1:
            slot.fill_(1.0)
        else:
            values = torch.empty(slot.shape).normal_(std=_INITIALIZER_RANGE, generator=generator)
            slot.copy_(values)
