"""The online softmax in base 2, shared by the kernels: a step over a tile of scores, its end, the merge of results.

log2(e) is folded into the scores' scale on the host, so that exp2 is the whole exponential.
Source: online softmax, arXiv:1805.02867, algorithm 3; as in FlashAttention-2, arXiv:2307.08691, section 3.1.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
"""A score in natural log times this is one in base 2."""
LN_2 = tl.constexpr(0.6931471805599453)
"""lse in base 2 times this is lse in natural log."""
MAX_ROWS_OF_COLUMN_SUMS = tl.constexpr(16)
"""Those of an mma.sync: with more, a column's sums take as many registers as the scores."""


@triton.jit
def weigh_scores(scores, scale_log2, row_max, MAY_BE_EMPTY: tl.constexpr):
    """(weights, new_row_max, rescale): exp2(scores * scale_log2 - new_row_max), and the factor of all earlier sums.

    Args:
        scores: [BLOCK_M, BLOCK_N] float32, not yet scaled, -inf where masked.
        scale_log2: [1], for all rows, or [BLOCK_M], > 0; to scale the maximum and not each score leaves one
            multiply-add per score before exp2.
        row_max: [BLOCK_M] float32, of all earlier scores, scaled; -inf before the first.
        MAY_BE_EMPTY: whether a row may have no score above -inf up to here.
    """
    new_row_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
    offset = new_row_max
    if MAY_BE_EMPTY:
        # -inf - -inf would be NaN: a row without keys subtracts 0 and gets weights exp2(-inf) = 0.
        offset = tl.where(new_row_max == -float("inf"), 0.0, new_row_max)
    weights = tl.exp2(scores * scale_log2[:, None] - offset[:, None])
    rescale = tl.exp2(row_max - offset)
    return weights, new_row_max, rescale


@triton.jit
def weigh_values(weights, value_scale, value_max):
    """(weights, new_value_max, rescale): weights * value_scale in units of the largest value_scale up to here.

    The products with V are of float16, in which small scales would be lost. (A scale that is NaN stays one.)

    Args:
        weights: [BLOCK_M, BLOCK_N] float32 in [0, 1].
        value_scale: [BLOCK_N] or [BLOCK_M, BLOCK_N] float32, 0 for what no row or the row does not see.
        value_max: [1, 1] or [BLOCK_M, 1] float32, > 0; the accumulator is in units of it and is to be multiplied with
            rescale.
    """
    if len(value_scale.shape) == 1:
        new_value_max = tl.maximum(value_max, tl.max(value_scale, 0))
        value_scale = value_scale[None, :]
    else:
        new_value_max = tl.maximum(value_max, tl.max(value_scale, 1)[:, None])
    inverse = 1.0 / new_value_max
    return weights * (value_scale * inverse), new_value_max, value_max * inverse


@triton.jit
def new_row_sum(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Zeros that ``add_weights`` adds to: a sum per row, or, for few rows, [BLOCK_M, BLOCK_N].

    The weights of a small tile are spread over all warps. To add them up in every tile would take barriers; to keep a
    sum for each column and add those up at the end takes a multiply-add for each of a thread's few weights.
    """
    if BLOCK_M <= MAX_ROWS_OF_COLUMN_SUMS:
        row_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    else:
        row_sum = tl.zeros([BLOCK_M], tl.float32)
    return row_sum


@triton.jit
def add_weights(row_sum, rescale, weights):
    """row_sum, rescaled, and weights [BLOCK_M, BLOCK_N] added, in the form that ``new_row_sum`` made."""
    if len(row_sum.shape) == 2:
        row_sum = row_sum * rescale[:, None] + weights
    else:
        row_sum = row_sum * rescale + tl.sum(weights, 1)
    return row_sum


@triton.jit
def sum_rows(row_sum):
    """[BLOCK_M]: the sum per row, of what ``new_row_sum`` made."""
    if len(row_sum.shape) == 2:
        row_sum = tl.sum(row_sum, 1)
    return row_sum


@triton.jit
def finish_rows(accumulator, row_max, row_sum):
    """(out, lse_log2) of rows: out [BLOCK_M, BLOCK_D] and lse_log2 [BLOCK_M]; 0 and -inf where row_sum is 0."""
    is_empty = row_sum == 0.0
    safe_sum = tl.where(is_empty, 1.0, row_sum)
    return accumulator * (1.0 / safe_sum)[:, None], tl.where(is_empty, -float("inf"), row_max + tl.log2(safe_sum))


@triton.jit
def absorb_state(accumulator, row_max, row_sum, state_out, state_lse_log2):
    """(accumulator, row_max, row_sum) after one more state: a result over other keys, normalised by its own sum.

    Args:
        accumulator: [ROWS, BLOCK_D] float32; row_max, row_sum: [ROWS] float32; 0, -inf and 0 before the first state.
        state_out: [ROWS, BLOCK_D] float32, finite; state_lse_log2: [ROWS] float32, -inf for a state without keys.
    Source: merge of online-softmax states, arXiv:1805.02867.
    """
    new_row_max = tl.maximum(row_max, state_lse_log2)
    # As in weigh_scores: no -inf - -inf while all states so far are empty.
    offset = tl.where(new_row_max == -float("inf"), 0.0, new_row_max)
    rescale = tl.exp2(row_max - offset)
    weight = tl.exp2(state_lse_log2 - offset)
    return accumulator * rescale[:, None] + state_out * weight[:, None], new_row_max, row_sum * rescale + weight


@triton.jit
def absorb_sink(accumulator, row_max, row_sum, sink):
    """(accumulator, row_max, row_sum) after one more logit, natural log, that has no value: sink [ROWS] float32."""
    return absorb_state(accumulator, row_max, row_sum, 0.0, sink * LOG2_E)
