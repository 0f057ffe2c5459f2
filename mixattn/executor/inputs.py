"""A plan's slices as the tensors that a model reads, in host buffers that live as long as the executor."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mixattn import _C
from mixattn.types import BatchPlan


@dataclass(frozen=True)
class StepInputs:
    """One step's tensors; views into the builder's buffers, valid until its next ``build``.

    Args:
        input_ids: [total_q] int64.
        positions: [total_q] int64.
        cu_seqlens_q: [num_seqs + 1] int32.
        seq_lens: [num_seqs] int32.
        block_table: [num_seqs, max_pages] int32.
        slot_mapping: [total_q] int64.
        sampled_rows: the last row of every slice that gives a token, in the plan's order.
        last_page: the largest page id in the block table.
    """

    input_ids: Tensor
    positions: Tensor
    cu_seqlens_q: Tensor
    seq_lens: Tensor
    block_table: Tensor
    slot_mapping: Tensor
    sampled_rows: list[int]
    last_page: int


class InputBuilder:
    """Fills the buffers; they grow to the largest step seen and are not allocated anew.

    Args:
        page_size: tokens per page.
        max_model_len: the longest kv_len, in tokens; the block table is as wide as its pages.
    """

    def __init__(self, page_size: int, max_model_len: int) -> None:
        self._page_size = page_size
        self._max_pages = -(-max_model_len // page_size)
        self._allocate_seqs(8)
        self._allocate_tokens(256)

    def build(self, plan: BatchPlan, last_token_ids: Mapping[str, int]) -> StepInputs:
        """The tensors of ``plan``.

        Args:
            plan: at least one slice.
            last_token_ids: the previous step's tokens by request id, for slices that do not know theirs yet.
        """
        num_seqs, total_q = len(plan.slices), plan.num_tokens
        if num_seqs > len(self._seq_lens):
            self._allocate_seqs(2 * num_seqs)
        if total_q > len(self._input_ids):
            self._allocate_tokens(2 * total_q)
        begin = 0
        sampled_rows: list[int] = []
        for idx, part in enumerate(plan.slices):
            end = begin + part.q_len
            known = part.token_ids
            self._input_ids[begin:end] = (last_token_ids[part.request_id],) if known is None else known
            if self._row_pages[idx] is not part.page_ids:  # the array never changes
                self._set_pages(idx, part.page_ids)
            self._seq_lens[idx] = part.kv_len
            begin = end
            self._cu_seqlens_q[idx + 1] = end
            if part.is_sampled:
                sampled_rows.append(end - 1)
        _C.fill_positions(
            cu_seqlens_q=self._cu_seqlens_q.ctypes.data,
            seq_lens=self._seq_lens.ctypes.data,
            num_seqs=num_seqs,
            block_table=self._block_table.ctypes.data,
            max_pages=self._max_pages,
            page_size=self._page_size,
            positions=self._positions.ctypes.data,
            slot_mapping=self._slot_mapping.ctypes.data,
        )
        return StepInputs(
            input_ids=torch.from_numpy(self._input_ids[:total_q]),
            positions=torch.from_numpy(self._positions[:total_q]),
            cu_seqlens_q=torch.from_numpy(self._cu_seqlens_q[: num_seqs + 1]),
            seq_lens=torch.from_numpy(self._seq_lens[:num_seqs]),
            block_table=torch.from_numpy(self._block_table[:num_seqs]),
            slot_mapping=torch.from_numpy(self._slot_mapping[:total_q]),
            sampled_rows=sampled_rows,
            last_page=max(self._last_pages[:num_seqs]),
        )

    def _set_pages(self, idx: int, page_ids: array[int]) -> None:
        """Row ``idx`` of the block table."""
        known = np.frombuffer(page_ids, np.int32)[: self._max_pages]
        self._block_table[idx, : len(known)] = known
        self._row_pages[idx] = page_ids
        self._last_pages[idx] = int(known.max())

    def _allocate_seqs(self, num_seqs: int) -> None:
        self._cu_seqlens_q: npt.NDArray[np.int32] = np.zeros(num_seqs + 1, np.int32)
        self._seq_lens: npt.NDArray[np.int32] = np.zeros(num_seqs, np.int32)
        self._block_table: npt.NDArray[np.int32] = np.zeros((num_seqs, self._max_pages), np.int32)
        self._row_pages: list[array[int] | None] = [None] * num_seqs
        self._last_pages = [0] * num_seqs

    def _allocate_tokens(self, num_tokens: int) -> None:
        self._input_ids: npt.NDArray[np.int64] = np.zeros(num_tokens, np.int64)
        self._positions: npt.NDArray[np.int64] = np.zeros(num_tokens, np.int64)
        self._slot_mapping: npt.NDArray[np.int64] = np.zeros(num_tokens, np.int64)
