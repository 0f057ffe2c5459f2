"""One call of attention: its arguments, what they must be, and the plan they come with."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from mixattn import _C
from mixattn.ops.checks import (
    Dims,
    Layout,
    check_device,
    check_dtype,
    check_float_dtype,
    check_head_dim,
    check_index_layout,
    check_last_contiguous,
    check_no_overlap,
    check_positive_finite,
    layout_of,
    optional_layout,
)
from mixattn.ops.kv_dtypes import (
    ScaleLayout,
    check_caches,
    check_kv_dtype_backend,
    check_scales,
    kv_dtype_name,
    scale_sizes,
    v_head_dim,
)
from mixattn.ops.library import DTYPE_NAMES


class Workspace(NamedTuple):
    """What a launch on a GPU writes on its way to out and lse."""

    partial_out: Tensor
    """[at least the plan's num_partial_rows, v_head_dim] float32, contiguous."""
    partial_lse: Tensor
    """[at least the plan's num_partial_rows] float32."""
    tickets: Tensor
    """[at least 2 + the plan's num_merges] int32, zeros between launches."""


def new_workspace(num_partial_rows: int, num_merges: int, v_head_dim: int, device: torch.device) -> Workspace:
    """A workspace for plans that need no more than this."""
    return Workspace(
        torch.empty((num_partial_rows, v_head_dim), dtype=torch.float32, device=device),
        torch.empty(num_partial_rows, dtype=torch.float32, device=device),
        torch.zeros(num_merges + 2, dtype=torch.int32, device=device),
    )


class DevicePlanTerms(NamedTuple):
    """What all plans of a ``DevicePlan`` are made for, known without a look at them; ints in the op's schema."""

    max_num_seqs: int
    max_total_q: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    kv_element_bytes: int
    causal: int
    window_left: int
    """-1: no window."""
    fixed_split_tokens: int
    """0: not invariant."""
    large_rows: int
    medium_rows: int
    small_rows: int
    separates_small: int
    page_size: int
    """Of the block table that slices are grouped by; 0: none are."""
    max_groups: int


class AttentionCall(NamedTuple):
    """The arguments of ``mixattn::attention``, in the order of its schema, and what a ``DevicePlan`` has besides."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    cu_seqlens_q: Tensor
    seq_lens: Tensor
    block_table: Tensor
    plan: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    tree_mask: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None
    k_scale_value: float | None
    v_scale_value: float | None
    softmax_scale: float | None
    causal: bool
    window_left: int | None
    soft_cap: float | None
    invariant: bool
    rounds_q: bool
    sm_margin: int
    backend: str | None
    workspace: Workspace | None = None
    device_plan: DevicePlanTerms | None = None


BACKENDS_WITH = {
    "alibi_slopes": ("cpu", "triton", "cuda", "reference"),
    "sinks": ("cpu", "triton", "cuda", "reference"),
    "tree_mask": ("cpu", "triton", "cuda", "reference"),
    "invariant": ("cpu", "triton", "cuda"),
}
"""The arguments that not every backend has, and the backends that have them."""


class AttentionLayout(NamedTuple):
    """What a call is apart from addresses and contents; equal for all layers of a step, as a rule."""

    q: Layout
    k_cache: Layout
    v_cache: Layout
    cu_seqlens_q: Layout
    seq_lens: Layout
    block_table: Layout
    plan: Layout | None
    alibi_slopes: Layout | None
    sinks: Layout | None
    tree_mask: Layout | None
    k_scale: ScaleLayout
    v_scale: ScaleLayout
    out: Layout | None
    lse: Layout | None
    softmax_scale: float | None
    causal: bool
    window_left: int | None
    soft_cap: float | None
    invariant: bool
    rounds_q: bool
    sm_margin: int
    device_plan: DevicePlanTerms | None


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
    num_groups: int
    fixed_split_tokens: int
    first_small: int


def attention_layout(call: AttentionCall, out: Tensor | None, lse: Tensor | None) -> AttentionLayout:
    """The layout of a call that writes ``out`` and ``lse``; None where the op makes or leaves out the tensor."""
    return AttentionLayout(
        layout_of(call.q),
        layout_of(call.k_cache),
        layout_of(call.v_cache),
        layout_of(call.cu_seqlens_q),
        layout_of(call.seq_lens),
        layout_of(call.block_table),
        optional_layout(call.plan),
        optional_layout(call.alibi_slopes),
        optional_layout(call.sinks),
        optional_layout(call.tree_mask),
        ScaleLayout(optional_layout(call.k_scale), call.k_scale_value),
        ScaleLayout(optional_layout(call.v_scale), call.v_scale_value),
        optional_layout(out),
        optional_layout(lse),
        call.softmax_scale,
        call.causal,
        call.window_left,
        call.soft_cap,
        call.invariant,
        call.rounds_q,
        call.sm_margin,
        call.device_plan,
    )


def check_attention(layout: AttentionLayout) -> None:
    """Raises unless shapes, dtypes, devices, strides and options are as ``attention`` asks."""
    q = layout.q
    dims = Dims()
    dims.check("q", q, ("total_q", "num_q_heads", "head_dim"))
    check_caches(dims, layout.k_cache, layout.v_cache, "q", q)
    dims.check("seq_lens", layout.seq_lens, ("num_seqs",))
    dims.check("block_table", layout.block_table, ("num_seqs", "max_pages"))
    dims.check("cu_seqlens_q", layout.cu_seqlens_q, ("num_seqs + 1",))
    if dims["num_seqs + 1"] != dims["num_seqs"] + 1:
        raise ValueError(
            f"cu_seqlens_q must be [num_seqs + 1] = [{dims['num_seqs'] + 1}], got shape [{dims['num_seqs + 1']}]"
        )
    num_q_heads, num_kv_heads = dims["num_q_heads"], dims["num_kv_heads"]
    if num_kv_heads < 1 or num_q_heads < 1 or num_q_heads % num_kv_heads != 0:
        raise ValueError(
            f"num_q_heads must be a multiple of num_kv_heads ({num_kv_heads}), both >= 1, got {num_q_heads}"
        )
    check_head_dim("head_dim", dims["head_dim"])
    check_head_dim("v_head_dim", dims["v_head_dim"])
    check_float_dtype("q", q)
    check_last_contiguous("q", q)
    check_scales(dims, layout.k_scale, layout.v_scale, layout.k_cache)
    check_index_layout("cu_seqlens_q", layout.cu_seqlens_q, torch.int32, "q", q)
    check_index_layout("seq_lens", layout.seq_lens, torch.int32, "q", q)
    check_index_layout("block_table", layout.block_table, torch.int32, "q", q)
    if layout.softmax_scale is not None:
        check_positive_finite("softmax_scale", layout.softmax_scale)
    if layout.soft_cap is not None:
        check_positive_finite("soft_cap", layout.soft_cap)
    if layout.window_left is not None and layout.window_left < 0:
        raise ValueError(f"window_left must be >= 0 or None, got {layout.window_left}")
    if layout.sm_margin < 0:
        raise ValueError(f"sm_margin must be >= 0, got {layout.sm_margin}")
    _check_score_options(layout, dims)
    plan = layout.plan
    if layout.device_plan is not None:
        assert plan is not None
        check_device("plan", plan, "q", q)
        _check_terms(layout.device_plan, layout)
    elif plan is not None and (
        len(plan.shape) != 1 or plan.dtype != torch.int32 or plan.device.type != "cpu" or plan.strides != (1,)
    ):
        raise ValueError(
            "plan must be a WorkPlan or its words, 1-dimensional contiguous int32 on the CPU, or a DevicePlan, got "
            f"{list(plan.shape)} {plan.dtype} on {plan.device}"
        )
    if layout.out is not None:
        dims.check("out", layout.out, ("total_q", "num_q_heads", "v_head_dim"))
        check_dtype("out", layout.out, q.dtype)
        check_device("out", layout.out, "q", q)
        check_last_contiguous("out", layout.out)
        check_no_overlap("out", layout.out)
    if layout.lse is not None:
        dims.check("lse", layout.lse, ("total_q", "num_q_heads"))
        check_dtype("lse", layout.lse, torch.float32)
        check_device("lse", layout.lse, "q", q)
        check_last_contiguous("lse", layout.lse)
        check_no_overlap("lse", layout.lse)


def _check_terms(terms: DevicePlanTerms, layout: AttentionLayout) -> None:
    """Raises unless the plans of a device are made for a call of this layout, as far as that can be told from here."""
    num_seqs, (total_q, num_q_heads, head_dim) = layout.seq_lens.shape[0], layout.q.shape
    for name, most, size in (
        ("num_seqs", terms.max_num_seqs, num_seqs),
        ("total_q", terms.max_total_q, total_q),
    ):
        if size > most:
            raise ValueError(f"plan was made for max_{name} {most}, this call has {name} {size}")
    page_size, num_kv_heads = layout.k_cache.shape[1:3]
    _check_made_for(
        ("num_q_heads", terms.num_q_heads, num_q_heads),
        ("num_kv_heads", terms.num_kv_heads, num_kv_heads),
        ("head_dim", terms.head_dim, head_dim),
        ("v_head_dim", terms.v_head_dim, v_head_dim(layout.v_cache)),
        ("kv_element_bytes", terms.kv_element_bytes, layout.k_cache.dtype.itemsize),
        ("causal", bool(terms.causal), layout.causal),
        ("window_left", None if terms.window_left < 0 else terms.window_left, layout.window_left),
        ("invariant", terms.fixed_split_tokens > 0, layout.invariant),
        ("page_size", terms.page_size or page_size, page_size),
    )
    if terms.max_groups > 0 and layout.alibi_slopes is not None:
        _refuse_alibi_slopes()


def _check_made_for(*terms: tuple[str, object, object]) -> None:
    """Raises ValueError unless what the plan was made for is what the call has; (name, made for, called with) each."""
    for name, made, called in terms:
        if made != called:
            raise ValueError(f"plan was made for {name} {made}, this call has {called}")


def _refuse_alibi_slopes() -> NoReturn:
    """Distances are those of one slice: a key of a shared prefix is at another from each row of the group."""
    raise NotImplementedError(
        "alibi_slopes is not supported with a plan in which slices share a prefix; the nearest is a plan made "
        "without the block_table of mixattn.plan or the page_size of mixattn.DevicePlan"
    )


def _check_score_options(layout: AttentionLayout, dims: Dims) -> None:
    """The tensors that change scores and masks."""
    is_per_seq = layout.alibi_slopes is not None and len(layout.alibi_slopes.shape) == 2
    for name, tensor, names, dtype in (
        ("alibi_slopes", layout.alibi_slopes, (*["num_seqs"] * is_per_seq, "num_q_heads"), torch.float32),
        ("sinks", layout.sinks, ("num_q_heads",), torch.float32),
        ("tree_mask", layout.tree_mask, ("total_q",), torch.int64),
    ):
        if tensor is not None:
            dims.check(name, tensor, names)
            check_dtype(name, tensor, dtype)
            check_device(name, tensor, "q", layout.q)
            check_last_contiguous(name, tensor)
    if layout.tree_mask is not None and not layout.causal:
        raise ValueError("causal must be True with tree_mask, got False")


def address(tensor: Tensor | None) -> int:
    """Where the tensor's elements begin, as ``mixattn._C`` takes it; 0 without a tensor."""
    return 0 if tensor is None else tensor.data_ptr()


def check_features(call: AttentionCall, backend: str) -> None:
    """Raises NotImplementedError if the call has an argument that this backend does not have yet."""
    check_kv_dtype_backend(call.k_cache.dtype, "q", call.q.dtype, backend)
    for name, having in BACKENDS_WITH.items():
        value = getattr(call, name)
        if value is not None and value is not False and backend not in having:
            raise NotImplementedError(
                f"{name} is not supported by backend {backend!r}; backends that have it: {', '.join(having)}"
            )
    if call.device_plan is not None and backend not in ("triton", "cuda"):
        raise NotImplementedError(
            f"plan on a device is not supported by backend {backend!r}, which reads it on the host; the nearest is "
            "DevicePlan.read()"
        )


@functools.lru_cache(maxsize=256)
def native_sizes(layout: AttentionLayout) -> Mapping[str, Any]:
    """The arguments of ``_C.attention`` that follow from the layout, once ``check_attention`` has passed it.

    Remembered, because the layers of a step share a layout and the checks take longer than a small kernel.
    """
    check_attention(layout)
    q, k_cache, v_cache, alibi = layout.q, layout.k_cache, layout.v_cache, layout.alibi_slopes
    k_scale, v_scale = scale_sizes(layout.k_scale), scale_sizes(layout.v_scale)
    assert layout.out is not None
    return MappingProxyType(
        {
            "dtype": DTYPE_NAMES[q.dtype],
            "kv_dtype": kv_dtype_name(k_cache.dtype),
            "total_q": q.shape[0],
            "num_seqs": layout.seq_lens.shape[0],
            "num_q_heads": q.shape[1],
            "num_kv_heads": k_cache.shape[2],
            "head_dim": q.shape[2],
            "v_head_dim": v_head_dim(v_cache),
            "num_pages": k_cache.shape[0],
            "page_size": k_cache.shape[1],
            "max_pages": layout.block_table.shape[1],
            "q_strides": q.strides[:2],
            "out_strides": layout.out.strides[:2],
            "k_strides": k_cache.strides[:3],
            "v_strides": v_cache.strides[:3],
            "k_scale_sizes": k_scale,
            "v_scale_sizes": v_scale,
            "lse_stride": 0 if layout.lse is None else layout.lse.strides[0],
            "block_table_stride": layout.block_table.strides[0],
            "alibi_seq_stride": 0 if alibi is None or len(alibi.shape) == 1 else alibi.strides[0],
            "softmax_scale": q.shape[2] ** -0.5 if layout.softmax_scale is None else layout.softmax_scale,
            "causal": layout.causal,
            "window_left": -1 if layout.window_left is None else layout.window_left,
            "soft_cap": 0.0 if layout.soft_cap is None else layout.soft_cap,
            "invariant": layout.invariant,
            "rounds_q": layout.rounds_q,
        }
    )


def check_plan(plan: Tensor, call: AttentionCall) -> PlanHeader:
    """The header of the plan's words; raises ValueError unless they were made for a call of this shape."""
    num_words = plan.shape[0]
    if num_words < _C.PLAN_HEADER_WORDS:
        raise ValueError(f"plan must have at least {_C.PLAN_HEADER_WORDS} words, got {num_words} words")
    header = PlanHeader._make(plan[: _C.PLAN_HEADER_WORDS].tolist())
    if header.magic != _C.PLAN_MAGIC:
        raise ValueError(
            "plan was not written by mixattn.plan of this version, or a device found no items for its batch: its first "
            f"word is {header.magic:#x}"
        )
    expected_words = (
        _C.PLAN_HEADER_WORDS + header.capacity_items * _C.WORK_ITEM_WORDS + header.capacity_merges * _C.MERGE_WORDS
    )
    if num_words != expected_words:
        raise ValueError(f"plan must have the {expected_words} words that its header tells, got {num_words} words")
    total_q, num_q_heads, head_dim = call.q.shape
    _check_made_for(
        ("num_seqs", header.num_seqs, call.seq_lens.shape[0]),
        ("total_q", header.total_q, total_q),
        ("num_q_heads", header.num_q_heads, num_q_heads),
        ("num_kv_heads", header.num_kv_heads, call.k_cache.shape[2]),
        ("head_dim", header.head_dim, head_dim),
        ("causal", bool(header.causal), call.causal),
        ("window_left", None if header.window_left < 0 else header.window_left, call.window_left),
        ("invariant", header.fixed_split_tokens > 0, call.invariant),
    )
    if header.num_groups > 0 and call.alibi_slopes is not None:
        _refuse_alibi_slopes()
    return header


def place_plan(
    call: AttentionCall, header: PlanHeader | None, block_rows: tuple[int, int, int], tile_keys: int
) -> tuple[Tensor, Workspace]:
    """(the plan's words where a kernel of these tiles reads them, a workspace); a device plan is not looked at.

    Args:
        header: of a plan on the host.
        tile_keys: of the tile that the items of an invariant call are computed in.
    Raises:
        ValueError: the plan was made for larger tiles, or has invariant splits that cut them.
        NotImplementedError: a graph is being captured, and the plan is on the host.
    """
    assert call.plan is not None
    if call.device_plan is not None:
        assert call.workspace is not None
        rows = (call.device_plan.large_rows, call.device_plan.medium_rows, call.device_plan.small_rows)
        if any(planned > most for planned, most in zip(rows, block_rows, strict=True)):
            raise ValueError(f"plan must be made for hardware with block_rows {block_rows}, it was made for {rows}")
        _check_granule(call.device_plan.fixed_split_tokens, tile_keys)
        return call.plan, call.workspace
    assert header is not None
    check_block_rows(call.plan, header, block_rows)
    if call.invariant:
        check_fixed_splits(call.plan, header, tile_keys)
    device = call.q.device
    words = plan_on_device(call.plan, device)
    return words, new_workspace(header.num_partial_rows, header.num_merges, v_head_dim(call.v_cache), device)


def plan_on_device(plan: Tensor, device: torch.device) -> Tensor:
    """The plan's words where the call's kernel reads them: on a GPU a copy, for which nobody waits.

    It goes through pinned memory, because the driver lets the host wait for a copy of more than 64 KiB from any other;
    a plan of 32 decodes beside a chunk of 512 has 80 KB. torch keeps the pinned blocks, and gives out none that a copy
    still reads: it records an event behind each non-blocking copy. The caller may change ``plan`` at once.

    Raises:
        NotImplementedError: a graph is being captured. It would read the pinned block again at each replay, when
            another plan is in it.
    """
    if device.type == "cpu":
        return plan
    check_not_captured()
    return plan.pin_memory().to(device, non_blocking=True)


def check_not_captured() -> None:
    """Raises NotImplementedError while the current stream of a GPU captures a graph; for plans from the host."""
    if torch.cuda.is_current_stream_capturing():
        raise NotImplementedError(
            "plan is copied to the GPU by the call, which a captured graph cannot repeat; the nearest is a "
            "mixattn.DevicePlan, whose update and attention can both be captured"
        )


def free_sms(num_sms: int, sm_margin: int) -> int:
    """The SMs of a device of ``num_sms`` that ``sm_margin`` leaves to a launch; ValueError unless there is one."""
    if not 0 <= sm_margin < num_sms:
        raise ValueError(f"sm_margin must be in [0, {num_sms - 1}] on a device of {num_sms} SMs, got {sm_margin}")
    return num_sms - sm_margin


def check_fixed_splits(plan: Tensor, header: PlanHeader, tile_keys: int) -> None:
    """Raises ValueError if an invariant plan, on the CPU, has splits inside of tiles or items across splits."""
    granule = header.fixed_split_tokens
    _check_granule(granule, tile_keys)
    begin = _C.PLAN_HEADER_WORDS
    items = plan[begin : begin + header.num_items * _C.WORK_ITEM_WORDS].view(-1, _C.WORK_ITEM_WORDS)
    kv_begin, kv_end = items[:, 4], items[:, 5]
    if (kv_end > (kv_begin // granule + 1) * granule).any():
        raise ValueError(f"plan is not invariant: an item passes a multiple of its invariant_split_tokens, {granule}")


def _check_granule(granule: int, tile_keys: int) -> None:
    if granule % tile_keys:
        raise ValueError(f"plan's invariant_split_tokens must be a multiple of {tile_keys}, got {granule}")


def check_block_rows(plan: Tensor, header: PlanHeader, block_rows: tuple[int, int, int]) -> None:
    """Raises ValueError if the plan, on the CPU, has an item of more rows than the kernel's tile of its kind."""
    begin = _C.PLAN_HEADER_WORDS
    items = plan[begin : begin + header.num_items * _C.WORK_ITEM_WORDS].view(-1, _C.WORK_ITEM_WORDS)
    rows_and_kind = items[:, 3]
    num_rows, most_rows = rows_and_kind & 0xFFFF, torch.tensor(block_rows)[rows_and_kind >> 16]
    if (num_rows > most_rows).any():
        raise ValueError(
            f"plan must be made for hardware with block_rows {block_rows}, it has an item of {int(num_rows.max())} rows"
        )
