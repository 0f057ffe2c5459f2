"""Tokens from logits: penalties, filters, and a draw that depends on the request alone.

The draw is an exponential race (Gumbel-max): token i wins where e_i / p_i is smallest, e_i ~ Exp(1) being a pure
function of (seed, output_idx, i). The row's company plays no part in it. Nor does it matter that a matrix product
rounds differently when it has more rows: a token changes only where the two best of the race are as close as that
rounding (~1e-5 of the draws). Inverting the cumulative distribution would need one number instead of a vocabulary of
them, but there every border behind a changed probability moves: logits off by 1e-5 changed 2 of 1,000 draws over 20,480
tokens.

Source: the race and its equivalence to categorical sampling, arXiv:1611.00712 section 2; murmur3's 32-bit finaliser for
tokens, splitmix64 for keys (both public domain).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from mixattn.ops.backends import has_triton_for
from mixattn.types import SamplingParams

_MASK64 = (1 << 64) - 1
_TOP_P_CUTS = (-8.0, -16.0, -math.inf)
"""Logits over temperature, a row's maximum being 0. What lies below a cut is sorted only if what lies above has too
little: a few dozen to a few thousand tokens make up 0.95 of a real row."""


@dataclass(frozen=True)
class SamplingRow:
    """What the choice of one token depends on besides its logits.

    Args:
        params: the request's; the seed is given unless it is greedy.
        output_idx: tokens the request has generated before; the counter of its random stream.
        history: prompt and output tokens so far; read only where ``params.uses_history``.
        prompt_len: how many of ``history`` are the prompt.
    """

    params: SamplingParams
    output_idx: int
    history: Sequence[int]
    prompt_len: int


def sample(logits: Tensor, rows: Sequence[SamplingRow], eos_token_ids: frozenset[int] = frozenset()) -> list[int]:
    """One token id per row.

    Args:
        logits: [num_rows, vocab_size] float32, any device; overwritten.
        rows: one entry per row of logits.
        eos_token_ids: ends of sequence, held back with ``stop_token_ids`` until ``min_tokens``.
    Raises:
        RuntimeError: a row holds NaN, or nothing but -inf.
    """
    if logits.shape[0] != len(rows):
        raise ValueError(f"logits has {logits.shape[0]} rows for {len(rows)} requests")
    for idx, row in enumerate(rows):
        if row.params.logit_bias or row.params.uses_history or row.output_idx < row.params.min_tokens:
            _apply_processors(logits[idx], row, eos_token_ids)
    token_ids, best = _find_best(logits)
    drawn = [idx for idx, row in enumerate(rows) if not row.params.is_greedy]
    if drawn and has_triton_for(logits.device.type):
        from mixattn.triton_kernels import sampling as triton_sampling

        arguments = draw_arguments(drawn, [rows[idx] for idx in drawn], [best[idx] for idx in drawn], logits.device)
        for idx, token_id in zip(drawn, triton_sampling.draw(logits, *arguments).tolist(), strict=True):
            token_ids[idx] = token_id
        return token_ids
    for idx in drawn:
        token_ids[idx] = _draw(logits[idx].sub_(best[idx]), rows[idx])
    return token_ids


def draw_arguments(
    row_ids: Sequence[int], rows: Sequence[SamplingRow], maxima: Sequence[float], device: torch.device
) -> tuple[Tensor, ...]:
    """What ``triton_kernels.sampling.draw`` takes besides the logits, for these rows of them.

    Args:
        maxima: the largest logit of each row.
    """
    params = [row.params for row in rows]
    keys = []
    for row in rows:
        if row.params.seed is None:
            raise ValueError("seed must be given to draw a token")
        key = _stream_key(row.params.seed, row.output_idx)
        keys.append((_int32(key), _int32(key >> 32)))
    log_min_ps = [math.log(p.min_p) if p.min_p > 0 else -math.inf for p in params]
    return (
        torch.tensor(row_ids, dtype=torch.int64, device=device),
        torch.tensor(maxima, dtype=torch.float32, device=device),
        torch.tensor([max(p.temperature, 1e-5) for p in params], dtype=torch.float32, device=device),
        torch.tensor([max(p.top_k, 0) for p in params], dtype=torch.int32, device=device),
        torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device),
        torch.tensor(log_min_ps, dtype=torch.float32, device=device),
        torch.tensor(keys, dtype=torch.int32, device=device),
    )


def _argmax(values: Tensor) -> Tensor:
    """The index of the last dimension's largest value, the first of equals; of a NaN if there is one. int64."""
    if values.device.type == "cpu":
        return torch.as_tensor(values.numpy().argmax(-1))  # 8 us for 49,152 values; torch.argmax takes 54
    return values.argmax(-1)


def _find_best(logits: Tensor) -> tuple[list[int], list[float]]:
    """The argmax of each row and its logit; RuntimeError if one is not finite."""
    ids: list[int]
    best: list[float]
    if logits.device.type == "cpu":  # numpy: between two steps each operator of torch takes 40 us, a call of numpy's 4
        values = logits.numpy()
        ids = values.argmax(-1).tolist()
        best = [values.item(row, token_id) for row, token_id in enumerate(ids)]
    else:
        best_ids = logits.argmax(-1)
        ids, best = best_ids.tolist(), logits.gather(1, best_ids[:, None])[:, 0].tolist()
    if not all(map(math.isfinite, best)):
        bad = [idx for idx, logit in enumerate(best) if not math.isfinite(logit)]
        raise RuntimeError(f"the model's logits are NaN or infinite in rows {bad} of the step")
    return ids, best


def _apply_processors(logits: Tensor, row: SamplingRow, eos_token_ids: frozenset[int]) -> None:
    """Bias, penalties and the mask of ``min_tokens``, in vLLM's order, on one row [vocab_size] in place."""
    params = row.params
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias.keys()), device=logits.device)
        logits[ids] += torch.tensor(list(params.logit_bias.values()), dtype=logits.dtype, device=logits.device)
    if params.uses_history:
        _apply_penalties(logits, row)
    if row.output_idx < params.min_tokens:
        held_back = sorted(eos_token_ids | set(params.stop_token_ids))
        logits[torch.tensor(held_back, dtype=torch.int64, device=logits.device)] = -math.inf


def _apply_penalties(logits: Tensor, row: SamplingRow) -> None:
    params = row.params
    if params.repetition_penalty != 1:
        seen = torch.tensor(list(row.history), dtype=torch.int64, device=logits.device)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    output = torch.tensor(list(row.history[row.prompt_len :]), dtype=torch.int64, device=logits.device)
    if output.numel() and (params.frequency_penalty != 0 or params.presence_penalty != 0):
        counts = torch.bincount(output, minlength=logits.numel())
        logits -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)


def _draw(logits: Tensor, row: SamplingRow) -> int:
    """The winner of the race over what the filters leave of one row [vocab_size], of maximum 0; it is overwritten."""
    params, seed = row.params, row.params.seed
    if seed is None:
        raise ValueError("seed must be given to draw a token")
    # The maximum being 0, the smallest temperature makes no infinity of it.
    scaled = logits.div_(max(params.temperature, 1e-5))
    floor = _filter_floor(scaled, params)
    if math.isinf(floor):
        waits = _exponential(seed, row.output_idx, _token_hashes(scaled.numel(), scaled.device))
        return int(_argmax(scaled.exp_().div_(waits)))
    kept = _where_at_least(scaled, floor)
    waits = _exponential(seed, row.output_idx, _token_hashes(scaled.numel(), scaled.device)[kept])
    return int(kept[_argmax(scaled[kept].exp_().div_(waits))])


def _filter_floor(scaled: Tensor, params: SamplingParams) -> float:
    """The logit below which min_p, then top_k, then top_p drop tokens; -inf keeps all.

    One number says it all because each filter keeps the most likely tokens. Tokens that tie with the last one kept are
    kept too: which of them a sort put first must not matter.

    Args:
        scaled: [vocab_size] logits over temperature, their maximum 0.
    """
    floor = -math.inf if params.min_p == 0 else math.log(params.min_p)
    if 0 < params.top_k < scaled.numel():
        floor = max(floor, float(torch.topk(scaled, params.top_k).values[-1]))
    if params.top_p < 1:
        floor = max(floor, _top_p_floor(scaled, floor, params.top_p))
    return floor


def _top_p_floor(scaled: Tensor, floor: float, top_p: float) -> float:
    """The last logit of the shortest run of most likely tokens that has ``top_p`` of all that is above ``floor``."""
    weights = scaled.exp()
    if floor > -math.inf:
        weights = weights[_where_at_least(scaled, floor)]
    needed = top_p * float(weights.sum(dtype=torch.float64))
    for cut in _TOP_P_CUTS:
        best = scaled[_where_at_least(scaled, max(cut, floor))].sort(descending=True).values
        reached = torch.nonzero(best.exp().cumsum(0, dtype=torch.float64) >= needed).flatten()
        if reached.numel():
            return float(best[reached[0]])
    return floor  # top_p within rounding of 1


def _where_at_least(values: Tensor, bound: float) -> Tensor:
    """The indices of values [n] that are not below the bound, ascending; int64."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(values.numpy() >= bound))  # 9 us of 49,152; torch.nonzero takes 66
    return torch.nonzero(values >= bound).flatten()


def _exponential(seed: int, output_idx: int, token_hashes: Tensor) -> Tensor:
    """Exp(1) variates [n] float32 in [2^-32, 22], one per token, fixed by (seed, output_idx, token)."""
    key = _stream_key(seed, output_idx)
    x = _murmur_mix((token_hashes ^ _int32(key)).mul_(_int32(key >> 32) | 1))
    # 31 bits, centred: never 0, and log1p keeps their full precision where it counts, near 0.
    uniform = x.bitwise_and_(0x7FFFFFFF).to(torch.float32).add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_()


def _stream_key(seed: int, output_idx: int) -> int:
    """64 bits that the waits of one token's race are made from."""
    return _splitmix64(_splitmix64(seed & _MASK64) ^ output_idx)


@lru_cache(maxsize=4)
def _token_hashes(vocab_size: int, device: torch.device) -> Tensor:
    """[vocab_size] int32, scattered token ids."""
    ids = torch.arange(vocab_size, dtype=torch.int32, device=device)
    return _murmur_mix(ids.mul_(_int32(0x9E3779B9)))


def _murmur_mix(x: Tensor) -> Tensor:
    """murmur3's finaliser on int32, in place; a shift is made logical by masking the copies of the sign."""
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(_int32(0x85EBCA6B))
    x.bitwise_xor_((x >> 13).bitwise_and_(0x7FFFF)).mul_(_int32(0xC2B2AE35))
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def _int32(value: int) -> int:
    """The low 32 bits as torch's signed int32."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value


def _splitmix64(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)
