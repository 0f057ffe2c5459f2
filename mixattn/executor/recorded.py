"""The model's forward pass on the CPU: steps are recorded by their shape and run again without Python."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mixattn.ops.kv_dtypes import KvCache
from mixattn.ops.metadata import AttentionMetadata
from mixattn.ops.plan import WorkPlan, with_room
from mixattn.ops.recording import Recording

MOST_RECORDED_TOKENS = 512
"""Rows of a step that is recorded: beyond, a step takes so long that Python's share of it does not count."""
_RECORDED_AT_ONCE = 64
"""Rows up to which a step is recorded when its shape is first seen. A larger one when the shape comes back, because
prompts come in many shapes: recording 30 layers takes 50 ms, and running them recorded saves some 20 ms of 140 (256
rows of a 135M model with int8 inputs, 2 cores of a Zen 4)."""
_MOST_RECORDINGS, _MOST_RECORDED_ROWS = 64, 4096
"""Of all recordings together, the least recently used going first; 64 rows of a 135M model take 4 MB."""
_MOST_SEEN = 256
"""Shapes that are remembered to have been seen."""


class Model(Protocol):
    """What is recorded."""

    def forward(self, input_ids: Tensor, positions: Tensor, kv: list[KvCache], meta: AttentionMetadata) -> Tensor: ...


@dataclass(frozen=True)
class _Recorded:
    """One recording, and the plans that it reads: buffers into which a step's plans are copied."""

    recording: Recording
    plans: Mapping[int | None, WorkPlan]
    num_rows: int


class RecordedForward:
    """Calls like ``model.forward``, with the same bits as result.

    A recording is used again for steps whose tensors lie where its own did and have the same shapes; the executor's
    input buffers do. Its result is overwritten by the next step of the same shape.

    Args:
        model: made of mixattn's operators only, with the CPU kernels as backend.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._recorded: OrderedDict[tuple[object, ...], _Recorded] = OrderedDict()
        self._seen: OrderedDict[tuple[object, ...], None] = OrderedDict()

    def forward(self, input_ids: Tensor, positions: Tensor, kv: list[KvCache], meta: AttentionMetadata) -> Tensor:
        """As the model's."""
        if len(input_ids) > MOST_RECORDED_TOKENS:
            return self._model.forward(input_ids, positions, kv, meta)
        key = _key(input_ids, positions, meta)
        found = self._recorded.get(key)
        if found is None and len(input_ids) > _RECORDED_AT_ONCE and not self._has_seen(key):
            return self._model.forward(input_ids, positions, kv, meta)
        if found is None or not all(_fits(found.plans[window], plan) for window, plan in meta.plans.items()):
            self._recorded.pop(key, None)
            found = self._record(input_ids, positions, kv, meta)
            self._recorded[key] = found
            while self._is_full():
                self._recorded.popitem(last=False)
        self._recorded.move_to_end(key)
        for window, plan in meta.plans.items():
            np.copyto(found.plans[window].buffer, plan.buffer)
        found.recording.run()
        result: Tensor = found.recording.result
        return result

    def _is_full(self) -> bool:
        num_rows = sum(recorded.num_rows for recorded in self._recorded.values())
        return len(self._recorded) > _MOST_RECORDINGS or num_rows > _MOST_RECORDED_ROWS

    def _has_seen(self, key: tuple[object, ...]) -> bool:
        """Whether a step of this shape came before; remembers that one has."""
        if key in self._seen:
            return True
        self._seen[key] = None
        if len(self._seen) > _MOST_SEEN:
            self._seen.popitem(last=False)
        return False

    def _record(self, input_ids: Tensor, positions: Tensor, kv: list[KvCache], meta: AttentionMetadata) -> _Recorded:
        plans = {window: with_room(plan) for window, plan in meta.plans.items()}
        recorded_meta = replace(meta, plans=plans)
        with torch.inference_mode():
            recording = Recording(self._model.forward, input_ids, positions, kv, recorded_meta)
        return _Recorded(recording, plans, len(input_ids))


def _key(input_ids: Tensor, positions: Tensor, meta: AttentionMetadata) -> tuple[object, ...]:
    """What a recording was made for: where each tensor lies, its shape, and the length of each plan."""
    tensors = (input_ids, positions, meta.cu_seqlens_q, meta.seq_lens, meta.block_table, meta.slot_mapping)
    lengths = tuple((window, len(plan.buffer)) for window, plan in meta.plans.items())
    return (*((tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in tensors), lengths)


def _fits(room: WorkPlan, plan: WorkPlan) -> bool:
    """Whether the partial buffers that were recorded with ``room`` hold what ``plan`` needs."""
    return plan.num_partial_rows <= room.num_partial_rows and plan.num_merges <= room.num_merges
