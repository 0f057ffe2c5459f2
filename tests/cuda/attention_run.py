"""One launch of the CUDA attention kernel, emulated, on a named case, with all that it must not read poisoned."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixattn import _C
from mixattn.ops.attention_call import AttentionCall, attention_layout, native_sizes
from mixattn.ops.attention_cuda import INVARIANT_TILE_KEYS
from mixattn.ops.kv_dtypes import split_scale
from mixattn.ops.plan import Hardware, WorkPlan, plan
from tests.cases import AttentionCase, AttentionInputs, make_inputs, plan_arguments, poisoned_out
from tests.cuda.emulation import NUM_SMS, Emulation

BLOCK_ROWS = (128, 64, 16)
"""Of the kernel's tiles: csrc/cuda/sm80/tile.cuh."""
GARBAGE_WORD = 0x7F7F7F7F
"""Fills the plan past its items and merges: as an index it is out of every bound."""


def hardware(num_workers: int, split_tokens: int, separates_small: bool = False) -> Hardware:
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
        separates_small=separates_small,
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
    capability: int = 80

    def launch(
        self,
        emulation: Emulation,
        *,
        seed: int,
        num_blocks: int = NUM_SMS,
        wants_lse: bool = True,
        fault: int = 0,
        recording: Path | None = None,
    ) -> dict[str, Any]:
        """Poisons results and partials, runs the plan, returns the emulator's counts.

        Args:
            recording: where the launch is written to, for replay.cpp.
        """
        for tensor in (self.out, self.lse, self.partial_out, self.partial_lse):
            tensor.fill_(torch.nan)
        lse = self.lse if wants_lse else None
        inputs, call = self.inputs, self.call()
        tensors = {
            **{name: getattr(inputs, name) for name in ("q", "k_cache", "v_cache")},
            "k_scale": call.k_scale,
            "v_scale": call.v_scale,
            **inputs.index_tensors,
            **{name: inputs.score_tensors.get(name) for name in ("alibi_slopes", "sinks", "tree_mask")},
            "out": self.out,
            "lse": lse,
            "plan": self.plan_words,
            "partial_out": self.partial_out,
            "partial_lse": self.partial_lse,
            "tickets": self.tickets,
        }
        image = emulation.image(capability=self.capability, num_sms=num_blocks, seed=seed, fault=fault)
        if recording is not None:
            given = [tensor for tensor in tensors.values() if tensor is not None and tensor.numel() > 0]
            emulation.record(recording, given)
        _C.cuda_attention(
            **native_sizes(attention_layout(call, self.out, lse)),
            **{name: 0 if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()},
            plan_words=len(self.plan_words),
            num_partial_rows=self.partial_out.shape[0],
            num_tickets=len(self.tickets),
            image=image,
            device_plan=self.plan_words.data_ptr(),
            has_small_apart=self.work_plan.hardware.separates_small,
            num_sms=num_blocks,
            stream=0,
        )
        return emulation.counts()

    def call(self) -> AttentionCall:
        """The call of ``mixattn.attention`` that this is."""
        inputs = self.inputs
        missing = dict.fromkeys(name for name in AttentionCall._fields if name not in self.case.options)
        k_scale, k_scale_value = split_scale("k_scale", inputs.k_scale)
        v_scale, v_scale_value = split_scale("v_scale", inputs.v_scale)
        given = {
            "q": inputs.q,
            "k_cache": inputs.k_cache,
            "v_cache": inputs.v_cache,
            **inputs.index_tensors,
            **inputs.score_tensors,
            "k_scale": k_scale,
            "v_scale": v_scale,
            "k_scale_value": k_scale_value,
            "v_scale_value": v_scale_value,
            **self.case.options,
            "invariant": self.invariant,
            "rounds_q": False,
            "sm_margin": 0,
        }
        return AttentionCall(**{**missing, **given})


def prepare(
    case: AttentionCase,
    dtype: torch.dtype,
    *,
    split_tokens: int = 64,
    inputs: AttentionInputs | None = None,
    capability: int = 80,
    invariant: bool = False,
) -> AttentionRun:
    """A run of the case on a GPU of this capability, not yet launched. Cases that name no workers get a plan for 4.

    An invariant one splits at every multiple of the tile's 64 keys.
    """
    inputs = make_inputs(case, dtype) if inputs is None else inputs
    work_plan = plan(
        inputs.cu_seqlens_q,
        inputs.seq_lens,
        **plan_arguments(case, inputs),
        invariant=invariant,
        hardware=replace(
            hardware(case.num_workers or 4, split_tokens, separates_small=capability == 90),
            invariant_split_tokens=INVARIANT_TILE_KEYS,
        ),
    )
    assert work_plan.num_groups > 0 or not case.shared_pages, "the case is to have groups"
    words = torch.full((len(work_plan.buffer),), GARBAGE_WORD, dtype=torch.int32)
    items_begin = _C.PLAN_HEADER_WORDS
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
        out=poisoned_out(inputs),
        lse=torch.empty(inputs.q.shape[:2], dtype=torch.float32),
        partial_out=torch.empty(work_plan.num_partial_rows, case.value_dim),
        partial_lse=torch.empty(work_plan.num_partial_rows),
        tickets=torch.zeros(2 + work_plan.num_merges, dtype=torch.int32),
        invariant=invariant,
        capability=capability,
    )
