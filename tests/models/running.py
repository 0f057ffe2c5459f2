"""Our models over a paged cache, the way an executor runs them: chunks of several sequences in one step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from mixattn.executor.kv_pool import allocate
from mixattn.models.llama import LlamaModel
from mixattn.ops.metadata import AttentionMetadata
from mixattn.ops.plan import plan


class PagedRun:
    """Sequences that grow step by step; the pages lie shuffled, and hold NaN until they are written."""

    def __init__(
        self, model: LlamaModel, num_seqs: int, max_len: int, *, page_size: int = 4, dtype: torch.dtype = torch.float32
    ) -> None:
        self.model = model
        self.page_size = page_size
        self.dtype = dtype
        pages_per_seq = -(-max_len // page_size)
        order = torch.randperm(num_seqs * pages_per_seq, generator=torch.Generator().manual_seed(0))
        self.block_table = order.view(num_seqs, pages_per_seq).int()
        self.kv = allocate(model.config, num_seqs * pages_per_seq, page_size, dtype, torch.device("cpu"))
        for layer in self.kv:
            for tensor in layer:
                if tensor is not None and tensor.is_floating_point():
                    tensor.fill_(torch.nan)  # of integers the scales
        self.lens = [0] * num_seqs

    def step(self, chunks: Sequence[Sequence[int]]) -> list[Tensor]:
        """The logits of every row of each sequence's next tokens (an empty chunk sits the step out)."""
        config = self.model.config
        seq_idx = [idx for idx, chunk in enumerate(chunks) if chunk]
        positions, slots, cu_seqlens = [], [], [0]
        for idx in seq_idx:
            begin, end = self.lens[idx], self.lens[idx] + len(chunks[idx])
            for position in range(begin, end):
                page = int(self.block_table[idx, position // self.page_size])
                positions.append(position)
                slots.append(page * self.page_size + position % self.page_size)
            self.lens[idx] = end
            cu_seqlens.append(len(positions))
        cu_seqlens_q = torch.tensor(cu_seqlens, dtype=torch.int32)
        seq_lens = torch.tensor([self.lens[idx] for idx in seq_idx], dtype=torch.int32)
        meta = AttentionMetadata(
            cu_seqlens_q=cu_seqlens_q,
            seq_lens=seq_lens,
            block_table=self.block_table[seq_idx],
            slot_mapping=torch.tensor(slots),
            positions=torch.tensor(positions),
            plans={
                window: plan(
                    cu_seqlens_q,
                    seq_lens,
                    num_q_heads=config.num_q_heads,
                    num_kv_heads=config.num_kv_heads,
                    head_dim=config.head_dim,
                    kv_element_bytes=self.dtype.itemsize,
                    window_left=window,
                )
                for window in set(config.window_left)
            },
        )
        input_ids = torch.tensor([token for idx in seq_idx for token in chunks[idx]])
        logits = self.model.logits(self.model(input_ids, torch.tensor(positions), self.kv, meta))
        rows = iter(logits.split([len(chunks[idx]) for idx in seq_idx]))
        return [next(rows) if chunk else logits.new_empty(0, logits.shape[1]) for chunk in chunks]


def logits_in_steps(model: LlamaModel, sequences: Sequence[Sequence[int]], cuts: Sequence[int]) -> list[Tensor]:
    """The logits of whole sequences, run together in steps that end where ``cuts`` say, the last at the end."""
    run = PagedRun(model, len(sequences), max(map(len, sequences)))
    parts: list[list[Tensor]] = [[] for _ in sequences]
    ends = [0, *cuts, max(map(len, sequences))]
    for begin, end in pairwise(ends):
        for idx, rows in enumerate(run.step([sequence[begin:end] for sequence in sequences])):
            parts[idx].append(rows)
    return [torch.cat(rows) for rows in parts]
