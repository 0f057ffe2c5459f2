"""The named batches of tests/cases.py as other libraries take them."""

from __future__ import annotations

import torch
from torch import Tensor

from mixattn.ops.reference import gather_keys
from tests.cases import CASES, AttentionCase, AttentionInputs

BY_ID = {case.id: case for case in CASES}
NAMES = [
    "chunk-beside-decodes",
    "q1-kv6,7,8-page7-gqa2",
    "empty-slices-between",
    "q-without-keys",
    "q20-kv6-longer-than-keys",
    "window-chunk-beside-decodes",
    "soft-cap",
    "non-causal",
    "non-causal-window",
    "scale-and-peaked-scores",
    "head-dim-96",
]
"""Chunks and decodes, rows without keys, and every option that all the libraries have."""


def ragged_kv(case: AttentionCase, inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor]:
    """k, v [total_k, num_kv_heads, head_dim] out of their pages, and cu_seqlens_k. Slots that no row sees hold NaN."""
    k, v = (
        torch.cat(
            [inputs.q.new_empty(0, *cache.shape[2:])]
            + [gather_keys(cache, row, n) for row, n in zip(inputs.block_table, case.kv_lens, strict=True)]
        )
        for cache in (inputs.k_cache, inputs.v_cache)
    )
    return k, v, torch.tensor([0, *case.kv_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def window_size(case: AttentionCase) -> tuple[int, int]:
    """FlashAttention's."""
    return (-1 if case.window_left is None else case.window_left, -1)


def csr_table(case: AttentionCase, inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor]:
    """FlashInfer's indptr, indices and last_page_len (0 for a sequence without keys)."""
    counts = [-(-kv_len // case.page_size) for kv_len in case.kv_lens]
    indptr = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    indices = torch.cat([row[:count] for row, count in zip(inputs.block_table, counts, strict=True)])
    lasts = [kv_len - max(count - 1, 0) * case.page_size for kv_len, count in zip(case.kv_lens, counts, strict=True)]
    return indptr, indices, torch.tensor(lasts, dtype=torch.int32)
