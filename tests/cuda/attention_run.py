"""One launch of the CUDA attention kernel, emulated, on a named case, with all that it must not read poisoned."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mixattn.ops.plan import Hardware, WorkPlan, plan
from tests.cases import AttentionCase, AttentionInputs, make_inputs

BLOCK_ROWS = (128, 64, 16)
"""Of the kernel's tiles: csrc/cuda/sm80/tile.cuh."""
GARBAGE_WORD = 0x7F7F7F7F
"""Fills the plan past its items and merges: as an index it is out of every bound."""
NUM_BLOCKS = 3
"""Resident at once: enough that splits of one row are finished by different blocks, in any order."""
DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def hardware(num_workers: int, split_tokens: int) -> Hardware:
    """Workers that take nothing per item, so that the plan splits whatever balances them."""
    return Hardware(
        name="test",
        num_workers=num_workers,
        flops_per_s=1e12,
        bytes_per_s=1e11,
        item_overhead_s=0.0,
        block_rows=BLOCK_ROWS,
        split_tokens=split_tokens,
        items_per_worker=1,
    )


@dataclass
class AttentionRun:
    """The inputs, plan, workspace and results of a case; ``launch`` may be called again on the same workspace."""

    case: AttentionCase
    inputs: AttentionInputs
    work_plan: WorkPlan
    plan_words: Tensor
    out: Tensor
    lse: Tensor
    partial_out: Tensor
    partial_lse: Tensor
    tickets: Tensor
    invariant: bool = False

    def launch(
        self,
        module: ModuleType,
        *,
        seed: int,
        num_blocks: int = NUM_BLOCKS,
        wants_lse: bool = True,
        fault: int = 0,
    ) -> dict[str, Any]:
        """Poisons results and partials, runs the plan, returns the emulator's counts."""
        for tensor in (self.out, self.lse, self.partial_out, self.partial_lse):
            tensor.fill_(torch.nan)
        written = {
            "out": self.out,
            "lse": self.lse,
            "partial_out": self.partial_out,
            "partial_lse": self.partial_lse,
            "tickets": self.tickets,
        }
        read = {"q": self.inputs.q, "k_cache": self.inputs.k_cache, "v_cache": self.inputs.v_cache}
        tensors = {**read, **written, **self.inputs.index_tensors, "plan": self.plan_words}
        addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        for name in ("alibi_slopes", "sinks", "tree_mask"):
            option = self.inputs.score_tensors.get(name)
            addresses[name] = 0 if option is None else option.data_ptr()
        if not wants_lse:
            addresses["lse"] = 0
        regions = {name: (addresses[name], span_bytes(tensor)) for name, tensor in {**read, **written}.items()}
        counts: dict[str, Any] = module.attention(addresses, self.sizes(), regions, num_blocks, seed, fault)
        return counts

    def sizes(self) -> dict[str, Any]:
        """The arguments of ``_C.attention`` that are not addresses."""
        q, k_cache, v_cache = self.inputs.q, self.inputs.k_cache, self.inputs.v_cache
        case = self.case
        return {
            "dtype": DTYPE_NAMES[q.dtype],
            "total_q": q.shape[0],
            "num_seqs": len(self.inputs.seq_lens),
            "num_q_heads": q.shape[1],
            "num_kv_heads": k_cache.shape[2],
            "head_dim": q.shape[2],
            "num_pages": k_cache.shape[0],
            "page_size": k_cache.shape[1],
            "max_pages": self.inputs.block_table.shape[1],
            "plan_words": len(self.plan_words),
            "num_partial_rows": self.partial_out.shape[0],
            "num_tickets": len(self.tickets),
            "q_strides": q.stride()[:2],
            "out_strides": self.out.stride()[:2],
            "k_strides": k_cache.stride()[:3],
            "v_strides": v_cache.stride()[:3],
            "lse_stride": self.lse.stride(0),
            "block_table_stride": self.inputs.block_table.stride(0),
            "softmax_scale": case.head_dim**-0.5 if case.softmax_scale is None else case.softmax_scale,
            "causal": case.causal,
            "window_left": -1 if case.window_left is None else case.window_left,
            "soft_cap": 0.0 if case.soft_cap is None else case.soft_cap,
            "invariant": self.invariant,
        }


def span_bytes(tensor: Tensor) -> int:
    """From the first to behind the last element, gaps included."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def prepare(
    case: AttentionCase, dtype: torch.dtype, *, split_tokens: int = 64, inputs: AttentionInputs | None = None
) -> AttentionRun:
    """A run of the case, not yet launched. Cases that name no workers get a plan for 4."""
    inputs = make_inputs(case, dtype) if inputs is None else inputs
    work_plan = plan(
        inputs.cu_seqlens_q,
        inputs.seq_lens,
        **case.plan_options,
        kv_element_bytes=inputs.q.element_size(),
        hardware=hardware(case.num_workers or 4, split_tokens),
    )
    words = torch.full((len(work_plan.buffer),), GARBAGE_WORD, dtype=torch.int32)
    items_begin = len(work_plan.buffer) - 8 * (work_plan.capacity_items + work_plan.spec.max_merges())
    merges_begin = items_begin + 8 * work_plan.capacity_items
    for begin, end in (
        (0, items_begin + 8 * work_plan.num_items),
        (merges_begin, merges_begin + 8 * work_plan.num_merges),
    ):
        words[begin:end] = torch.from_numpy(work_plan.buffer[begin:end])
    return AttentionRun(
        case=case,
        inputs=inputs,
        work_plan=work_plan,
        plan_words=words,
        out=torch.empty_like(inputs.q),
        lse=torch.empty(inputs.q.shape[:2], dtype=torch.float32),
        partial_out=torch.empty(work_plan.num_partial_rows, case.head_dim),
        partial_lse=torch.empty(work_plan.num_partial_rows),
        tickets=torch.zeros(1 + work_plan.num_merges, dtype=torch.int32),
    )
