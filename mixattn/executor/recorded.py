"""The model's forward pass and its logits on the CPU: recorded once, and run without Python for every step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mixattn.ops.kv_dtypes import KvCache
from mixattn.ops.metadata import AttentionMetadata
from mixattn.ops.plan import WorkPlan, plan_room
from mixattn.ops.recording import Recording


class Model(Protocol):
    """What is recorded."""

    def forward(self, input_ids: Tensor, positions: Tensor, kv: list[KvCache], meta: AttentionMetadata) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...


class _Room(NamedTuple):
    """The largest step that a recording takes; the plans' sizes are those of the largest one."""

    num_rows: int
    num_seqs: int
    max_pages: int
    plan_words: int
    num_merges: int
    num_partial_rows: int

    def holds(self, needed: _Room) -> bool:
        return all(most >= size for most, size in zip(self, needed, strict=True))

    def grown(self, needed: _Room) -> _Room:
        """For both."""
        return _Room(*(_grown(most, size) for most, size in zip(self, needed, strict=True)))


def _grown(most: int, size: int) -> int:
    """What holds ``size``; what grows does so to a power of two, so that it does not often."""
    return most if most >= size else 1 << (size - 1).bit_length()


_FIRST_ROOM = _Room(256, 64, 1, 16384, 256, 2048)
"""What the default budget asks for. Recording 30 layers takes 32 to 50 ms, at first and where a step has no room."""


@dataclass(frozen=True)
class _Recorded:
    """A recording, and what it reads: tensors and buffers of plans into whose beginnings a step's are copied."""

    recording: Recording
    input_ids: Tensor
    meta: AttentionMetadata

    def run(self, input_ids: Tensor, meta: AttentionMetadata) -> Tensor:
        own = self.meta
        _fill(self.input_ids, input_ids)
        _fill(own.positions, meta.positions)
        _fill(own.slot_mapping, meta.slot_mapping)
        _fill(own.cu_seqlens_q, meta.cu_seqlens_q)
        _fill(own.seq_lens, meta.seq_lens)
        _fill(own.block_table, meta.block_table)
        for window, plan in meta.plans.items():
            own.plans[window].buffer[: len(plan.buffer)] = plan.buffer
        num_rows = len(input_ids)
        self.recording.run(num_rows, len(meta.seq_lens))
        hidden: Tensor = self.recording.result[:num_rows]
        return hidden


def _fill(target: Tensor, source: Tensor) -> None:
    """The beginning of each dimension. By numpy, whose calls cost less than torch's between two steps."""
    target.numpy()[tuple(map(slice, source.shape))] = source.numpy()


class RecordedModel:
    """Gives what ``model`` gives, with the same bits, in tensors that the next call of the same method overwrites.

    Args:
        model: made of mixattn's operators only, with the CPU kernels as backend.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._room = _FIRST_ROOM
        self._kv: list[KvCache] = []
        self._recorded: _Recorded | None = None
        self._logits: Recording | None = None
        self._sampled = torch.empty(0, 0)

    def forward(self, input_ids: Tensor, positions: Tensor, kv: list[KvCache], meta: AttentionMetadata) -> Tensor:
        """As the model's; ``positions`` are those of ``meta``, and the same ``kv`` is best given to every step."""
        needed = _needed(meta)
        if (
            self._recorded is None
            or not self._room.holds(needed)
            or kv is not self._kv
            or self._recorded.meta.plans.keys() != meta.plans.keys()
        ):
            self._recorded = None  # its memory goes first
            self._room = self._room.grown(needed)
            self._kv = kv
            self._recorded = self._record(kv, meta.plans)
        return self._recorded.run(input_ids, meta)

    def logits(self, hidden: Tensor) -> Tensor:
        """As the model's."""
        num_rows = len(hidden)
        if self._logits is None or num_rows > len(self._sampled):
            self._logits = None
            self._sampled = torch.zeros(_grown(_FIRST_ROOM.num_seqs, num_rows), hidden.shape[1])
            with torch.inference_mode():
                self._logits = Recording(self._model.logits, self._sampled, num_rows=len(self._sampled))
        _fill(self._sampled, hidden)
        self._logits.run(num_rows)
        logits: Tensor = self._logits.result[:num_rows]
        return logits

    def _record(self, kv: list[KvCache], plans: Mapping[int | None, WorkPlan]) -> _Recorded:
        """A recording of a step that fills the room."""
        room = self._room
        input_ids = torch.zeros(room.num_rows, dtype=torch.int64)
        meta = AttentionMetadata(
            cu_seqlens_q=torch.zeros(room.num_seqs + 1, dtype=torch.int32),
            seq_lens=torch.zeros(room.num_seqs, dtype=torch.int32),
            block_table=torch.zeros(room.num_seqs, room.max_pages, dtype=torch.int32),
            slot_mapping=torch.zeros(room.num_rows, dtype=torch.int64),
            positions=torch.zeros(room.num_rows, dtype=torch.int64),
            plans={
                window: plan_room(
                    plan,
                    total_q=room.num_rows,
                    num_seqs=room.num_seqs,
                    num_words=room.plan_words,
                    num_merges=room.num_merges,
                    num_partial_rows=room.num_partial_rows,
                )
                for window, plan in plans.items()
            },
        )
        with torch.inference_mode():
            recording = Recording(
                self._model.forward,
                input_ids,
                meta.positions,
                kv,
                meta,
                num_rows=room.num_rows,
                num_seqs=room.num_seqs,
            )
        return _Recorded(recording, input_ids, meta)


def _needed(meta: AttentionMetadata) -> _Room:
    plans = meta.plans.values()
    num_seqs, max_pages = meta.block_table.shape
    return _Room(
        len(meta.positions),
        num_seqs,
        max_pages,
        max(len(plan.buffer) for plan in plans),
        max(plan.num_merges for plan in plans),
        max(plan.num_partial_rows for plan in plans),
    )
