"""Tensors of one address each that hold one batch after the other, as those that a captured graph reads."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

import mixattn
from mixattn.ops.plan import Hardware
from tests.cases import UNUSED_BLOCK_ID, AttentionCase, AttentionInputs, assert_attention_close

SHAPE: dict[str, Any] = {"num_q_heads": 6, "num_kv_heads": 2, "head_dim": 64, "page_size": 16}
BATCHES = [
    AttentionCase("chunk-beside-decodes", (1, 40, 9), (300, 90, 200), **SHAPE),
    AttentionCase("chunks", (20, 1, 29), (20, 250, 29), **SHAPE),
    AttentionCase("fewer-slices-and-rows", (1, 2), (190, 64), **SHAPE),
    AttentionCase("decodes", (1, 1, 1, 1), (10, 300, 1, 150), **SHAPE),
]
MAX_NUM_SEQS, MAX_TOTAL_Q, MAX_KV_LEN = 4, 50, 300
GARBAGE_WORD = 0x7F7F7F7F


def device_plan(hardware: Hardware, **options: Any) -> mixattn.DevicePlan:
    """A plan for any of BATCHES, whose memory holds what is no plan, no result and no number."""
    shape = {name: value for name, value in SHAPE.items() if name != "page_size"}
    sizes = {"max_num_seqs": MAX_NUM_SEQS, "max_total_q": MAX_TOTAL_Q, "max_kv_len": MAX_KV_LEN, "device": "cpu"}
    plan = mixattn.DevicePlan(**{**sizes, **shape, "hardware": hardware, **options})
    plan.workspace.partial_out.fill_(torch.nan)
    plan.workspace.partial_lse.fill_(torch.nan)
    return plan


class DeviceBatch:
    """The arguments and results of two layers, each with room for any of BATCHES; the second has K and V swapped."""

    def __init__(self, dtype: torch.dtype) -> None:
        num_pages = 2 * MAX_NUM_SEQS * -(-MAX_KV_LEN // SHAPE["page_size"])
        pool = (num_pages, SHAPE["page_size"], SHAPE["num_kv_heads"], SHAPE["head_dim"])
        rows = (MAX_TOTAL_Q, SHAPE["num_q_heads"], SHAPE["head_dim"])
        self.q = torch.empty(rows, dtype=dtype)
        self.caches = (torch.empty(pool, dtype=dtype), torch.empty(pool, dtype=dtype))
        self.outs = [torch.empty(rows, dtype=dtype) for _ in range(2)]
        self.lse = torch.empty(rows[:2])
        self.lens = {
            "cu_seqlens_q": torch.empty(MAX_NUM_SEQS + 1, dtype=torch.int32),
            "seq_lens": torch.empty(MAX_NUM_SEQS, dtype=torch.int32),
            "block_table": torch.empty(MAX_NUM_SEQS, MAX_KV_LEN // SHAPE["page_size"] + 2, dtype=torch.int32),
        }
        self.forget()

    def forget(self) -> None:
        """Fills all of it with what must not be read."""
        for tensor in (self.q, *self.caches, *self.outs, self.lse):
            tensor.fill_(torch.nan)
        for tensor in self.lens.values():
            tensor.fill_(GARBAGE_WORD)

    def load(self, inputs: AttentionInputs) -> None:
        """A batch, and slices of no rows and no keys behind it; results are poisoned."""
        self.forget()
        num_seqs, total_q = len(inputs.seq_lens), len(inputs.q)
        self.q[:total_q] = inputs.q
        for cache, given in zip(self.caches, (inputs.k_cache, inputs.v_cache), strict=True):
            cache[: len(given)] = given
        self.lens["cu_seqlens_q"].fill_(total_q)[: num_seqs + 1] = inputs.cu_seqlens_q
        self.lens["seq_lens"].fill_(0)[:num_seqs] = inputs.seq_lens
        table = self.lens["block_table"].fill_(UNUSED_BLOCK_ID)
        table[:num_seqs, : inputs.block_table.shape[1]] = inputs.block_table

    def update(self, plan: mixattn.DevicePlan) -> None:
        """Puts the planner of this batch on the stream."""
        lens = self.lens if plan.terms.page_size else {**self.lens, "block_table": None}
        plan.update(**lens)

    def attend(self, plan: mixattn.DevicePlan, **options: Any) -> None:
        """Both layers: the first into ``out`` and new memory for lse, the second, without lse, into new memory."""
        k_cache, v_cache = self.caches
        _, self.lse = mixattn.attention(
            self.q, k_cache, v_cache, **self.lens, plan=plan, out=self.outs[0], return_lse=True, **options
        )
        self.outs[1] = mixattn.attention(self.q, v_cache, k_cache, **self.lens, plan=plan, **options)

    def check(self, case: AttentionCase, inputs: AttentionInputs) -> None:
        """Results of both layers are right, and rows behind the batch are as they were."""
        swapped = dataclasses.replace(inputs, k_cache=inputs.v_cache, v_cache=inputs.k_cache)
        assert_attention_close(case, inputs, self.outs[0][: case.total_q], self.lse[: case.total_q])
        assert_attention_close(case, swapped, self.outs[1][: case.total_q], None)
        for results in (*self.outs, self.lse):
            assert results[case.total_q :].isnan().all(), "a row behind the last slice is written"
