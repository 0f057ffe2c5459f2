"""One call of attention: its arguments, what they must be, and the plan they come with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixattn import _C
from mixattn.ops.checks import (
    Dims,
    check_device,
    check_dtype,
    check_float_dtype,
    check_head_dim,
    check_index_tensor,
    check_last_contiguous,
    check_no_grad,
    check_positive_finite,
    check_same_float_dtype,
)


class AttentionCall(NamedTuple):
    """The arguments of ``mixattn::attention``, in the order of its schema."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    cu_seqlens_q: Tensor
    seq_lens: Tensor
    block_table: Tensor
    plan: Tensor | None
    softmax_scale: float | None
    causal: bool
    window_left: int | None
    soft_cap: float | None
    backend: str | None


class PlanHeader(NamedTuple):
    """struct PlanHeader of work_item.h."""

    magic: int
    num_items: int
    num_merges: int
    num_partial_rows: int
    num_seqs: int
    total_q: int
    capacity_items: int
    capacity_merges: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    causal: int
    window_left: int
    num_workers: int
    reserved0: int
    reserved1: int


def check_call(call: AttentionCall, out: Tensor | None, lse: Tensor | None) -> None:
    """Raises unless shapes, dtypes, devices, strides and options are as ``attention`` asks; reads no tensor."""
    q = call.q
    device = q.device
    caches = (("k_cache", call.k_cache), ("v_cache", call.v_cache))
    dims = Dims()
    dims.check("q", q, ("total_q", "num_q_heads", "head_dim"))
    for name, cache in caches:
        dims.check(name, cache, ("num_pages", "page_size", "num_kv_heads", "head_dim"))
    dims.check("seq_lens", call.seq_lens, ("num_seqs",))
    dims.check("block_table", call.block_table, ("num_seqs", "max_pages"))
    dims.check("cu_seqlens_q", call.cu_seqlens_q, ("num_seqs + 1",))
    if dims["num_seqs + 1"] != dims["num_seqs"] + 1:
        raise ValueError(
            f"cu_seqlens_q must be [num_seqs + 1] = [{dims['num_seqs'] + 1}], got shape [{dims['num_seqs + 1']}]"
        )
    num_q_heads, num_kv_heads = dims["num_q_heads"], dims["num_kv_heads"]
    if num_kv_heads < 1 or num_q_heads < 1 or num_q_heads % num_kv_heads != 0:
        raise ValueError(
            f"num_q_heads must be a multiple of num_kv_heads ({num_kv_heads}), both >= 1, got {num_q_heads}"
        )
    check_head_dim(dims["head_dim"])
    if dims["page_size"] < 1:
        raise ValueError(f"page_size must be >= 1, got {dims['page_size']}")

    check_float_dtype("q", q)
    check_last_contiguous("q", q)
    for name, cache in caches:
        check_device(name, cache, "q", device)
        check_same_float_dtype(name, cache, "q", q.dtype)
        check_last_contiguous(name, cache)
    for name in ("cu_seqlens_q", "seq_lens", "block_table"):
        check_index_tensor(name, getattr(call, name), torch.int32, "q", device)
    check_no_grad(q, call.k_cache, call.v_cache)

    if call.softmax_scale is not None:
        check_positive_finite("softmax_scale", call.softmax_scale)
    if call.soft_cap is not None:
        check_positive_finite("soft_cap", call.soft_cap)
    if call.window_left is not None and call.window_left < 0:
        raise ValueError(f"window_left must be >= 0 or None, got {call.window_left}")
    plan = call.plan
    if plan is not None and (plan.dim() != 1 or plan.dtype != torch.int32 or plan.device.type != "cpu"):
        raise ValueError(
            f"plan must be a WorkPlan or its words, 1-dimensional int32 on the CPU, got {list(plan.shape)} "
            f"{plan.dtype} on {plan.device}"
        )
    for name, result, names, dtype in (
        ("out", out, ("total_q", "num_q_heads", "head_dim"), q.dtype),
        ("lse", lse, ("total_q", "num_q_heads"), torch.float32),
    ):
        if result is not None:
            dims.check(name, result, names)
            check_dtype(name, result, dtype)
            check_device(name, result, "q", device)
            check_last_contiguous(name, result)


def check_plan(plan: Tensor, call: AttentionCall) -> PlanHeader:
    """The header of the plan's words; raises ValueError unless they were made for a call of this shape."""
    num_words = plan.shape[0]
    if num_words < _C.PLAN_HEADER_WORDS:
        raise ValueError(f"plan must have at least {_C.PLAN_HEADER_WORDS} words, got {num_words} words")
    header = PlanHeader._make(plan[: _C.PLAN_HEADER_WORDS].tolist())
    if header.magic != _C.PLAN_MAGIC:
        raise ValueError(f"plan was not written by mixattn.plan of this version: its first word is {header.magic:#x}")
    expected_words = (
        _C.PLAN_HEADER_WORDS + header.capacity_items * _C.WORK_ITEM_WORDS + header.capacity_merges * _C.MERGE_WORDS
    )
    if num_words != expected_words:
        raise ValueError(f"plan must have the {expected_words} words that its header tells, got {num_words} words")
    for name, made_for, called_with in (
        ("num_seqs", header.num_seqs, call.seq_lens.shape[0]),
        ("total_q", header.total_q, call.q.shape[0]),
        ("num_q_heads", header.num_q_heads, call.q.shape[1]),
        ("num_kv_heads", header.num_kv_heads, call.k_cache.shape[2]),
        ("head_dim", header.head_dim, call.q.shape[2]),
        ("causal", bool(header.causal), call.causal),
        ("window_left", None if header.window_left < 0 else header.window_left, call.window_left),
    ):
        if made_for != called_with:
            raise ValueError(f"plan was made for {name} {made_for}, this call has {called_with}")
    return header
