"""A plan's slices as the tensors that a model reads, in host buffers that live as long as the executor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

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
        sampled_rows: [num_sampled] int64, the last row of every slice that gives a token, in the plan's order.
    """

    input_ids: Tensor
    positions: Tensor
    cu_seqlens_q: Tensor
    seq_lens: Tensor
    block_table: Tensor
    slot_mapping: Tensor
    sampled_rows: Tensor


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
        for idx, part in enumerate(plan.slices):
            end = begin + part.q_len
            known = part.token_ids
            self._input_ids[begin:end] = (last_token_ids[part.request_id],) if known is None else known
            num_pages = -(-part.kv_len // self._page_size)
            self._block_table[idx, :num_pages] = np.frombuffer(part.page_ids, np.int32)[:num_pages]
            self._seq_lens[idx] = part.kv_len
            begin = end
            self._cu_seqlens_q[idx + 1] = end
        self._fill_positions(num_seqs, total_q)
        sampled_rows = [int(self._cu_seqlens_q[i + 1]) - 1 for i, part in enumerate(plan.slices) if part.is_sampled]
        return StepInputs(
            input_ids=torch.from_numpy(self._input_ids[:total_q]),
            positions=torch.from_numpy(self._positions[:total_q]),
            cu_seqlens_q=torch.from_numpy(self._cu_seqlens_q[: num_seqs + 1]),
            seq_lens=torch.from_numpy(self._seq_lens[:num_seqs]),
            block_table=torch.from_numpy(self._block_table[:num_seqs]),
            slot_mapping=torch.from_numpy(self._slot_mapping[:total_q]),
            sampled_rows=torch.tensor(sampled_rows, dtype=torch.int64),
        )

    def _fill_positions(self, num_seqs: int, total_q: int) -> None:
        """Positions and slots of all rows at once: a slice's rows are the last q_len of its kv_len."""
        row_begins = self._cu_seqlens_q[:num_seqs]
        q_lens = np.diff(self._cu_seqlens_q[: num_seqs + 1])
        seq_idx = np.repeat(np.arange(num_seqs), q_lens)
        positions = self._positions[:total_q]
        positions[:] = np.arange(total_q) + (self._seq_lens[:num_seqs] - q_lens - row_begins)[seq_idx]
        page_ids = self._block_table[seq_idx, positions // self._page_size].astype(np.int64)
        self._slot_mapping[:total_q] = page_ids * self._page_size + positions % self._page_size

    def _allocate_seqs(self, num_seqs: int) -> None:
        self._cu_seqlens_q: npt.NDArray[np.int32] = np.zeros(num_seqs + 1, np.int32)
        self._seq_lens: npt.NDArray[np.int32] = np.zeros(num_seqs, np.int32)
        self._block_table: npt.NDArray[np.int32] = np.zeros((num_seqs, self._max_pages), np.int32)

    def _allocate_tokens(self, num_tokens: int) -> None:
        self._input_ids: npt.NDArray[np.int64] = np.zeros(num_tokens, np.int64)
        self._positions: npt.NDArray[np.int64] = np.zeros(num_tokens, np.int64)
        self._slot_mapping: npt.NDArray[np.int64] = np.zeros(num_tokens, np.int64)
