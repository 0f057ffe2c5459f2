"""The model's forward pass on the CPU: small steps are recorded by their shape and run again without Python."""

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

MOST_RECORDED_TOKENS = 64
"""Rows of a step that is recorded: beyond, a step takes so long that Python's share of it does not count."""
_MOST_RECORDINGS = 64
"""Shapes that are kept, the least recently used going first; a recording of 64 rows of a 135M model takes 4 MB."""


class Model(Protocol):
    """What is recorded."""

    def forward(self, input_ids: Tensor, positions: Tensor, kv: list[KvCache], meta: AttentionMetadata) -> Tensor: ...


@dataclass(frozen=True)
class _Recorded:
    """One recording, and the plans that it reads: buffers into which a step's plans are copied."""

    recording: Recording
    plans: Mapping[int | None, WorkPlan]


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

    def forward(self, input_ids: Tensor, positions: Tensor, kv: list[KvCache], meta: AttentionMetadata) -> Tensor:
        """As the model's."""
        if len(input_ids) > MOST_RECORDED_TOKENS:
            return self._model.forward(input_ids, positions, kv, meta)
        key = _key(input_ids, positions, meta)
        found = self._recorded.get(key)
        if found is None or not all(_fits(found.plans[window], plan) for window, plan in meta.plans.items()):
            self._recorded.pop(key, None)
            found = self._record(input_ids, positions, kv, meta)
            self._recorded[key] = found
            if len(self._recorded) > _MOST_RECORDINGS:
                self._recorded.popitem(last=False)
        self._recorded.move_to_end(key)
        for window, plan in meta.plans.items():
            np.copyto(found.plans[window].buffer, plan.buffer)
        found.recording.run()
        result: Tensor = found.recording.result
        return result

    def _record(self, input_ids: Tensor, positions: Tensor, kv: list[KvCache], meta: AttentionMetadata) -> _Recorded:
        plans = {window: with_room(plan) for window, plan in meta.plans.items()}
        recorded_meta = replace(meta, plans=plans)
        with torch.inference_mode():
            return _Recorded(Recording(self._model.forward, input_ids, positions, kv, recorded_meta), plans)


def _key(input_ids: Tensor, positions: Tensor, meta: AttentionMetadata) -> tuple[object, ...]:
    """What a recording was made for: where each tensor lies, its shape, and the length of each plan."""
    tensors = (input_ids, positions, meta.cu_seqlens_q, meta.seq_lens, meta.block_table, meta.slot_mapping)
    lengths = tuple((window, len(plan.buffer)) for window, plan in meta.plans.items())
    return (*((tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in tensors), lengths)


def _fits(room: WorkPlan, plan: WorkPlan) -> bool:
    """Whether the partial buffers that were recorded with ``room`` hold what ``plan`` needs."""
    return plan.num_partial_rows <= room.num_partial_rows and plan.num_merges <= room.num_merges
