# mixed_attention.py: paged attention over prefill chunks and decode rows in one launch.
# Math    o_i = sum_j softmax_j(softmax_scale * q_i.k_j) v_j over the keys j that row i may see; soft cap, ALiBi, sinks
#         and tree masks as ops/attention.py defines them, compiled in where they are used
# Method  persistent programs draw the items of a plan (ops/plan.py) from a counter; online softmax over KV tiles: first
#         those that every row sees whole, without any mask code, then those that it does not; a head_dim of 192 is two
#         products, of 128 and 64 columns; items of split rows leave float32 partials, and the last of them to finish
#         merges them in split order
# Grid    programs of 8 warps, as many as the SMs hold at once, whatever the batch; an item runs in the smallest tile of
#         tiles.py that holds its rows: 128 or 16. Tiles are chosen by the compilers' output: no speed has been measured
# Shapes  q [total_q, num_q_heads, head_dim], k_cache [num_pages, page_size, num_kv_heads, head_dim], out and v_cache
#         with v_head_dim, in bf16, fp16 or fp32, the caches also in int8, fp8 and int4 (_quantized.py) with scales; lse
#         [total_q, num_q_heads] fp32; partials [num_partial_rows, v_head_dim] fp32
# Memory  an item reads keys (head_dim + v_head_dim) element_bytes and rows head_dim element_bytes, and writes rows
#         v_head_dim element_bytes; one of split rows writes and reads again 4 rows (v_head_dim + 1) bytes instead;
#         shared memory as tiles.shared_bytes
# Static  head_dim 128, bf16, pages of 16, group 4, causal (bench/static/README.md has the other cases):
#                         registers  spills  shared bytes  programs  warp instructions per MMA-MFLOP, full tiles
#                                                          per SM    of 128 rows / of 16
#         sm_90 (wgmma)   128        0       98,304        2         759 / 1,976
#         sm_80 (mma)     255        0       73,728        1         933 / 1,900
#         sm_100 (tcgen05) 218       0       98,848        1         719 / 1,854
# Limits  head_dim and v_head_dim up to 256, any page_size, group and strides, the last dimension contiguous; sm_80+;
#         Triton 3.5+. What a deployment fixes is compiled in: group size, page size, window, the strides of pages and
#         of tokens in them
# Twins   csrc/cpu/mixed_attention-inl.h; truth ops/reference.py
# Source  online softmax over tiles: arXiv:2307.08691, section 3; split keys: arXiv:2311.01282, section 3
"""Attention of one step's prefill chunks and decode rows, split keys merged, in one launch; ``attention`` on GPUs."""

from __future__ import annotations

import contextlib
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixattn.triton_kernels._launch import launch, target_capability
from mixattn.triton_kernels._numeric import dot, narrow, widen_parts
from mixattn.triton_kernels._pages import convert, load_keys, load_scales, locate_keys
from mixattn.triton_kernels._quantized import MIN_ROW_SCALE, element_dims, fit_half
from mixattn.triton_kernels._softmax import (
    LN_2,
    LOG2_E,
    absorb_sink,
    absorb_state,
    add_weights,
    finish_rows,
    new_row_sum,
    sum_rows,
    weigh_scores,
    weigh_values,
)
from mixattn.triton_kernels.tiles import TileChoice, TileProblem
from mixattn.triton_kernels.tuned_tiles import Gpu, tiles_for

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
MERGE_NUM_ITEMS = tl.constexpr(6)
NUM_ROWS_MASK = tl.constexpr(0xFFFF)
INT32_MAX = tl.constexpr(2**31 - 1)
TREE_MASK_BITS = tl.constexpr(64)
"""Of a row's word: bit d is for the key d before the row."""
MERGE_BLOCK_ROWS = tl.constexpr(16)
"""Rows merged at once: those of a small tile, so that a merge takes no more registers than the items before it."""


@triton.jit
def apply_tree_mask(is_visible, key, row_position, row_word, slice_begin):
    """is_visible [BLOCK_M, BLOCK_N], less keys of the slice, less than 64 before a row, whose bit in its word is 0."""
    distance = row_position[:, None] - key[None, :]
    has_bit = (key >= slice_begin)[None, :] & (distance >= 0) & (distance < TREE_MASK_BITS)
    bit = row_word[:, None] >> (distance & (TREE_MASK_BITS - 1)).to(tl.int64) & 1
    return is_visible & (~has_bit | (bit == 1))


@triton.constexpr_function
def first_dim(block_d: tuple[int, ...], part: int) -> int:
    """The first dimension of a head that this part of its columns holds."""
    return sum(block_d[:part])


@triton.jit
def load_query(q_rows, is_row, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, KV_FORMAT: tl.constexpr):
    """A tuple: the rows at q_rows [BLOCK_M], in as many tiles as BLOCK_D has widths, [BLOCK_M, BLOCK_D[part]] each."""
    query = ()
    for part in tl.static_range(len(BLOCK_D)):
        dim = first_dim(BLOCK_D, part) + element_dims(BLOCK_D[part], KV_FORMAT)[None, :]
        query += (tl.load(q_rows[:, None] + dim, mask=is_row[:, None] & (dim < HEAD_DIM), other=0.0),)
    return query


@triton.jit
def attend_tile(
    query,
    accumulator,
    row_max,
    row_sum,
    value_max,
    row_position,
    row_kv_end,
    row_slope,
    row_word,
    slice_begin,
    tile_begin,
    kv_begin,
    kv_end,
    block_table_row,
    k_head,
    v_head,
    k_scale_head,
    v_scale_head,
    score_scale,
    score_cap,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    KV_FORMAT: tl.constexpr,
    CAPABILITY: tl.constexpr,
    K_STRIDES: tl.constexpr,
    V_STRIDES: tl.constexpr,
    K_SCALE_STRIDES: tl.constexpr,
    V_SCALE_STRIDES: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    WINDOW_LEFT: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    IS_INVARIANT: tl.constexpr,
    IS_EDGE: tl.constexpr,
):
    """(accumulator, row_max, row_sum, value_max) after the keys [tile_begin, tile_begin + BLOCK_N).

    query is as ``load_query`` made it. Without IS_EDGE every row sees every key of the tile; with it, each its own part
    of [kv_begin, kv_end).
    row_slope (ALiBi's, in log2 units) and row_word (tree_mask's) are None where these are off, and so are k_scale_head
    and v_scale_head without scales per token. score_scale is [1], for all rows, or [BLOCK_M].
    """
    BLOCK_M: tl.constexpr = query[0].shape[0]
    BLOCK_DV: tl.constexpr = accumulator.shape[1]
    dtype: tl.constexpr = query[0].dtype
    key = tile_begin + tl.arange(0, BLOCK_N)
    is_key = (key >= kv_begin) & (key < kv_end)
    k_offsets = locate_keys(block_table_row, tile_begin, kv_end, BLOCK_N, PAGE_SIZE, K_STRIDES, IS_EDGE)
    v_offsets = k_offsets
    if K_STRIDES != V_STRIDES:
        v_offsets = locate_keys(block_table_row, tile_begin, kv_end, BLOCK_N, PAGE_SIZE, V_STRIDES, IS_EDGE)
    # float32 products would have both halves of K and V in shared memory besides: more than there is.
    IS_PINNED: tl.constexpr = dtype != tl.float32
    IS_K_PINNED: tl.constexpr = IS_PINNED and BLOCK_D[0] <= 128  # with more, K spills on its way to shared memory
    scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for part in tl.static_range(len(BLOCK_D)):
        k = load_keys(
            k_head, k_offsets, is_key, HEAD_DIM, first_dim(BLOCK_D, part), BLOCK_D[part], KV_FORMAT, CAPABILITY,
            IS_K_PINNED, IS_EDGE,
        )  # fmt: skip
        k = convert(k, dtype)  # (BLOCK_N, BLOCK_D[part])
        scores = dot(query[part], tl.trans(k), scores)
    if k_scale_head is not None:
        key_scale = load_scales(
            k_scale_head, block_table_row, tile_begin, kv_end, is_key, BLOCK_N, PAGE_SIZE, K_SCALE_STRIDES, IS_EDGE
        )
        scores = scores * key_scale[None, :]
    scale = score_scale
    if HAS_SOFT_CAP:
        # tanh(x) = 1 - 2 / (exp(2x) + 1); score_scale holds 2 log2(e) / soft_cap. exp2 = inf gives 1.
        scores = 1.0 - 2.0 / (tl.exp2(scores * score_scale[:, None]) + 1.0)
        scale = tl.zeros([1], tl.float32) + score_cap
    if row_slope is not None:
        # float32 holds positions up to 2^24 exactly; to convert each distance would take as long as its exponential.
        distance = key.to(tl.float32)[None, :] - row_position.to(tl.float32)[:, None]
        if not IS_CAUSAL:
            distance = -tl.abs(distance)
        scores = scores * scale[:, None] + row_slope[:, None] * distance
        scale = tl.full([1], 1.0, tl.float32)
    if IS_EDGE:
        # Keys before the item's count as behind every row's end: one compare per score and not two.
        bounded_key = tl.where(key >= kv_begin, key, INT32_MAX)
        is_visible = bounded_key[None, :] < row_kv_end[:, None]
        if WINDOW_LEFT is not None:
            is_visible = is_visible & (key[None, :] >= (row_position - WINDOW_LEFT)[:, None])
        if row_word is not None:
            is_visible = apply_tree_mask(is_visible, key, row_position, row_word, slice_begin)
        scores = tl.where(is_visible, scores, -float("inf"))
        if row_word is not None:
            # What the tree hides from all may be NaN. Read off the scores, so that the mask need not outlive them.
            is_key = is_key & (tl.max((scores > -float("inf")).to(tl.int32), 0) == 1)
    weights, row_max, rescale = weigh_scores(scores, scale, row_max, IS_EDGE)
    row_sum = add_weights(row_sum, rescale, weights)
    rescale = rescale[:, None]
    if v_scale_head is not None:
        value_scale = load_scales(
            v_scale_head, block_table_row, tile_begin, kv_end, is_key, BLOCK_N, PAGE_SIZE, V_SCALE_STRIDES, IS_EDGE
        )
        if dtype == tl.float32:
            weights = weights * value_scale[None, :]
        else:
            if IS_INVARIANT:
                value_scale = tl.where(
                    is_visible, value_scale[None, :], 0.0
                )  # a row's unit is then its own keys' alone
            weights, value_max, value_rescale = weigh_values(weights, value_scale, value_max)
            rescale = rescale * value_rescale
    # V of what is no key of the item is 0, not what memory holds there: 0 * NaN would be NaN.
    v = load_keys(v_head, v_offsets, is_key, V_HEAD_DIM, 0, BLOCK_DV, KV_FORMAT, CAPABILITY, IS_PINNED, IS_EDGE)
    v = convert(v, dtype)
    accumulator = dot(narrow(weights, v.dtype), v, accumulator * rescale)  # v is (BLOCK_N, BLOCK_DV)
    return accumulator, row_max, row_sum, value_max


@triton.jit
def store_rows(
    accumulator,
    row_max,
    row_sum,
    out,
    lse,
    partial_out,
    partial_lse,
    sinks,
    item,
    first_row,
    cu_seqlens_q,
    stride_out_token,
    stride_out_head,
    stride_lse_token,
    V_HEAD_DIM: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    KV_FORMAT: tl.constexpr,
    IS_INVARIANT: tl.constexpr,
):
    """The item's rows from first_row on, normalised, to out and lse, or to its rows of the partials."""
    row_sum = sum_rows(row_sum)
    row = first_row + tl.arange(0, accumulator.shape[0])
    is_whole = tl.load(item + ITEM_MERGE_IDX) < 0
    if sinks is not None:
        if IS_INVARIANT:
            # As in the merge, where a row is normalised before the sink comes in.
            accumulator, row_max = finish_rows(accumulator, row_max, row_sum)
            row_sum = tl.where(row_max == -float("inf"), 0.0, 1.0)
        sink_head = tl.load(item + ITEM_KV_HEAD) * GROUP_SIZE + (tl.load(item + ITEM_ROW_BEGIN) + row) % GROUP_SIZE
        end_row = tl.where(is_whole, INT32_MAX, 0)  # split rows get theirs, once, in the merge
        sink = tl.load(sinks + sink_head, mask=row < end_row, other=-float("inf"))
        accumulator, row_max, row_sum = absorb_sink(accumulator, row_max, row_sum, sink)
    result, lse_log2 = finish_rows(accumulator, row_max, row_sum)
    # The item is read again, and volatile: the compiler would keep what these addresses are made from in registers, or
    # spill it, all through the walk over the keys.
    row_begin = tl.load(item + ITEM_ROW_BEGIN, volatile=True)
    num_rows = tl.load(item + ITEM_ROWS_AND_KIND, volatile=True) & NUM_ROWS_MASK
    dim = element_dims(accumulator.shape[1], KV_FORMAT)
    is_row = row < num_rows
    is_value = is_row[:, None] & (dim < V_HEAD_DIM)[None, :]
    if is_whole:
        first_token = tl.load(cu_seqlens_q + tl.load(item + ITEM_SEQ_IDX, volatile=True))
        first_head = tl.load(item + ITEM_KV_HEAD, volatile=True) * GROUP_SIZE
        token = (first_token + (row_begin + row) // GROUP_SIZE).to(tl.int64)
        head = (first_head + (row_begin + row) % GROUP_SIZE).to(tl.int64)
        out_rows = out + (token * stride_out_token + head * stride_out_head)[:, None]
        tl.store(out_rows + dim[None, :], narrow(result, out.dtype.element_ty), mask=is_value)
        if lse is not None:
            tl.store(lse + token * stride_lse_token + head, lse_log2 * LN_2, mask=is_row)
    else:
        # Through L2 (.cg): another program reads these.
        partial_row = (tl.load(item + ITEM_PARTIAL_ROW) + row).to(tl.int64)
        partial_rows = partial_out + (partial_row * V_HEAD_DIM)[:, None]
        tl.store(partial_rows + dim[None, :], result, mask=is_value, cache_modifier=".cg")
        tl.store(partial_lse + partial_row, lse_log2, mask=is_row, cache_modifier=".cg")


@triton.jit
def row_positions(item, first_row, cu_seqlens_q, seq_lens, BLOCK_M: tl.constexpr, GROUP_SIZE: tl.constexpr):
    """(positions of the item's rows from first_row on [BLOCK_M], of the first, of the last, of the slice's first)."""
    seq_idx = tl.load(item + ITEM_SEQ_IDX, volatile=True)
    row_begin = tl.load(item + ITEM_ROW_BEGIN, volatile=True) + first_row
    num_rows = (tl.load(item + ITEM_ROWS_AND_KIND, volatile=True) & NUM_ROWS_MASK) - first_row
    q_len = tl.load(cu_seqlens_q + seq_idx + 1) - tl.load(cu_seqlens_q + seq_idx)
    slice_begin = tl.load(seq_lens + seq_idx) - q_len
    last_row = row_begin + tl.minimum(num_rows, BLOCK_M) - 1
    position = slice_begin + (row_begin + tl.arange(0, BLOCK_M)) // GROUP_SIZE
    first_position = slice_begin + row_begin // GROUP_SIZE
    return position, first_position, slice_begin + last_row // GROUP_SIZE, slice_begin


@triton.jit
def attend_item(
    q,
    k_cache,
    v_cache,
    k_scale,
    v_scale,
    block_table,
    alibi_slopes,
    tree_mask,
    item,
    first_row,
    cu_seqlens_q,
    seq_lens,
    stride_q_token,
    stride_q_head,
    stride_k_head,
    stride_v_head,
    stride_k_scale_head,
    stride_v_scale_head,
    stride_block_table,
    stride_alibi_seq,
    score_scale,
    score_cap,
    value_scale,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    KV_FORMAT: tl.constexpr,
    CAPABILITY: tl.constexpr,
    K_STRIDES: tl.constexpr,
    V_STRIDES: tl.constexpr,
    K_SCALE_STRIDES: tl.constexpr,
    V_SCALE_STRIDES: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    WINDOW_LEFT: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    IS_INVARIANT: tl.constexpr,
):
    """(accumulator, row_max, row_sum) of the item's rows [first_row, first_row + BLOCK_M) over its keys."""
    seq_idx = tl.load(item + ITEM_SEQ_IDX)
    kv_head = tl.load(item + ITEM_KV_HEAD)
    row = tl.load(item + ITEM_ROW_BEGIN) + first_row + tl.arange(0, BLOCK_M)
    num_rows = tl.load(item + ITEM_ROWS_AND_KIND) & NUM_ROWS_MASK
    is_row = first_row + tl.arange(0, BLOCK_M) < num_rows
    token = (tl.load(cu_seqlens_q + seq_idx) + row // GROUP_SIZE).to(tl.int64)
    head = (kv_head * GROUP_SIZE + row % GROUP_SIZE).to(tl.int64)
    q_rows = q + (token * stride_q_token + head * stride_q_head)
    query = load_query(q_rows, is_row, HEAD_DIM, BLOCK_D, KV_FORMAT)
    score_scale = tl.zeros([1], tl.float32) + score_scale
    if KV_FORMAT is not None:
        # float16 holds what is stored exactly, and costs an instruction for two elements where bfloat16 costs four.
        if query[0].dtype == tl.bfloat16:
            query, row_scale = fit_half(query)
            score_scale = score_scale * row_scale
    elif query[0].dtype != k_cache.dtype.element_ty:
        query = widen_parts(query)

    block_table_row = block_table + seq_idx.to(tl.int64) * stride_block_table
    k_head = k_cache + kv_head.to(tl.int64) * stride_k_head
    v_head = v_cache + kv_head.to(tl.int64) * stride_v_head
    # Scales per token go along with the keys, a scale of the head into the scores' and behind the sum.
    k_scale_head = None
    v_scale_head = None
    if k_scale is not None:
        k_scale_head = k_scale + kv_head.to(tl.int64) * stride_k_scale_head
        if K_SCALE_STRIDES is None:
            score_scale = score_scale * tl.load(k_scale_head)
            k_scale_head = None
    if v_scale is not None:
        v_scale_head = v_scale + kv_head.to(tl.int64) * stride_v_scale_head
        if V_SCALE_STRIDES is None:
            value_scale = value_scale * tl.load(v_scale_head)
            v_scale_head = None
    accumulator = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    row_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
    row_sum = new_row_sum(BLOCK_M, BLOCK_N)
    value_max = tl.full([BLOCK_M if IS_INVARIANT else 1, 1], MIN_ROW_SCALE, tl.float32)
    row_slope = None
    if alibi_slopes is not None:
        slopes = alibi_slopes + seq_idx.to(tl.int64) * stride_alibi_seq
        row_slope = tl.load(slopes + head) * LOG2_E
    row_word = None
    if tree_mask is not None:
        row_word = tl.load(tree_mask + token, mask=is_row, other=0)
    # First the tiles that all rows see whole, then those that the window or the causal edge cuts or that reach out of
    # the item. The bounds are made for each walk anew, from memory, so that the first holds nothing for the second.
    # An invariant call has one walk over all of them in order: which tiles are whole depends on a row's company.
    for is_edge in tl.static_range(1 if IS_INVARIANT else 0, 2):
        kv_begin = tl.load(item + ITEM_KV_BEGIN, volatile=True)
        kv_end = tl.load(item + ITEM_KV_END, volatile=True)
        position, first_position, last_position, slice_begin = row_positions(
            item, first_row, cu_seqlens_q, seq_lens, BLOCK_M, GROUP_SIZE
        )
        full_begin = kv_begin
        full_end = kv_end
        row_kv_end = tl.zeros([BLOCK_M], tl.int32) + kv_end
        if WINDOW_LEFT is not None:
            full_begin = tl.minimum(tl.maximum(last_position - WINDOW_LEFT, kv_begin), kv_end)
        if IS_CAUSAL:
            row_kv_end = tl.minimum(position + 1, kv_end)
            full_end = tl.minimum(first_position + 1, kv_end)
        if tree_mask is not None:
            # All see whatever is before the slice, and what is 64 or more before the first of them.
            full_end = tl.minimum(full_end, tl.maximum(slice_begin, first_position + 1 - TREE_MASK_BITS))
            row_kv_end = tl.where(is_row, row_kv_end, 0)  # or rows past the last would see what the tree hides from all
        # Tiles start at multiples of BLOCK_N wherever the item's keys do, so that none straddles a page it need not.
        first_full = tl.cdiv(full_begin, BLOCK_N)
        num_full = tl.maximum(full_end // BLOCK_N - first_full, 0)
        if IS_INVARIANT:
            num_full = 0
        begin = kv_begin // BLOCK_N if is_edge else first_full
        end = tl.cdiv(kv_end, BLOCK_N) - num_full if is_edge else first_full + num_full
        for tile in tl.range(begin, end, num_stages=NUM_STAGES):
            if is_edge:
                tile += tl.where(tile < first_full, 0, num_full)
            accumulator, row_max, row_sum, value_max = attend_tile(
                query, accumulator, row_max, row_sum, value_max, position, row_kv_end, row_slope, row_word, slice_begin,
                tile * BLOCK_N, kv_begin, kv_end, block_table_row, k_head, v_head, k_scale_head, v_scale_head,
                score_scale, score_cap, HEAD_DIM, V_HEAD_DIM, BLOCK_D, BLOCK_N, PAGE_SIZE, KV_FORMAT, CAPABILITY,
                K_STRIDES, V_STRIDES, K_SCALE_STRIDES, V_SCALE_STRIDES, IS_CAUSAL, WINDOW_LEFT, HAS_SOFT_CAP,
                IS_INVARIANT, IS_EDGE=is_edge == 1,
            )  # fmt: skip
    if v_scale_head is not None and query[0].dtype != tl.float32:
        accumulator = accumulator * value_max
    elif KV_FORMAT is not None:
        accumulator = accumulator * value_scale
    return accumulator, row_max, row_sum


@triton.jit
def merge_item(
    out,
    lse,
    partial_out,
    partial_lse,
    sinks,
    merge,
    cu_seqlens_q,
    stride_out_token,
    stride_out_head,
    stride_lse_token,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    """The partials of all splits of some rows, in split order, to out and lse."""
    first_token = tl.load(cu_seqlens_q + tl.load(merge + MERGE_SEQ_IDX))
    first_head = tl.load(merge + MERGE_KV_HEAD) * GROUP_SIZE
    row_begin = tl.load(merge + MERGE_ROW_BEGIN)
    num_rows = tl.load(merge + MERGE_NUM_ROWS)
    first_partial_row = tl.load(merge + MERGE_PARTIAL_ROW)
    num_splits = tl.load(merge + MERGE_NUM_SPLITS)
    dim = tl.arange(0, BLOCK_DV)
    is_dim = (dim < V_HEAD_DIM)[None, :]
    for block_begin in tl.range(0, num_rows, MERGE_BLOCK_ROWS, num_stages=1):
        row = block_begin + tl.arange(0, MERGE_BLOCK_ROWS)
        is_row = row < num_rows
        accumulator = tl.zeros([MERGE_BLOCK_ROWS, BLOCK_DV], tl.float32)
        row_max = tl.full([MERGE_BLOCK_ROWS], -float("inf"), tl.float32)
        row_sum = tl.zeros([MERGE_BLOCK_ROWS], tl.float32)
        for split in tl.range(0, num_splits, num_stages=1):
            partial_row = (first_partial_row + split * num_rows + row).to(tl.int64)
            # Through L2 (.cg): L1 may hold what was here before another program wrote.
            split_lse = tl.load(partial_lse + partial_row, mask=is_row, other=-float("inf"), cache_modifier=".cg")
            split_out = tl.load(
                partial_out + (partial_row * V_HEAD_DIM)[:, None] + dim[None, :],
                mask=is_row[:, None] & is_dim,
                other=0.0,
                cache_modifier=".cg",
            )  # (MERGE_BLOCK_ROWS, BLOCK_DV)
            accumulator, row_max, row_sum = absorb_state(accumulator, row_max, row_sum, split_out, split_lse)
        token = (first_token + (row_begin + row) // GROUP_SIZE).to(tl.int64)
        head = (first_head + (row_begin + row) % GROUP_SIZE).to(tl.int64)
        if sinks is not None:
            accumulator, row_max, row_sum = absorb_sink(accumulator, row_max, row_sum, tl.load(sinks + head))
        result, lse_log2 = finish_rows(accumulator, row_max, row_sum)
        out_rows = out + (token * stride_out_token + head * stride_out_head)[:, None]
        tl.store(out_rows + dim[None, :], narrow(result, out.dtype.element_ty), mask=is_row[:, None] & is_dim)
        if lse is not None:
            tl.store(lse + token * stride_lse_token + head, lse_log2 * LN_2, mask=is_row)


@triton.jit
def mixed_attention_kernel(
    q,
    k_cache,
    v_cache,
    k_scale,
    v_scale,
    cu_seqlens_q,
    seq_lens,
    block_table,
    plan_words,
    alibi_slopes,
    sinks,
    tree_mask,
    out,
    lse,
    partial_out,
    partial_lse,
    tickets,
    stride_q_token,
    stride_q_head,
    stride_k_head,
    stride_v_head,
    stride_k_scale_head,
    stride_v_scale_head,
    stride_block_table,
    stride_alibi_seq,
    stride_out_token,
    stride_out_head,
    stride_lse_token,
    score_scale,
    score_cap,
    value_scale,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    KV_FORMAT: tl.constexpr,
    CAPABILITY: tl.constexpr,
    K_STRIDES: tl.constexpr,
    V_STRIDES: tl.constexpr,
    K_SCALE_STRIDES: tl.constexpr,
    V_SCALE_STRIDES: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    WINDOW_LEFT: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    IS_INVARIANT: tl.constexpr,
):
    """Draws items of the plan until none is left; BLOCK_M, BLOCK_N and NUM_STAGES have an entry for each tile."""
    num_items = tl.load(plan_words + HEADER_NUM_ITEMS)
    items = plan_words + HEADER_WORDS
    merges = items + tl.load(plan_words + HEADER_CAPACITY_ITEMS).to(tl.int64) * ITEM_WORDS
    item_idx = tl.atomic_add(tickets, 1, sem="relaxed")
    # Hoisting out of this loop would hold every tile's thread offsets in registers at once: spills for a few additions.
    while tl.condition(item_idx < num_items, disable_licm=True):
        item = items + item_idx.to(tl.int64) * ITEM_WORDS
        num_rows = tl.load(item + ITEM_ROWS_AND_KIND) & NUM_ROWS_MASK
        for tile in tl.static_range(len(BLOCK_M)):
            # The smallest tile that holds the rows; more than the largest holds are walked in turns.
            most_rows = BLOCK_M[tile] if tile > 0 else NUM_ROWS_MASK
            too_few_rows = BLOCK_M[tile + 1] if tile + 1 < len(BLOCK_M) else 0
            if (num_rows <= most_rows) & (num_rows > too_few_rows):
                for first_row in tl.range(0, num_rows, BLOCK_M[tile], num_stages=1, disable_licm=True):
                    accumulator, row_max, row_sum = attend_item(
                        q, k_cache, v_cache, k_scale, v_scale, block_table, alibi_slopes, tree_mask, item, first_row,
                        cu_seqlens_q, seq_lens, stride_q_token, stride_q_head, stride_k_head, stride_v_head,
                        stride_k_scale_head, stride_v_scale_head, stride_block_table, stride_alibi_seq, score_scale,
                        score_cap, value_scale, HEAD_DIM, V_HEAD_DIM, BLOCK_D, BLOCK_DV, BLOCK_M[tile], BLOCK_N[tile],
                        NUM_STAGES[tile], GROUP_SIZE, PAGE_SIZE, KV_FORMAT, CAPABILITY, K_STRIDES, V_STRIDES,
                        K_SCALE_STRIDES, V_SCALE_STRIDES, IS_CAUSAL, WINDOW_LEFT, HAS_SOFT_CAP, IS_INVARIANT,
                    )  # fmt: skip
                    store_rows(
                        accumulator, row_max, row_sum, out, lse, partial_out, partial_lse, sinks, item, first_row,
                        cu_seqlens_q, stride_out_token, stride_out_head, stride_lse_token, V_HEAD_DIM, GROUP_SIZE,
                        KV_FORMAT, IS_INVARIANT,
                    )  # fmt: skip
        merge_idx = tl.load(item + ITEM_MERGE_IDX)
        if merge_idx >= 0:
            merge = merges + merge_idx.to(tl.int64) * MERGE_WORDS
            ticket = tickets + 1 + merge_idx
            # The barrier puts the partials of all threads before the ticket; its release publishes them, its acquire
            # shows the last finisher those of the others.
            tl.debug_barrier()
            if tl.atomic_add(ticket, 1, sem="acq_rel") == tl.load(merge + MERGE_NUM_ITEMS) - 1:
                merge_item(
                    out, lse, partial_out, partial_lse, sinks, merge, cu_seqlens_q, stride_out_token, stride_out_head,
                    stride_lse_token, V_HEAD_DIM, BLOCK_DV, GROUP_SIZE,
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
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    tree_mask: Tensor | None = None,
    kv_format: str | None = None,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    invariant: bool = False,
    tiles: TileChoice | None = None,
    num_programs: int | None = None,
) -> None:
    """Runs the items of a plan, and the merges of its split rows, in one launch; writes every row of out and lse.

    Nothing is read back from the device, and the grid does not depend on the batch: one captured graph serves every
    plan written into the same ``plan_words``. Shapes, dtypes and strides are those that ``ops.attention`` has checked;
    all tensors are on one device (the CPU under the interpreter).

    Args:
        q: [total_q, num_q_heads, head_dim]; k_cache, v_cache: [num_pages, page_size, num_kv_heads, head_dim], and with
            v_head_dim, float or quantised (uint8 holds int4, [..., head_dim / 2]); any strides, the last dimension
            contiguous.
        cu_seqlens_q, seq_lens, block_table: int32, as for ``ops.attention``.
        plan_words: int32, the plan's ``buffer``, made with ``PLAN_BLOCK_ROWS`` for these lengths and this mask.
        out: [total_q, num_q_heads, v_head_dim], q's dtype, written. lse: [total_q, num_q_heads] float32, written,
            natural log; or None.
        partial_out: [at least the plan's num_partial_rows, v_head_dim] float32, contiguous, scratch.
        partial_lse: [at least the plan's num_partial_rows] float32, contiguous, scratch.
        tickets: [at least 1 + the plan's num_merges] int32, zeros; zeros again when the launch has ended. Two launches
            that may overlap need one each, as of the partials.
        softmax_scale: > 0. window_left, soft_cap: None for off.
        alibi_slopes: [num_q_heads] or [num_seqs, num_q_heads] float32; sinks: [num_q_heads] float32; tree_mask:
            [total_q] int64; as for ``ops.attention``, None for off.
        kv_format: int8, float8_e4m3fn, float8_e5m2 or int4, what the caches are quantised to; None for float.
        k_scale, v_scale: of quantised caches, as for ``ops.attention``.
        invariant: as for ``ops.attention``; the plan is made so, too.
        tiles: to run in; None for those of ``choose_call_tiles``.
        num_programs: of the grid; None for as many as the SMs hold at once.
    """
    total_q, num_q_heads, _ = q.shape
    if total_q == 0:
        return
    page_size, num_kv_heads = k_cache.shape[1:3]
    has_row_terms = alibi_slopes is not None or tree_mask is not None
    if tiles is None:
        tiles = choose_call_tiles(q, v_cache, kv_format, has_row_terms=has_row_terms, invariant=invariant)
    major, minor = capability(q.device)
    if kv_format is not None:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    k_scales, k_scale_head_stride, k_scale_strides = _scale_arguments(k_scale)
    v_scales, v_scale_head_stride, v_scale_strides = _scale_arguments(v_scale)
    if isinstance(k_scale, (float, int)):
        softmax_scale *= k_scale
    # In units of log2, so that the kernel's only exponential is exp2; with a cap, tanh's argument is doubled for exp.
    score_scale = softmax_scale * LOG2_E.value if soft_cap is None else 2.0 * softmax_scale * LOG2_E.value / soft_cap
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        launch(mixed_attention_kernel, (num_programs or tiles.programs_per_sm * num_sms(q.device),))(
            q,
            k_cache,
            v_cache,
            k_scales,
            v_scales,
            cu_seqlens_q,
            seq_lens,
            block_table,
            plan_words,
            alibi_slopes,
            sinks,
            tree_mask,
            out,
            lse,
            partial_out,
            partial_lse,
            tickets,
            q.stride(0),
            q.stride(1),
            k_cache.stride(2),
            v_cache.stride(2),
            k_scale_head_stride,
            v_scale_head_stride,
            block_table.stride(0),
            0 if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes.stride(0),
            out.stride(0),
            out.stride(1),
            0 if lse is None else lse.stride(0),
            score_scale,
            (soft_cap or 0.0) * LOG2_E.value,
            float(v_scale) if isinstance(v_scale, (float, int)) else 1.0,
            HEAD_DIM=q.shape[2],
            V_HEAD_DIM=out.shape[2],
            BLOCK_D=tiles.block_d,
            BLOCK_DV=tiles.block_dv,
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            NUM_STAGES=tiles.num_stages,
            GROUP_SIZE=num_q_heads // num_kv_heads,
            PAGE_SIZE=page_size,
            IS_CAUSAL=causal,
            WINDOW_LEFT=window_left,
            HAS_SOFT_CAP=soft_cap is not None,
            IS_INVARIANT=invariant,
            KV_FORMAT=kv_format,
            CAPABILITY=10 * major + minor if q.is_cuda or target_capability() is not None else 0,
            K_STRIDES=k_cache.stride()[:2],
            V_STRIDES=v_cache.stride()[:2],
            K_SCALE_STRIDES=k_scale_strides,
            V_SCALE_STRIDES=v_scale_strides,
            num_warps=tiles.num_warps,
            maxnreg=tiles.max_registers,
            enable_fp_fusion=True,
        )


def choose_call_tiles(
    q: Tensor, v_cache: Tensor, kv_format: str | None, *, has_row_terms: bool, invariant: bool
) -> TileChoice:
    """The tiles that a call runs in; ``has_row_terms`` as for ``choose_tiles``, the rest as for ``mixed_attention``."""
    element_bytes, stored_bits = product_elements(q.dtype, v_cache.dtype, kv_format)
    v_head_dim = v_cache.shape[3] * (2 if kv_format == "int4" else 1)
    problem = TileProblem(
        q.shape[2], v_head_dim, element_bytes, stored_bits, kv_format, has_row_terms, has_one_kind=invariant
    )
    return tiles_for(problem, gpu(q.device))


def product_elements(q_dtype: torch.dtype, kv_dtype: torch.dtype, kv_format: str | None) -> tuple[int, int]:
    """(bytes of an element in the matrix products, bits of an element of K and V in memory).

    Products are of q's dtype where K and V have it too; of float16 where 16-bit queries meet quantised K and V, which
    it holds exactly; and of float32 otherwise.
    """
    stored_bits = 4 if kv_format == "int4" else 8 * kv_dtype.itemsize
    is_narrow = q_dtype.itemsize == 2 and (kv_dtype == q_dtype or kv_format is not None)
    return 2 if is_narrow else 4, stored_bits


def _scale_arguments(scale: float | Tensor | None) -> tuple[Tensor | None, int, tuple[int, int] | None]:
    """(the tensor, the stride of its heads, those of its pages and tokens); None where it has none."""
    if not isinstance(scale, Tensor):
        return None, 0, None
    return scale, scale.stride(-1), None if scale.dim() == 1 else (scale.stride(0), scale.stride(1))


INTERPRETED_CAPABILITY = (9, 0)
"""The interpreter runs the tiles of an H100."""
INTERPRETED_NAME = "Triton's interpreter"
INTERPRETED_SMS = 1
"""The interpreter runs one program after the other: the first draws all items, the last resets the counter."""


def capability(device: torch.device) -> tuple[int, int]:
    """Whose tiles a launch on this device runs in, or is compiled for."""
    target = target_capability()
    return _capability(device) if target is None else target


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else INTERPRETED_CAPABILITY


def gpu(device: torch.device) -> Gpu:
    """Whose tuned tiles a launch on this device runs in; nobody's for a target, of which no more is known."""
    target = target_capability()
    return _gpu(device) if target is None else Gpu(f"sm_{10 * target[0] + target[1]}", target)


@functools.cache
def _gpu(device: torch.device) -> Gpu:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else INTERPRETED_NAME
    return Gpu(name, _capability(device))


@functools.cache
def num_sms(device: torch.device) -> int:
    """Of this device; as if it had one under the interpreter."""
    if device.type != "cuda":
        return INTERPRETED_SMS
    return torch.cuda.get_device_properties(device).multi_processor_count
