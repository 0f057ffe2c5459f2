"""One launch of the Triton attention kernel on a named case, with everything that it must not read poisoned."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from mixattn.ops.kv_dtypes import kv_format
from mixattn.ops.plan import Hardware, WorkPlan, plan
from mixattn.triton_kernels.mixed_attention import mixed_attention
from mixattn.triton_kernels.tiles import PLAN_BLOCK_ROWS
from tests.cases import AttentionCase, AttentionInputs, KvFormat, make_inputs, plan_arguments, poisoned_out

GARBAGE_WORD = 0x7F7F7F7F
"""Fills the plan past its items and merges: as an index it is out of every bound."""


def hardware(num_workers: int, split_tokens: int) -> Hardware:
    """Workers that take nothing per item, so that the plan splits whatever balances them."""
    return Hardware(
        name="test",
        num_workers=num_workers,
        flops_per_s=1e12,
        bytes_per_s=1e11,
        item_overhead_s=0.0,
        block_rows=PLAN_BLOCK_ROWS,
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

    def launch(self, *, num_programs: int | None = None, wants_lse: bool = True) -> None:
        """Poisons results and partials, and runs the plan."""
        for tensor in (self.out, self.lse, self.partial_out, self.partial_lse):
            tensor.fill_(torch.nan)
        inputs, options = self.inputs, self.case.options
        if options["softmax_scale"] is None:
            options["softmax_scale"] = self.case.head_dim**-0.5
        mixed_attention(
            inputs.q,
            inputs.k_cache,
            inputs.v_cache,
            inputs.cu_seqlens_q,
            inputs.seq_lens,
            inputs.block_table,
            self.plan_words,
            self.out,
            self.lse if wants_lse else None,
            self.partial_out,
            self.partial_lse,
            self.tickets,
            **options,
            **inputs.score_tensors,
            **inputs.scales,
            kv_format=kv_format(inputs.k_cache.dtype),
            invariant=self.invariant,
            num_programs=num_programs,
        )


def prepare(
    case: AttentionCase,
    dtype: torch.dtype,
    device: torch.device,
    *,
    split_tokens: int = 64,
    kv: KvFormat | None = None,
    inputs: AttentionInputs | None = None,
    invariant: bool = False,
) -> AttentionRun:
    """A run of the case, not yet launched. Cases that name no workers get a plan for 4.

    Args:
        split_tokens: where splits start and end; those of an invariant run at multiples of 128.
        kv: what K and V are stored as; None is ``dtype``.
    """
    inputs = make_inputs(case, dtype, kv=kv) if inputs is None else inputs
    work_plan = plan(
        inputs.cu_seqlens_q,
        inputs.seq_lens,
        **plan_arguments(case, inputs),
        invariant=invariant,
        hardware=dataclasses.replace(hardware(case.num_workers or 4, split_tokens), invariant_split_tokens=128),
    )
    assert work_plan.num_groups > 0 or not case.shared_pages or invariant, "the case is to have groups"
    words = torch.full((len(work_plan.buffer),), GARBAGE_WORD, dtype=torch.int32)
    items_begin = 16
    merges_begin = items_begin + 8 * work_plan.capacity_items
    words[:items_begin] = torch.from_numpy(work_plan.buffer[:items_begin])
    for begin, end in (
        (items_begin, items_begin + 8 * work_plan.num_items),
        (merges_begin, merges_begin + 8 * work_plan.num_merges),
    ):
        words[begin:end] = torch.from_numpy(work_plan.buffer[begin:end])
    return AttentionRun(
        case=case,
        inputs=inputs.to(device),
        work_plan=work_plan,
        plan_words=words.to(device),
        out=poisoned_out(inputs).to(device),
        lse=torch.empty(inputs.q.shape[:2], dtype=torch.float32, device=device),
        partial_out=torch.empty(work_plan.num_partial_rows, case.value_dim, device=device),
        partial_lse=torch.empty(work_plan.num_partial_rows, device=device),
        tickets=torch.zeros(1 + work_plan.num_merges, dtype=torch.int32, device=device),
        invariant=invariant,
    )
