# mixed_attention.py: paged attention over prefill chunks and decode rows in one launch.
# Math    o_i = sum_j softmax_j(softmax_scale * q_i.k_j) v_j over the keys j that row i may see
# Method  persistent programs draw the items of a plan (ops/plan.py) from a counter; online softmax over KV tiles, with
#         masks only in tiles that some row does not see whole; items of split rows leave float32 partials, and the last
#         of them to finish merges them in split order
# Grid    one program of 8 warps per SM, whatever the batch; rows per tile by the item's kind; keys per tile and depth
#         of the pipeline by tiles.py, chosen by the compilers' output below: no speed has been measured
# Shapes  q, out [total_q, num_q_heads, head_dim], k_cache, v_cache [num_pages, page_size, num_kv_heads, head_dim] in
#         bf16, fp16 or fp32; lse [total_q, num_q_heads] fp32; partials [num_partial_rows, head_dim] fp32
# Memory  an item reads 2 keys head_dim element_bytes, and reads and writes rows head_dim element_bytes; one of split
#         rows writes and reads again 4 rows (head_dim + 1) bytes instead; shared memory as tiles.shared_bytes
# Static  compiler output, Triton 3.9, bf16, causal, pages of a power of two (tests/triton/ahead_of_time.py):
#         head_dim 128    registers  spills  shared bytes  warp instructions per MMA-MFLOP in the loop without masks,
#                                                          large (128 rows) / medium (64) / small (16) kind
#         sm_90 (wgmma)   252        0       132,096       834 / 1,040 / 4,028
#         sm_80 (mma)     255        0        98,816       1,114 / 2,216 / 3,952
#         head_dim 64 and 96, window, soft cap, any page size: no spills; 256: none on sm_90, 112 bytes on sm_80.
#         Small items wait for memory: at 3.35 TB/s over 132 SMs a tile of 64 keys takes 1.3 us to arrive and 0.3 us to
#         issue. fp32 is three tf32 products; it spills (208 bytes at 128 on sm_90) and is not tuned.
# Limits  head_dim up to 256, any page_size, group and strides, the last dimension contiguous; sm_80+; Triton 3.5+
# Twins   csrc/cpu/mixed_attention-inl.h; truth ops/reference.py
# Source  online softmax over tiles: arXiv:2307.08691, section 3; split keys: arXiv:2311.01282, section 3
"""Attention of one step's prefill chunks and decode rows, split keys merged, in one launch; ``attention`` on GPUs."""

from __future__ import annotations

import contextlib
import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixattn.triton_kernels._numeric import dot, narrow
from mixattn.triton_kernels._softmax import LN_2, absorb_state, finish_rows, weigh_scores
from mixattn.triton_kernels.tiles import choose_tiles

LOG2_E = math.log2(math.e)

# Word offsets of the plan: csrc/common/work_item.h.
HEADER_WORDS = tl.constexpr(16)
HEADER_NUM_ITEMS = tl.constexpr(1)
HEADER_CAPACITY_ITEMS = tl.constexpr(6)
ITEM_WORDS = tl.constexpr(8)
ITEM_SEQ_IDX = tl.constexpr(0)
ITEM_KV_HEAD = tl.constexpr(1)
ITEM_ROW_BEGIN = tl.constexpr(2)
ITEM_ROWS_AND_KIND = tl.constexpr(3)
ITEM_KV_BEGIN = tl.constexpr(4)
ITEM_KV_END = tl.constexpr(5)
ITEM_MERGE_IDX = tl.constexpr(6)
ITEM_PARTIAL_ROW = tl.constexpr(7)
MERGE_WORDS = tl.constexpr(8)
MERGE_SEQ_IDX = tl.constexpr(0)
MERGE_KV_HEAD = tl.constexpr(1)
MERGE_ROW_BEGIN = tl.constexpr(2)
MERGE_NUM_ROWS = tl.constexpr(3)
MERGE_PARTIAL_ROW = tl.constexpr(4)
MERGE_NUM_SPLITS = tl.constexpr(5)
NUM_ROWS_MASK = tl.constexpr(0xFFFF)
KIND_SHIFT = tl.constexpr(16)
NUM_KINDS = tl.constexpr(3)

MERGE_BLOCK_ROWS = tl.constexpr(16)
"""Rows merged at once: those of a small tile, so that a merge takes no more registers than the items before it."""


@triton.jit
def load_rows(pointers, is_row, HEAD_DIM: tl.constexpr, IS_MASKED: tl.constexpr):
    """[rows, BLOCK_D] from memory; 0 past HEAD_DIM and, with IS_MASKED, where is_row is false."""
    BLOCK_D: tl.constexpr = pointers.shape[1]
    is_dim = (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    if IS_MASKED:
        tile = tl.load(pointers, mask=is_row[:, None] & is_dim, other=0.0)
    elif BLOCK_D != HEAD_DIM:
        tile = tl.load(pointers, mask=is_dim, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def attend_tile(
    query,
    accumulator,
    row_max,
    row_sum,
    row_kv_begin,
    row_kv_end,
    tile_begin,
    kv_begin,
    kv_end,
    block_table_row,
    k_head,
    v_head,
    stride_k_page,
    stride_k_token,
    stride_v_page,
    stride_v_token,
    page_size,
    page_shift,
    score_scale,
    score_cap,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_PAGE_SHIFT: tl.constexpr,
    HAS_SAME_STRIDES: tl.constexpr,
    IS_EDGE: tl.constexpr,
):
    """(accumulator, row_max, row_sum) after the keys [tile_begin, tile_begin + BLOCK_N).

    Without IS_EDGE every row sees every key of the tile; with it, each its own part of [kv_begin, kv_end).
    """
    BLOCK_M: tl.constexpr = query.shape[0]
    dim = tl.arange(0, query.shape[1])
    key = tile_begin + tl.arange(0, BLOCK_N)
    is_key = (key >= kv_begin) & (key < kv_end)
    if HAS_PAGE_SHIFT:
        page_idx = key >> page_shift
        slot = key & (page_size - 1)
    else:
        page_idx = key // page_size
        slot = key % page_size
    # Table entries past the last page may be anything: neither they nor pages through them are read.
    table_entry = block_table_row + page_idx
    page = tl.load(table_entry, mask=is_key, other=0) if IS_EDGE else tl.load(table_entry)
    page = page.to(tl.int64)  # caches of more than 2^31 elements are common
    slot = slot.to(tl.int64)

    k_offsets = page * stride_k_page + slot * stride_k_token
    k_rows = k_head + k_offsets[:, None]
    k = load_rows(k_rows + dim[None, :], is_key, HEAD_DIM, IS_EDGE)  # (BLOCK_N, BLOCK_D)
    scores = dot(query, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))  # (BLOCK_M, BLOCK_N)
    scale = score_scale
    if HAS_SOFT_CAP:
        # tanh(x) = 1 - 2 / (exp(2x) + 1); score_scale holds 2 log2(e) / soft_cap. exp2 = inf gives 1.
        scores = 1.0 - 2.0 / (tl.exp2(scores * score_scale) + 1.0)
        scale = score_cap
    if IS_EDGE:
        is_visible = key[None, :] < row_kv_end[:, None]
        if HAS_WINDOW:
            is_visible = is_visible & (key[None, :] >= row_kv_begin[:, None])
        scores = tl.where(is_visible, scores, -float("inf"))
    weights, row_max, rescale = weigh_scores(scores, scale, row_max, IS_EDGE)
    row_sum = row_sum * rescale + tl.sum(weights, 1)
    # V of what is no key of the item is 0, not what memory holds there: 0 * NaN would be NaN.
    v_offsets = k_offsets
    if not HAS_SAME_STRIDES:
        v_offsets = page * stride_v_page + slot * stride_v_token
    v_rows = v_head + v_offsets[:, None]
    v = load_rows(v_rows + dim[None, :], is_key, HEAD_DIM, IS_EDGE)  # (BLOCK_N, BLOCK_D)
    accumulator = dot(narrow(weights, v.dtype), v, accumulator * rescale[:, None])
    return accumulator, row_max, row_sum


@triton.jit
def attend_item(
    q,
    k_cache,
    v_cache,
    block_table,
    out,
    lse,
    partial_out,
    partial_lse,
    item,
    first_row,
    cu_seqlens_q,
    seq_lens,
    stride_q_token,
    stride_q_head,
    stride_k_page,
    stride_k_token,
    stride_k_head,
    stride_v_page,
    stride_v_token,
    stride_v_head,
    stride_block_table,
    stride_out_token,
    stride_out_head,
    stride_lse_token,
    group_size,
    page_size,
    page_shift,
    window_left,
    score_scale,
    score_cap,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_PAGE_SHIFT: tl.constexpr,
    HAS_SAME_STRIDES: tl.constexpr,
):
    """Attention of one item's rows over its keys, to out and lse, or to its rows of the partials."""
    seq_idx = tl.load(item + ITEM_SEQ_IDX)
    kv_head = tl.load(item + ITEM_KV_HEAD)
    row_begin = tl.load(item + ITEM_ROW_BEGIN)
    num_rows = tl.load(item + ITEM_ROWS_AND_KIND) & NUM_ROWS_MASK
    kv_begin = tl.load(item + ITEM_KV_BEGIN)
    kv_end = tl.load(item + ITEM_KV_END)
    q_begin = tl.load(cu_seqlens_q + seq_idx)
    q_len = tl.load(cu_seqlens_q + seq_idx + 1) - q_begin
    kv_len = tl.load(seq_lens + seq_idx)

    row = first_row + tl.arange(0, BLOCK_M)
    is_row = row < num_rows
    dim = tl.arange(0, BLOCK_D)
    token = (row_begin + row) // group_size
    head = (kv_head * group_size + (row_begin + row) % group_size).to(tl.int64)
    q_token = (q_begin + token).to(tl.int64)
    q_rows = q + (q_token * stride_q_token + head * stride_q_head)[:, None]
    query = load_rows(q_rows + dim[None, :], is_row, HEAD_DIM, True)  # (BLOCK_M, BLOCK_D)

    # What each row sees of the item's keys, and the keys [full_begin, full_end) that all of them see.
    last_row = tl.minimum(first_row + BLOCK_M, num_rows) - 1
    first_position = kv_len - q_len + (row_begin + first_row) // group_size
    last_position = kv_len - q_len + (row_begin + last_row) // group_size
    position = kv_len - q_len + token
    row_kv_begin = tl.zeros([BLOCK_M], tl.int32)
    row_kv_end = tl.zeros([BLOCK_M], tl.int32) + kv_end
    walk_begin = kv_begin
    full_begin = kv_begin
    full_end = kv_end
    if IS_CAUSAL:
        row_kv_end = tl.minimum(position + 1, kv_end)
        full_end = tl.minimum(tl.maximum(first_position + 1, kv_begin), kv_end)
    if HAS_WINDOW:
        row_kv_begin = tl.maximum(position - window_left, kv_begin)
        full_begin = tl.minimum(tl.maximum(last_position - window_left, kv_begin), kv_end)
        # Tiles start at multiples of BLOCK_N wherever the window begins, as they do without one: the splits of a plan
        # for this kernel are multiples of it.
        walk_begin = kv_begin // BLOCK_N * BLOCK_N
    num_tiles = tl.cdiv(kv_end - walk_begin, BLOCK_N)
    first_full = tl.cdiv(full_begin - walk_begin, BLOCK_N)
    end_full = tl.maximum((full_end - walk_begin) // BLOCK_N, first_full)

    block_table_row = block_table + seq_idx.to(tl.int64) * stride_block_table
    k_head = k_cache + kv_head.to(tl.int64) * stride_k_head
    v_head = v_cache + kv_head.to(tl.int64) * stride_v_head
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    # In ascending order: tiles that the window cuts, tiles that all rows see whole, tiles that the causal edge cuts.
    for phase in tl.static_range(0 if HAS_WINDOW else 1, 3):
        if phase == 0:
            tile_begin, tile_end = 0, first_full
        elif phase == 1:
            tile_begin, tile_end = first_full, end_full
        else:
            tile_begin, tile_end = end_full, num_tiles
        for tile in tl.range(tile_begin, tile_end, num_stages=NUM_STAGES):
            accumulator, row_max, row_sum = attend_tile(
                query, accumulator, row_max, row_sum, row_kv_begin, row_kv_end, walk_begin + tile * BLOCK_N, kv_begin,
                kv_end, block_table_row, k_head, v_head, stride_k_page, stride_k_token, stride_v_page, stride_v_token,
                page_size, page_shift, score_scale, score_cap, HEAD_DIM, BLOCK_N, HAS_WINDOW, HAS_SOFT_CAP,
                HAS_PAGE_SHIFT, HAS_SAME_STRIDES, IS_EDGE=phase != 1,
            )  # fmt: skip

    result, lse_log2 = finish_rows(accumulator, row_max, row_sum)
    # Read again, and volatile, or the compiler keeps what the addresses of the results are made from in registers (or
    # spills it) all through the walk.
    row_begin = tl.load(item + ITEM_ROW_BEGIN, volatile=True)
    num_rows = tl.load(item + ITEM_ROWS_AND_KIND, volatile=True) & NUM_ROWS_MASK
    is_row = row < num_rows
    is_value = is_row[:, None] & (dim < HEAD_DIM)[None, :]
    if tl.load(item + ITEM_MERGE_IDX) < 0:
        q_token = (q_begin + (row_begin + row) // group_size).to(tl.int64)
        head = (kv_head * group_size + (row_begin + row) % group_size).to(tl.int64)
        out_rows = out + (q_token * stride_out_token + head * stride_out_head)[:, None]
        tl.store(out_rows + dim[None, :], narrow(result, out.dtype.element_ty), mask=is_value)
        if lse is not None:
            tl.store(lse + q_token * stride_lse_token + head, lse_log2 * LN_2, mask=is_row)
    else:
        # Through L2 (.cg): another program reads these.
        partial_row = (tl.load(item + ITEM_PARTIAL_ROW) + row).to(tl.int64)
        partial_rows = partial_out + (partial_row * HEAD_DIM)[:, None]
        tl.store(partial_rows + dim[None, :], result, mask=is_value, cache_modifier=".cg")
        tl.store(partial_lse + partial_row, lse_log2, mask=is_row, cache_modifier=".cg")


@triton.jit
def merge_item(
    out,
    lse,
    partial_out,
    partial_lse,
    merge,
    cu_seqlens_q,
    stride_out_token,
    stride_out_head,
    stride_lse_token,
    group_size,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The partials of all splits of some rows, in split order, to out and lse."""
    first_token = tl.load(cu_seqlens_q + tl.load(merge + MERGE_SEQ_IDX))
    first_head = tl.load(merge + MERGE_KV_HEAD) * group_size
    row_begin = tl.load(merge + MERGE_ROW_BEGIN)
    num_rows = tl.load(merge + MERGE_NUM_ROWS)
    first_partial_row = tl.load(merge + MERGE_PARTIAL_ROW)
    num_splits = tl.load(merge + MERGE_NUM_SPLITS)
    dim = tl.arange(0, BLOCK_D)
    is_dim = (dim < HEAD_DIM)[None, :]
    for block_begin in tl.range(0, num_rows, MERGE_BLOCK_ROWS, num_stages=1):
        row = block_begin + tl.arange(0, MERGE_BLOCK_ROWS)
        is_row = row < num_rows
        accumulator = tl.zeros([MERGE_BLOCK_ROWS, BLOCK_D], tl.float32)
        row_max = tl.full([MERGE_BLOCK_ROWS], -float("inf"), tl.float32)
        row_sum = tl.zeros([MERGE_BLOCK_ROWS], tl.float32)
        for split in tl.range(0, num_splits, num_stages=1):
            partial_row = (first_partial_row + split * num_rows + row).to(tl.int64)
            # Through L2 (.cg): L1 may hold what was here before another program wrote.
            split_lse = tl.load(partial_lse + partial_row, mask=is_row, other=-float("inf"), cache_modifier=".cg")
            split_out = tl.load(
                partial_out + (partial_row * HEAD_DIM)[:, None] + dim[None, :],
                mask=is_row[:, None] & is_dim,
                other=0.0,
                cache_modifier=".cg",
            )  # (MERGE_BLOCK_ROWS, BLOCK_D)
            accumulator, row_max, row_sum = absorb_state(accumulator, row_max, row_sum, split_out, split_lse)
        result, lse_log2 = finish_rows(accumulator, row_max, row_sum)
        token = (first_token + (row_begin + row) // group_size).to(tl.int64)
        head = (first_head + (row_begin + row) % group_size).to(tl.int64)
        out_rows = out + (token * stride_out_token + head * stride_out_head)[:, None]
        tl.store(out_rows + dim[None, :], narrow(result, out.dtype.element_ty), mask=is_row[:, None] & is_dim)
        if lse is not None:
            tl.store(lse + token * stride_lse_token + head, lse_log2 * LN_2, mask=is_row)


@triton.jit
def mixed_attention_kernel(
    q,
    k_cache,
    v_cache,
    cu_seqlens_q,
    seq_lens,
    block_table,
    plan_words,
    out,
    lse,
    partial_out,
    partial_lse,
    tickets,
    stride_q_token,
    stride_q_head,
    stride_k_page,
    stride_k_token,
    stride_k_head,
    stride_v_page,
    stride_v_token,
    stride_v_head,
    stride_block_table,
    stride_out_token,
    stride_out_head,
    stride_lse_token,
    group_size,
    page_size,
    page_shift,
    window_left,
    score_scale,
    score_cap,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_PAGE_SHIFT: tl.constexpr,
    HAS_SAME_STRIDES: tl.constexpr,
):
    """Draws items of the plan until none is left; BLOCK_M holds the rows of each tile kind."""
    num_items = tl.load(plan_words + HEADER_NUM_ITEMS)
    items = plan_words + HEADER_WORDS
    merges = items + tl.load(plan_words + HEADER_CAPACITY_ITEMS).to(tl.int64) * ITEM_WORDS
    item_idx = tl.atomic_add(tickets, 1, sem="relaxed")
    # Hoisting out of this loop would hold every kind's thread offsets in registers at once: spills for a few additions.
    while tl.condition(item_idx < num_items, disable_licm=True):
        item = items + item_idx.to(tl.int64) * ITEM_WORDS
        num_rows = tl.load(item + ITEM_ROWS_AND_KIND) & NUM_ROWS_MASK
        item_kind = tl.load(item + ITEM_ROWS_AND_KIND) >> KIND_SHIFT
        for kind in tl.static_range(NUM_KINDS):
            if item_kind == kind:
                # Once, but where tiles.py had to choose fewer rows than the plan's kind has.
                for first_row in tl.range(0, num_rows, BLOCK_M[kind], num_stages=1, disable_licm=True):
                    attend_item(
                        q, k_cache, v_cache, block_table, out, lse, partial_out, partial_lse, item, first_row,
                        cu_seqlens_q, seq_lens, stride_q_token, stride_q_head, stride_k_page, stride_k_token,
                        stride_k_head, stride_v_page, stride_v_token, stride_v_head, stride_block_table,
                        stride_out_token, stride_out_head, stride_lse_token, group_size, page_size, page_shift,
                        window_left, score_scale, score_cap, HEAD_DIM, BLOCK_D, BLOCK_M[kind], BLOCK_N, NUM_STAGES,
                        IS_CAUSAL, HAS_WINDOW, HAS_SOFT_CAP, HAS_PAGE_SHIFT, HAS_SAME_STRIDES,
                    )  # fmt: skip
        merge_idx = tl.load(item + ITEM_MERGE_IDX)
        if merge_idx >= 0:
            merge = merges + merge_idx.to(tl.int64) * MERGE_WORDS
            ticket = tickets + 1 + merge_idx
            # The barrier puts the partials of all threads before the ticket; its release publishes them, its acquire
            # shows the last finisher those of the others.
            tl.debug_barrier()
            if tl.atomic_add(ticket, 1, sem="acq_rel") == tl.load(merge + MERGE_NUM_SPLITS) - 1:
                merge_item(
                    out, lse, partial_out, partial_lse, merge, cu_seqlens_q, stride_out_token, stride_out_head,
                    stride_lse_token, group_size, HEAD_DIM, BLOCK_D,
                )  # fmt: skip
                tl.store(ticket, 0)  # for the next launch: in this one nobody draws it again
        item_idx = tl.atomic_add(tickets, 1, sem="relaxed")
    # Every program draws one number past the items; whoever draws the last of these resets the counter.
    if item_idx == num_items + tl.num_programs(0) - 1:
        tl.store(tickets, 0)


def mixed_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    plan_words: Tensor,
    out: Tensor,
    lse: Tensor | None,
    partial_out: Tensor,
    partial_lse: Tensor,
    tickets: Tensor,
    *,
    softmax_scale: float,
    causal: bool,
    window_left: int | None,
    soft_cap: float | None,
    num_programs: int | None = None,
) -> None:
    """Runs the items of a plan, and the merges of its split rows, in one launch; writes every row of out and lse.

    Nothing is read back from the device, and the grid does not depend on the batch: one captured graph serves every
    plan written into the same ``plan_words``. Shapes, dtypes and strides are those that ``ops.attention`` has checked;
    all tensors are on one device (the CPU under the interpreter).

    Args:
        q: [total_q, num_q_heads, head_dim]; k_cache, v_cache: [num_pages, page_size, num_kv_heads, head_dim]; of one
            float dtype, any strides, the last dimension contiguous.
        cu_seqlens_q, seq_lens, block_table: int32, as for ``ops.attention``.
        plan_words: int32, the plan's ``buffer``, made with ``PLAN_BLOCK_ROWS`` for these lengths and this mask.
        out: as q, written. lse: [total_q, num_q_heads] float32, written, natural log; or None.
        partial_out: [at least the plan's num_partial_rows, head_dim] float32, contiguous, scratch.
        partial_lse: [at least the plan's num_partial_rows] float32, contiguous, scratch.
        tickets: [at least 1 + the plan's num_merges] int32, zeros; zeros again when the launch has ended. Two launches
            that may overlap need one each, as of the partials.
        softmax_scale: > 0. window_left, soft_cap: None for off.
        num_programs: of the grid; None for one per SM.
    """
    total_q, num_q_heads, head_dim = q.shape
    if total_q == 0:
        return
    page_size, num_kv_heads = k_cache.shape[1:3]
    tiles = choose_tiles(head_dim, q.element_size(), _capability(q.device))
    has_page_shift = page_size & (page_size - 1) == 0
    # In units of log2, so that the kernel's only exponential is exp2; with a cap, tanh's argument is doubled for exp.
    score_scale = softmax_scale * LOG2_E if soft_cap is None else 2.0 * softmax_scale * LOG2_E / soft_cap
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        mixed_attention_kernel[(num_programs or _num_programs(q.device),)](
            q,
            k_cache,
            v_cache,
            cu_seqlens_q,
            seq_lens,
            block_table,
            plan_words,
            out,
            lse,
            partial_out,
            partial_lse,
            tickets,
            q.stride(0),
            q.stride(1),
            k_cache.stride(0),
            k_cache.stride(1),
            k_cache.stride(2),
            v_cache.stride(0),
            v_cache.stride(1),
            v_cache.stride(2),
            block_table.stride(0),
            out.stride(0),
            out.stride(1),
            0 if lse is None else lse.stride(0),
            num_q_heads // num_kv_heads,
            page_size,
            page_size.bit_length() - 1,
            window_left or 0,
            score_scale,
            (soft_cap or 0.0) * LOG2_E,
            HEAD_DIM=head_dim,
            BLOCK_D=tiles.block_d,
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            NUM_STAGES=tiles.num_stages,
            IS_CAUSAL=causal,
            HAS_WINDOW=window_left is not None,
            HAS_SOFT_CAP=soft_cap is not None,
            HAS_PAGE_SHIFT=has_page_shift,
            HAS_SAME_STRIDES=k_cache.stride() == v_cache.stride(),
            num_warps=tiles.num_warps,
            enable_fp_fusion=True,
        )


INTERPRETED_CAPABILITY = (9, 0)
"""The interpreter runs the tiles of an H100."""
INTERPRETED_PROGRAMS = 2
"""The interpreter runs one program after the other: the first draws all items, the last resets the counter."""


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else INTERPRETED_CAPABILITY


@functools.cache
def _num_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count
