# merge_states.py: attention over the union of disjoint key sets, from the result over each.
# Math    lse = log sum_i exp(lse_i); out = sum_i exp(lse_i - lse) out_i
# Method  one program per token and block of heads; online over the states in order, as mixed_attention merges splits
# Grid    (total_q, blocks of heads), 4 warps; 8 heads of 128 dimensions are 16 bytes a thread
# Shapes  outs [num_states, total_q, num_heads, head_dim] bf16, fp16 or fp32, lses [num_states, total_q, num_heads] fp32
# Memory  reads every state once, skipping the empty ones, and writes the result once; no shared memory
# Limits  any head_dim and strides, the last dimension contiguous
# Twins   csrc/cpu/merge-inl.h, csrc/cuda/merge_states.cuh; truth ops/reference.py (merge_states_reference)
# Source  merge of online-softmax states, arXiv:1805.02867
"""Merging attention over disjoint key sets; ``merge_states`` on GPUs."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixattn.triton_kernels._launch import launch
from mixattn.triton_kernels._numeric import narrow, widen
from mixattn.triton_kernels._softmax import LN_2, absorb_state, finish_rows

MAX_BLOCK_HEADS = 8


@triton.jit
def merge_states_kernel(
    outs,
    lses,
    out,
    lse,
    stride_outs_state,
    stride_outs_token,
    stride_outs_head,
    stride_lses_state,
    stride_lses_token,
    stride_out_token,
    stride_out_head,
    stride_lse_token,
    num_states,
    num_heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    """One token, one block of heads, over all states in order."""
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)).to(tl.int64)
    is_head = head < num_heads
    dim = tl.arange(0, BLOCK_D)
    is_dim = (dim < HEAD_DIM)[None, :]
    accumulator = tl.zeros([BLOCK_HEADS, BLOCK_D], tl.float32)
    row_max = tl.full([BLOCK_HEADS], -float("inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_HEADS], tl.float32)
    lse_rows = lses + token * stride_lses_token
    out_rows = outs + (token * stride_outs_token + head * stride_outs_head)[:, None]
    for _ in range(num_states):
        state_lse = tl.load(lse_rows + head, mask=is_head, other=-float("inf"))
        # The out of an empty state may be anything, NaN included: it is not read.
        is_value = (state_lse != -float("inf"))[:, None] & is_dim
        state_out = widen(tl.load(out_rows + dim[None, :], mask=is_value, other=0.0))  # (BLOCK_HEADS, BLOCK_D)
        accumulator, row_max, row_sum = absorb_state(accumulator, row_max, row_sum, state_out, state_lse / LN_2)
        lse_rows += stride_lses_state  # pointers and not offsets are stepped: no product passes 2^31
        out_rows += stride_outs_state
    result, lse_log2 = finish_rows(accumulator, row_max, row_sum)
    to_rows = out + (token * stride_out_token + head * stride_out_head)[:, None]
    tl.store(to_rows + dim[None, :], narrow(result, out.dtype.element_ty), mask=is_head[:, None] & is_dim)
    tl.store(lse + token * stride_lse_token + head, lse_log2 * LN_2, mask=is_head)


def merge_states(outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor) -> None:
    """Writes attention over the union of disjoint key sets to out and lse; in one launch.

    Args: as for ``ops.merge_states``, checked there; all tensors on one device (the CPU under the interpreter).
        out: [total_q, num_heads, head_dim] in the dtype of outs; lse: [total_q, num_heads] float32; written.
    """
    num_states, total_q, num_heads, head_dim = outs.shape
    if total_q == 0:
        return
    block_heads = min(triton.next_power_of_2(num_heads), MAX_BLOCK_HEADS)
    with torch.cuda.device(outs.device) if outs.is_cuda else contextlib.nullcontext():
        launch(merge_states_kernel, (total_q, triton.cdiv(num_heads, block_heads)))(
            outs,
            lses,
            out,
            lse,
            *outs.stride()[:3],
            *lses.stride()[:2],
            *out.stride()[:2],
            lse.stride(0),
            num_states,
            num_heads,
            HEAD_DIM=head_dim,
            BLOCK_D=triton.next_power_of_2(head_dim),
            BLOCK_HEADS=block_heads,
            num_warps=4,
        )
