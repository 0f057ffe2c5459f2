"""What the attention layers of one model step share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from mixattn.ops.plan import WorkPlan


@dataclass(frozen=True)
class AttentionMetadata:
    """The batch of one step, as every layer's ``append_kv`` and ``attention`` take it.

    Args:
        cu_seqlens_q: [num_seqs + 1] int32.
        seq_lens: [num_seqs] int32, this step's rows included.
        block_table: [num_seqs, max_pages] int32.
        slot_mapping: [total_q] int64, where each new row's K and V are stored.
        positions: [total_q] int64, the position of each new row in its sequence.
        plans: one plan per ``window_left`` that some layer has.
    """

    cu_seqlens_q: Tensor
    seq_lens: Tensor
    block_table: Tensor
    slot_mapping: Tensor
    positions: Tensor
    plans: Mapping[int | None, WorkPlan]

    def plan(self, window_left: int | None) -> WorkPlan:
        """The plan of the layers with this window.

        Raises:
            ValueError: the step has no such plan.
        """
        if window_left not in self.plans:
            raise ValueError(f"window_left must be one of {list(self.plans)}, got {window_left}")
        return self.plans[window_left]
