"""How well a model knows a text: the numbers that say what a form of its weights loses."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mixattn.executor import kv_pool
from mixattn.models.loader import LoadedModel
from mixattn.ops.metadata import AttentionMetadata
from mixattn.ops.plan import plan

TEXT = Path(__file__).parents[1] / "data" / "tide_mill.txt"
"""Written for this project, so that no model has been trained on it."""
_PAGE_SIZE = 16


def text_logits(loaded: LoadedModel, token_ids: list[int]) -> Tensor:
    """[len(token_ids), vocab_size] float32: the logits after every token, all of them in one step."""
    config, num_tokens = loaded.config, len(token_ids)
    num_pages = -(-num_tokens // _PAGE_SIZE)
    kv = kv_pool.allocate(config, num_pages, _PAGE_SIZE, loaded.dtype, loaded.device)
    cu_seqlens_q = torch.tensor([0, num_tokens], dtype=torch.int32)
    seq_lens = torch.tensor([num_tokens], dtype=torch.int32)
    positions = torch.arange(num_tokens)
    meta = AttentionMetadata(
        cu_seqlens_q=cu_seqlens_q,
        seq_lens=seq_lens,
        block_table=torch.arange(num_pages, dtype=torch.int32)[None],
        slot_mapping=positions,
        positions=positions,
        plans={
            window: plan(
                cu_seqlens_q,
                seq_lens,
                num_q_heads=config.num_q_heads,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                kv_element_bytes=loaded.dtype.itemsize,
                window_left=window,
            )
            for window in set(config.window_left)
        },
    )
    return loaded.model.logits(loaded.model(torch.tensor(token_ids), positions, kv, meta))


def perplexity(logits: Tensor, token_ids: list[int]) -> float:
    """e to the mean negative log probability of every token but the first, given those before it."""
    loss = torch.nn.functional.cross_entropy(logits[:-1].double(), torch.tensor(token_ids[1:]))
    return float(loss.exp())


def greedy_agreement(logits: Tensor, reference: Tensor) -> float:
    """The share of positions at which both prefer the same next token."""
    return float((logits.argmax(-1) == reference.argmax(-1)).double().mean())
