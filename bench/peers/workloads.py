"""The work that every engine is given. The standard library alone: each peer's environment imports this file."""

from __future__ import annotations

import itertools
import math
import os
import random
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PEERS = Path(os.environ.get("PEERS", ROOT / ".peers"))
"""Where ``setup.sh`` puts environments and models."""
NUM_THREADS = 2

PREFILL_TOKENS = (512, 2048)
DECODE_BATCHES = (1, 8, 32)
DECODE_PROMPT_TOKENS = 128
DECODE_STEPS = {1: 64, 8: 32, 32: 16}
"""Steps that are timed, by batch; all of the batch's prompts have been read before."""
STALL_BUDGET = 256
"""Rows of a step in the stall rows, for every engine that takes a budget."""
NUM_GREEDY_PROMPTS = 8
GREEDY_PROMPT_TOKENS = 40
GREEDY_TOKENS = 24

_TOKEN_IDS = (1000, 40000)
"""Plain text of SmolLM2's vocabulary: no token in this range is special."""


def prompt(num_tokens: int, seed: int) -> list[int]:
    """Random token ids, the same for every engine."""
    rng = random.Random(seed)
    return [rng.randrange(*_TOKEN_IDS) for _ in range(num_tokens)]


@dataclass(frozen=True)
class Request:
    """A prompt, and how many tokens come out whatever they are."""

    prompt: list[int]
    num_output: int


def offline_requests(num_requests: int = 64, seed: int = 0) -> list[Request]:
    """Prompts of log-normal length (median 256 tokens, 16 to 1,500), outputs of 16 to 128 tokens."""
    rng = random.Random(seed)
    requests = []
    for idx in range(num_requests):
        num_prompt = min(1500, max(16, round(256 * math.exp(rng.gauss(0, 0.8)))))
        requests.append(Request(prompt(num_prompt, seed * 1000 + idx), rng.randint(16, 128)))
    return requests


def greedy_prompts(text_ids: list[int]) -> list[list[int]]:
    """Pieces of a text, evenly spaced, for the comparison of greedy outputs.

    Raises:
        ValueError: the text is too short for one piece.
    """
    last = len(text_ids) - GREEDY_PROMPT_TOKENS
    if last < 0:
        raise ValueError(f"text_ids must have >= {GREEDY_PROMPT_TOKENS} tokens, got {len(text_ids)}")
    starts = [last * idx // (NUM_GREEDY_PROMPTS - 1) for idx in range(NUM_GREEDY_PROMPTS)]
    return [text_ids[start : start + GREEDY_PROMPT_TOKENS] for start in starts]


@dataclass(frozen=True)
class Stall:
    """Streams that decode, and a long prompt that arrives."""

    num_streams: int = 8
    stream_prompt_tokens: int = 32
    long_prompt_tokens: int = 1500
    steady_tokens: int = 24
    """Tokens of each stream before the arrival whose gaps count."""
    max_tokens: int = 256
    """Tokens of each stream: more than fit into the scenario."""


@dataclass(frozen=True)
class StallTimes:
    """What the streams and the long prompt saw, in seconds."""

    ttft_s: float
    longest_gap_s: float
    steady_gap_s: float


def stall_times(streams: list[list[float]], arrival_s: float, first_token_s: float) -> StallTimes:
    """From the times of the streams' tokens.

    A gap is steady if it ended before the arrival, and counts as the arrival's if it ended after that and began before
    the long prompt's first token.

    Raises:
        ValueError: no gap is of the one or the other kind.
    """
    steady, during = [], []
    for times in streams:
        for begin_s, end_s in itertools.pairwise(times):
            if end_s <= arrival_s:
                steady.append(end_s - begin_s)
            elif begin_s < first_token_s:
                during.append(end_s - begin_s)
    if not steady or not during:
        raise ValueError(f"{len(steady)} gaps before the arrival and {len(during)} meanwhile: need some of both")
    return StallTimes(first_token_s - arrival_s, max(during), sorted(steady)[len(steady) // 2])


@dataclass(frozen=True)
class AttentionCase:
    """A batch of the attention operator; names as in ``bench.kernels.bench_mixed_attention``."""

    name: str
    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]


ATTENTION_HEADS = (32, 8, 128)
"""Query heads, key and value heads, dimensions of each."""
ATTENTION_DTYPES = ("bfloat16", "float32")


def attention_cases() -> list[AttentionCase]:
    """Decodes alone, a chunk alone, and both in one batch."""
    return [
        AttentionCase("decode-32x4k-hd128-gqa4", (1,) * 32, (4096,) * 32),
        AttentionCase("chunk-512-at-4k-hd128-gqa4", (512,), (4096,)),
        AttentionCase("mixed-31x4k-chunk-512-at-4k-hd128-gqa4", (1,) * 31 + (512,), (4096,) * 32),
    ]
