"""Paged attention over prefill chunks and decode rows in one call; ``mixattn.attention``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from mixattn import _C, env
from mixattn.ops import attention_cuda
from mixattn.ops.attention_call import (
    AttentionCall,
    AttentionLayout,
    DevicePlanTerms,
    PlanHeader,
    Workspace,
    address,
    attention_layout,
    check_attention,
    check_features,
    check_not_captured,
    check_plan,
    free_sms,
    native_sizes,
    place_plan,
)
from mixattn.ops.backends import choose_backend, first_backend
from mixattn.ops.checks import (
    check_block_ids,
    check_lengths,
    check_no_grad,
    check_tensor,
)
from mixattn.ops.kv_dtypes import Scale, kv_format, split_scale, v_head_dim
from mixattn.ops.library import is_plain, register_op
from mixattn.ops.plan import Hardware, WorkPlan, base_hardware, cpu_hardware, with_workers
from mixattn.ops.plan import plan as make_plan
from mixattn.ops.plan_cuda import DevicePlan
from mixattn.ops.reference import attention_reference

if TYPE_CHECKING:
    from mixattn.triton_kernels.tiles import TileChoice


@overload
def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_left: int | None = None,
    soft_cap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    tree_mask: Tensor | None = None,
    k_scale: Scale = None,
    v_scale: Scale = None,
    invariant: bool = False,
    rounds_q: bool = False,
    sm_margin: int = 0,
    plan: WorkPlan | DevicePlan | Tensor | None = None,
    out: Tensor | None = None,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_left: int | None = None,
    soft_cap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    tree_mask: Tensor | None = None,
    k_scale: Scale = None,
    v_scale: Scale = None,
    invariant: bool = False,
    rounds_q: bool = False,
    sm_margin: int = 0,
    plan: WorkPlan | DevicePlan | Tensor | None = None,
    out: Tensor | None = None,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_left: int | None = None,
    soft_cap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    tree_mask: Tensor | None = None,
    k_scale: Scale = None,
    v_scale: Scale = None,
    invariant: bool = False,
    rounds_q: bool = False,
    sm_margin: int = 0,
    plan: WorkPlan | DevicePlan | Tensor | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every slice's rows over its pages, prefill chunks and decodes alike, in one launch.

    Row r of a slice stands at position kv_len - q_len + r of its sequence and sees the keys up to there (``causal``),
    no more than ``window_left`` before it, and of its own slice's those that ``tree_mask`` shows it. A row that sees no
    key gets out 0 and lse -inf (with ``sinks`` its head's sink). Keys that no row sees may hold anything, NaN included.
    The score of a key is softmax_scale * q.k, then capped, then less the ALiBi term.

    Args:
        q: [total_q, num_q_heads, head_dim] float32, bfloat16 or float16; the slices' rows one after another.
        k_cache, v_cache: [num_pages, page_size, num_kv_heads, head_dim], and with v_head_dim, both float32, bfloat16,
            float16, int8, float8_e4m3fn, float8_e5m2, or uint8 that holds int4: head_dim / 2 bytes, the even element
            in the low nibble, value = nibble - 8. Any strides, the last dimension contiguous. num_q_heads is a multiple
            of num_kv_heads; head_dim and v_head_dim are multiples of 8 up to 256.
        cu_seqlens_q: [num_seqs + 1] int32; slice s has the rows cu_seqlens_q[s] to cu_seqlens_q[s + 1].
        seq_lens: [num_seqs] int32, the keys of each sequence, this step's included.
        block_table: [num_seqs, max_pages] int32, page ids; entries past a sequence's last page are never read.
        softmax_scale: multiplies q.k; None is head_dim ** -0.5.
        causal: whether a row sees no key behind its own position.
        window_left: how many keys before its own position a row sees; None for all.
        soft_cap: scaled scores s become soft_cap * tanh(s / soft_cap); None for off.
        alibi_slopes: [num_q_heads] or [num_seqs, num_q_heads] float32; slope * |distance of row and key in positions|
            is taken off the scaled and capped score. None for off.
        sinks: [num_q_heads] float32, one more logit per query head in the sums of softmax and of lse, neither scaled
            nor capped, with no value behind it; -inf is none for that head. None for off.
        tree_mask: [total_q] int64, 64 bits per row: bit d tells whether the row sees the key d positions before its
            own (bit 0 is itself). Keys before the slice's first row, and keys 64 or more before the row, are seen
            whatever the bits, so that -1 is plain causal and chunks go beside the trees of speculative verification.
            ``mixattn.tree_mask`` makes a tree's words. Needs ``causal``. None for off.
        k_scale, v_scale: what the elements of a quantised cache are multiplied with: one float, [num_kv_heads] float32,
            or [num_pages, page_size, num_kv_heads] float32 (any strides), a scale per token and head. None is 1, for
            float8 only; int8 and int4 need scales, other caches take none.
        invariant: whether a row's bits are to depend on its own q and keys alone: not on the rest of the batch, the
            chunks its prompt came in, the page size, the block table, or the number of threads. Slower
            (docs/decisions/0005-invariant-attention.md).
        rounds_q: whether a kernel may round q, and the weights that V is multiplied with, to what its products with K
            and V as they are stored are fastest in: on CPUs that have such products, bfloat16 beside bfloat16, and
            beside int8 integers of 16 bits or, with AVX512_VNNI, 8 (each row of q, and of weights, in a unit of its
            own), whatever q's dtype is. Sums are in float32 as always. Other backends make no use of it.
        sm_margin: SMs of a GPU that the launch leaves free, for kernels that run beside it (communication); at least
            one must be left. Means nothing where there are no SMs: on a CPU it is accepted and changes nothing.
        plan: from ``mixattn.plan`` for these very lengths and options, made once per step and shared by its layers
            (its ``buffer`` as a CPU tensor will do too); None makes one. A plan that groups slices by ``block_table``
            needs this very table, which on a GPU is not looked at; not with ``alibi_slopes``. The one that None makes
            has such groups on the CPU only: on a GPU the table would have to be copied to the host first.
            A ``mixattn.DevicePlan`` is read where it lies, by the kernels of ``cuda`` and ``triton`` alone: the call
            only launches, so that a graph can capture it behind ``update``. That the last update was of these very
            ``cu_seqlens_q``, ``seq_lens`` and, with ``page_size``, ``block_table`` is not looked at. Rows of out and
            lse behind the last slice are not written, and none if the batch has no plan (``DevicePlan.read`` tells):
            they are as they were, in new tensors anything.
        out: [total_q, num_q_heads, v_head_dim], written and returned; q's dtype and device. None allocates.
        return_lse: whether the log-sum-exp is returned too.
        backend: ``cpu``, ``triton``, ``cuda`` or ``reference``; None is the first here that takes the call (see
            ``mixattn.backends``).
    Returns:
        out [total_q, num_q_heads, v_head_dim]; with ``return_lse`` also lse [total_q, num_q_heads] float32, natural
        log.
    Raises:
        ValueError: an argument's shape, dtype, device, stride or value is out of bounds. Nothing has been written.
            On a GPU the values in index tensors are not looked at.
        NotImplementedError: valid, but not supported; the message names the nearest that is.
    """
    for name, tensor in (
        ("q", q), ("k_cache", k_cache), ("v_cache", v_cache), ("cu_seqlens_q", cu_seqlens_q), ("seq_lens", seq_lens),
        ("block_table", block_table),
    ):  # fmt: skip
        check_tensor(name, tensor)
    workspace: Workspace | tuple[None, None, None] = (None, None, None)
    device_plan = None
    words: Tensor | None
    if isinstance(plan, DevicePlan):
        words, workspace, device_plan = plan.buffer, plan.workspace, plan.terms
    else:
        words = torch.from_numpy(plan.buffer) if isinstance(plan, WorkPlan) else plan
    if words is not None:
        check_tensor("plan", words)
    for name, optional in (("alibi_slopes", alibi_slopes), ("sinks", sinks), ("tree_mask", tree_mask)):
        if optional is not None:
            check_tensor(name, optional)
    k_scales, k_scale_value = split_scale("k_scale", k_scale)
    v_scales, v_scale_value = split_scale("v_scale", v_scale)
    tensors = (
        q, k_cache, v_cache, cu_seqlens_q, seq_lens, block_table, words, alibi_slopes, sinks, tree_mask,
        k_scales, v_scales,
    )  # fmt: skip
    scores = (k_scale_value, v_scale_value, softmax_scale, causal, window_left, soft_cap)
    inputs = (*tensors, *scores, invariant, rounds_q, sm_margin, backend)
    if out is None and return_lse and device_plan is None:
        new_out, new_lse = torch.ops.mixattn.attention(*inputs)
        return new_out, new_lse
    if out is None:
        out = _new_out(q, v_cache)
    check_tensor("out", out)
    lse = _new_lse(q) if return_lse else None
    run = _attention_out if is_plain(*tensors, out) else torch.ops.mixattn.attention_out
    run(*inputs, out, lse, *workspace, device_plan)
    return out if lse is None else (out, lse)


def device_hardware(device: torch.device, programs_per_sm: int | None = None, sm_margin: int = 0) -> Hardware:
    """The workers that a plan for tensors on this device is to be balanced over; ``mixattn.device_hardware``.

    Args:
        programs_per_sm: of the Triton kernel on a GPU; None: of the backend that comes first, as for 16-bit q, k and v
            with heads up to 128.
        sm_margin: SMs of a GPU that ``attention`` is told to leave free, too. A CPU has none.
    Raises:
        ValueError: ``sm_margin`` is negative, or leaves no SM.
    """
    if device.type != "cuda":
        if sm_margin < 0:
            raise ValueError(f"sm_margin must be >= 0, got {sm_margin}")
        return cpu_hardware()
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    num_sms = free_sms(properties.multi_processor_count, sm_margin)
    if programs_per_sm is None and first_backend("cuda") == "cuda":
        hardware = with_workers(base_hardware(capability), num_sms, attention_cuda.WORKERS_PER_SM)
        return replace(hardware, separates_small=capability == (9, 0))
    if programs_per_sm is None:
        from mixattn.triton_kernels.tiles import TileProblem
        from mixattn.triton_kernels.tuned_tiles import Gpu, tiles_for

        programs_per_sm = tiles_for(TileProblem(128, 128, 2, 16), Gpu(properties.name, capability)).programs_per_sm
    return with_workers(base_hardware(capability), num_sms, programs_per_sm)


def _default_plan(call: AttentionCall, backend: str, layout: AttentionLayout, out: Tensor) -> Tensor:
    """The words of a plan for the backend's workers; on a GPU this waits for the lengths to arrive on the host."""
    q = call.q
    if q.device.type != "cpu":
        check_not_captured()
    if backend == "cuda":
        hardware = attention_cuda.plan_hardware(call, layout, out)
    elif backend == "triton":
        from mixattn.triton_kernels import mixed_attention as triton_attention

        num_sms = free_sms(triton_attention.num_sms(q.device), call.sm_margin)
        base = base_hardware(triton_attention.capability(q.device))
        hardware = with_workers(base, num_sms, _triton_tiles(call).programs_per_sm)
    else:
        hardware = cpu_hardware()
    has_groups = not q.is_cuda and call.alibi_slopes is None
    indices: dict[str, Any] = {"cu_seqlens_q": call.cu_seqlens_q.cpu().numpy(), "seq_lens": call.seq_lens.cpu().numpy()}
    terms: dict[str, Any] = {
        "num_q_heads": q.shape[1],
        "num_kv_heads": call.k_cache.shape[2],
        "head_dim": q.shape[2],
        "v_head_dim": v_head_dim(call.v_cache),
        "kv_element_bytes": call.k_cache.element_size(),
        "causal": call.causal,
        "window_left": call.window_left,
        "invariant": call.invariant,
        "hardware": hardware,
    }
    if has_groups:
        indices["block_table"] = call.block_table.numpy()
        terms["page_size"] = call.k_cache.shape[1]
    return _remembered_plan(indices, terms)


_last_plan: tuple[tuple[Any, ...], Tensor] | None = None
"""What ``_remembered_plan`` was asked last, and the answer."""


def _remembered_plan(indices: dict[str, Any], terms: dict[str, Any]) -> Tensor:
    """The words of ``plan(**indices, **terms)``, ``indices`` being numpy arrays: the last call's if it asked the same.

    So layers that are called one after the other without a plan, as drop-ins are, share that of the first.
    """
    global _last_plan
    question = (*terms.items(), *((name, array.shape, array.tobytes()) for name, array in indices.items()))
    last = _last_plan
    if last is None or last[0] != question:
        last = _last_plan = (question, torch.from_numpy(make_plan(**indices, **terms).buffer))
    return last[1]


def _triton_tiles(call: AttentionCall) -> TileChoice:
    """The tiles in which the Triton kernel runs the call."""
    from mixattn.triton_kernels.mixed_attention import choose_call_tiles

    return choose_call_tiles(
        call.q,
        call.v_cache,
        kv_format(call.v_cache.dtype),
        has_row_terms=call.alibi_slopes is not None or call.tree_mask is not None,
        invariant=call.invariant,
    )


def _run(call: AttentionCall, out: Tensor, lse: Tensor | None) -> None:
    """Checks everything, then lets the backend write ``out`` and, unless None, ``lse``."""
    layout = attention_layout(call, out, lse)
    sizes = native_sizes(layout)
    check_no_grad(call.q, call.k_cache, call.v_cache, call.alibi_slopes, call.sinks)
    backend = choose_backend(call.q.device.type, call.backend, lambda name: _why_not(name, call, layout, out))
    check_features(call, backend)
    # With a plan, compiled code checks all that index tensors hold, plan included, as it reads it. A plan on a device
    # comes with lengths that are the device's, too.
    if call.q.device.type == "cpu" and call.device_plan is None and (backend != "cpu" or call.plan is None):
        check_lengths(call.cu_seqlens_q, call.seq_lens, sizes["total_q"], sizes["max_pages"] * sizes["page_size"])
    if call.plan is None and backend != "reference":
        call = call._replace(plan=_default_plan(call, backend, layout, out))
    header = None if call.plan is None or call.device_plan is not None else check_plan(call.plan, call)
    if sizes["total_q"] == 0:
        return
    if backend == "reference":
        _run_reference(call, out, lse)
    elif backend == "cpu":
        assert header is not None
        _run_cpu(call, header, sizes, out, lse)
    elif backend == "cuda":
        attention_cuda.run(call, layout, header, sizes, out, lse)
    else:
        _run_triton(call, header, sizes["softmax_scale"], out, lse)


def _why_not(backend: str, call: AttentionCall, layout: AttentionLayout, out: Tensor) -> str | None:
    """The reason why this backend does not take the call; None if it does."""
    try:
        check_features(call, backend)
        if backend == "cuda":
            attention_cuda.kernel_for(call, layout, out)
    except NotImplementedError as error:
        return str(error)
    return None


def _run_reference(call: AttentionCall, out: Tensor, lse: Tensor | None) -> None:
    if call.q.device.type == "cpu":
        check_block_ids(call.block_table, call.seq_lens, call.k_cache.shape[1], call.k_cache.shape[0])
    exact_out, exact_lse = attention_reference(
        call.q,
        call.k_cache,
        call.v_cache,
        cu_seqlens_q=call.cu_seqlens_q,
        seq_lens=call.seq_lens,
        block_table=call.block_table,
        softmax_scale=call.softmax_scale,
        causal=call.causal,
        window_left=call.window_left,
        soft_cap=call.soft_cap,
        alibi_slopes=call.alibi_slopes,
        sinks=call.sinks,
        tree_mask=call.tree_mask,
        k_scale=call.k_scale_value if call.k_scale is None else call.k_scale,
        v_scale=call.v_scale_value if call.v_scale is None else call.v_scale,
    )
    out.copy_(exact_out)
    if lse is not None:
        lse.copy_(exact_lse)


def _run_cpu(
    call: AttentionCall, header: PlanHeader, sizes: Mapping[str, Any], out: Tensor, lse: Tensor | None
) -> None:
    assert call.plan is not None
    num_partial_rows, num_tickets = header.num_partial_rows, header.num_merges + 1
    partial_out = torch.empty(num_partial_rows * (out.shape[2] + 1), dtype=torch.float32)
    partial_lse_bytes = num_partial_rows * out.shape[2] * partial_out.element_size()  # the lse lie behind the out
    tickets = torch.zeros(num_tickets, dtype=torch.int32)
    _C.attention(
        **sizes,
        q=call.q.data_ptr(),
        k_cache=call.k_cache.data_ptr(),
        v_cache=call.v_cache.data_ptr(),
        k_scale=0 if call.k_scale is None else call.k_scale.data_ptr(),
        v_scale=0 if call.v_scale is None else call.v_scale.data_ptr(),
        out=out.data_ptr(),
        lse=address(lse),
        cu_seqlens_q=call.cu_seqlens_q.data_ptr(),
        seq_lens=call.seq_lens.data_ptr(),
        block_table=call.block_table.data_ptr(),
        plan=call.plan.data_ptr(),
        alibi_slopes=address(call.alibi_slopes),
        sinks=address(call.sinks),
        tree_mask=address(call.tree_mask),
        plan_words=call.plan.shape[0],
        partial_out=partial_out.data_ptr(),
        partial_lse=partial_out.data_ptr() + partial_lse_bytes,
        num_partial_rows=num_partial_rows,
        tickets=tickets.data_ptr(),
        num_tickets=num_tickets,
        num_threads=env.num_threads(),
        isa=env.cpu_isa(),
    )


def _run_triton(
    call: AttentionCall, header: PlanHeader | None, softmax_scale: float, out: Tensor, lse: Tensor | None
) -> None:
    from mixattn.triton_kernels.mixed_attention import mixed_attention, num_sms
    from mixattn.triton_kernels.tiles import MAX_BLOCK_N, PLAN_BLOCK_ROWS

    words, workspace = place_plan(call, header, PLAN_BLOCK_ROWS, max(MAX_BLOCK_N))
    tiles = _triton_tiles(call)
    mixed_attention(
        call.q,
        call.k_cache,
        call.v_cache,
        call.cu_seqlens_q,
        call.seq_lens,
        call.block_table,
        words,
        out,
        lse,
        *workspace,
        softmax_scale=softmax_scale,
        causal=call.causal,
        window_left=call.window_left,
        soft_cap=call.soft_cap,
        alibi_slopes=call.alibi_slopes,
        sinks=call.sinks,
        tree_mask=call.tree_mask,
        kv_format=kv_format(call.k_cache.dtype),
        k_scale=call.k_scale_value if call.k_scale is None else call.k_scale,
        v_scale=call.v_scale_value if call.v_scale is None else call.v_scale,
        invariant=call.invariant,
        tiles=tiles,
        num_programs=free_sms(num_sms(out.device), call.sm_margin) * tiles.programs_per_sm,
    )


def _new_out(q: Tensor, v_cache: Tensor) -> Tensor:
    return q.new_empty((*q.shape[:-1], v_head_dim(v_cache)))


def _new_lse(out: Tensor) -> Tensor:
    return out.new_empty(out.shape[:-1], dtype=torch.float32)


def _attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    """``mixattn::attention``: into new tensors."""
    call = AttentionCall(*arguments)
    out = _new_out(call.q, call.v_cache)
    lse = _new_lse(out)
    _run(call, out, lse)
    return out, lse


def _attention_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = AttentionCall(*arguments)
    check_attention(attention_layout(call, None, None))
    out = _new_out(call.q, call.v_cache)
    return out, _new_lse(out)


def _attention_out(*arguments: Any) -> None:
    """``mixattn::attention_out``: into the caller's tensors."""
    call, out, lse = _call_into(*arguments)
    _run(call, out, lse)


def _attention_out_fake(*arguments: Any) -> None:
    check_attention(attention_layout(*_call_into(*arguments)))


def _call_into(*arguments: Any) -> tuple[AttentionCall, Tensor, Tensor | None]:
    """(the call, out, lse) of the arguments of ``mixattn::attention_out``."""
    *inputs, out, lse, partial_out, partial_lse, tickets, device_plan = arguments
    call = AttentionCall(*inputs)
    if device_plan is not None:
        workspace = Workspace(partial_out, partial_lse, tickets)
        call = call._replace(workspace=workspace, device_plan=DevicePlanTerms._make(device_plan))
    return call, out, lse


_INPUTS = (
    "Tensor q, Tensor k_cache, Tensor v_cache, Tensor cu_seqlens_q, Tensor seq_lens, Tensor block_table, Tensor? plan, "
    "Tensor? alibi_slopes, Tensor? sinks, Tensor? tree_mask, Tensor? k_scale, Tensor? v_scale, "
    "float? k_scale_value, float? v_scale_value, "
    "float? softmax_scale, bool causal, int? window_left, float? soft_cap, "
    "bool invariant, bool rounds_q, int sm_margin, str? backend"
)
register_op(f"attention({_INPUTS}) -> (Tensor out, Tensor lse)", _attention, _attention_fake)
_WORKSPACE = "Tensor(c!)? partial_out, Tensor(d!)? partial_lse, Tensor(e!)? tickets, int[]? device_plan"
register_op(
    f"attention_out({_INPUTS}, Tensor(a!) out, Tensor(b!)? lse, {_WORKSPACE}) -> ()",
    _attention_out,
    _attention_out_fake,
)
