# sampling.py: one token per row of logits: min-p, top-k, top-p, and the draw among what they leave.
# Math    x_i = (logit_i - max) / temperature; kept are x_i >= floor; the token where exp(x_i) / e_i is largest, with
#         e_i ~ Exp(1) a function of (seed, output_idx, i); floor is the largest of log(min_p), the top_k-th largest x,
#         and the least x of the shortest run of largest x with top_p of the weight above the other two
# Method  nothing is sorted: x <= 0, so that its bits without the sign order it, and the floor's 31 bits are found by
#         bisection, counting tokens or adding weights up in float64; tokens that tie with the last one kept are kept
# Grid    one program per row, 8 warps; up to 64 walks over a row, which stays in the caches
# Shapes  logits [num_rows, vocab_size] fp32
# Memory  4 vocab_size bytes per row and walk, from L1 or L2 after the first; no shared memory to speak of
# Limits  any vocab_size below 2^31; finite maxima
# Twins   ops/sampling.py (_draw), in torch, which it follows number by number
# Source  the race and its equivalence to categorical sampling, arXiv:1611.00712 section 2
"""Drawing tokens from logits on GPUs; what ``ops.sampling`` does for rows that are not greedy."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixattn.triton_kernels._launch import launch

MAX_BLOCK = 8192
"""Logits of a row at once: 32 for each of 256 threads."""
INFINITY_BITS = tl.constexpr(0x7F800000)


@triton.jit
def load_magnitudes(row, column, vocab_size, best, temperature):
    """[BLOCK] int32, the bits of -x: the smaller, the likelier; those of infinity past the row's end."""
    logit = tl.load(row + column, mask=column < vocab_size, other=-float("inf"))
    scaled = tl.math.div_rn(logit - best, tl.zeros_like(logit) + temperature)
    return scaled.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def weigh(magnitude):
    """exp(x) of the bits of -x."""
    return tl.exp(-magnitude.to(tl.float32, bitcast=True))


@triton.jit
def amount_within(row, vocab_size, best, temperature, bound, IS_COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """float64: how many tokens have magnitudes up to the bound, or how much they weigh."""
    amount = tl.zeros([BLOCK], tl.float64)
    for begin in tl.range(0, vocab_size, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        magnitude = load_magnitudes(row, column, vocab_size, best, temperature)
        is_within = (magnitude <= bound) & (column < vocab_size)
        if IS_COUNT:
            amount += is_within.to(tl.float64)
        else:
            amount += tl.where(is_within, weigh(magnitude), 0.0).to(tl.float64)
    return tl.sum(amount, 0)


@triton.jit
def least_bound(row, vocab_size, best, temperature, high, needed, IS_COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The least bound, at most high, within which there is what is needed."""
    low = high * 0
    while low < high:
        middle = low + (high - low) // 2
        if amount_within(row, vocab_size, best, temperature, middle, IS_COUNT, BLOCK) >= needed:
            high = middle
        else:
            low = middle + 1
    return low


@triton.jit
def murmur_mix(x):
    """murmur3's finaliser on uint32."""
    x = (x ^ (x >> 16)) * tl.full([1], 0x85EBCA6B, tl.uint32)
    x = (x ^ (x >> 13)) * tl.full([1], 0xC2B2AE35, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def exponential(token, key_low, key_high):
    """Exp(1) variates float32, one per token: -log(1 - uniform)."""
    mixed = murmur_mix(token.to(tl.uint32) * tl.full([1], 0x9E3779B9, tl.uint32))
    mixed = murmur_mix((mixed ^ key_low.to(tl.uint32, bitcast=True)) * (key_high.to(tl.uint32, bitcast=True) | 1))
    uniform = ((mixed & 0x7FFFFFFF).to(tl.int32).to(tl.float32) + 0.5) * 2.0**-31
    u = tl.minimum(uniform, 1.0 - 2.0**-24)
    # Near 0, where races are won, the series to u^6: of log's argument few bits would be left there.
    series = u * (1.0 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u * (1 / 5 + u * (1 / 6))))))
    return tl.where(u < 0.05, series, -tl.log(1.0 - u))


@triton.jit
def draw_kernel(
    logits,
    row_ids,
    maxima,
    temperatures,
    top_ks,
    top_ps,
    log_min_ps,
    keys,
    token_ids,
    stride_logits_row,
    vocab_size,
    BLOCK: tl.constexpr,
):
    """One of the rows row_ids [num_draws]; the other arrays are as row_ids, keys is [num_draws, 2] int32."""
    draw = tl.program_id(0)
    row = logits + tl.load(row_ids + draw) * stride_logits_row
    best = tl.load(maxima + draw)
    temperature = tl.load(temperatures + draw)
    top_k = tl.load(top_ks + draw)
    top_p = tl.load(top_ps + draw)
    log_min_p = tl.load(log_min_ps + draw)
    bound = (-log_min_p).to(tl.int32, bitcast=True)  # infinity's without min_p
    if (top_k > 0) & (top_k < vocab_size):
        kth = least_bound(row, vocab_size, best, temperature, INFINITY_BITS + bound * 0, top_k, True, BLOCK)
        bound = tl.minimum(bound, kth)
    if top_p < 1.0:
        needed = top_p * amount_within(row, vocab_size, best, temperature, bound, False, BLOCK)
        bound = least_bound(row, vocab_size, best, temperature, bound, needed, False, BLOCK)
    key_low = tl.load(keys + 2 * draw)
    key_high = tl.load(keys + 2 * draw + 1)
    best_score = tl.load(temperatures + draw) * 0.0 - 1.0
    best_token = draw * 0
    for begin in tl.range(0, vocab_size, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        magnitude = load_magnitudes(row, column, vocab_size, best, temperature)
        score = tl.math.div_rn(weigh(magnitude), exponential(column, key_low, key_high))
        score = tl.where((magnitude <= bound) & (column < vocab_size), score, -1.0)
        block_score, block_token = tl.max(score, 0, return_indices=True)
        is_better = block_score > best_score
        best_score = tl.where(is_better, block_score, best_score)
        best_token = tl.where(is_better, begin + block_token, best_token)
    tl.store(token_ids + draw, best_token.to(tl.int64))


def draw(
    logits: Tensor,
    row_ids: Tensor,
    maxima: Tensor,
    temperatures: Tensor,
    top_ks: Tensor,
    top_ps: Tensor,
    log_min_ps: Tensor,
    keys: Tensor,
) -> Tensor:
    """[num_draws] int64, the tokens drawn from the rows ``row_ids`` of logits.

    Args:
        logits: [num_rows, vocab_size] float32, the last dimension contiguous.
        row_ids: [num_draws] int64; maxima: [num_draws] float32, the rows' finite largest logits.
        temperatures: [num_draws] float32, > 0; top_ks: int32, 0 for off; top_ps: float64, 1 for off; log_min_ps:
            float32, <= 0, -inf for off.
        keys: [num_draws, 2] int32, the low and the high word of each draw's random stream.
    """
    token_ids = torch.empty_like(row_ids)
    vocab_size = logits.shape[1]
    with torch.cuda.device(logits.device) if logits.is_cuda else contextlib.nullcontext():
        launch(draw_kernel, (len(row_ids),))(
            logits,
            row_ids,
            maxima,
            temperatures,
            top_ks,
            top_ps,
            log_min_ps,
            keys,
            token_ids,
            logits.stride(0),
            vocab_size,
            BLOCK=min(triton.next_power_of_2(vocab_size), MAX_BLOCK),
            num_warps=8,
            enable_fp_fusion=False,
        )
    return token_ids
