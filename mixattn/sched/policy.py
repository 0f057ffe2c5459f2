"""What goes into the next step: pure functions from counts to counts.

A policy sees how many rows each request still has to compute, and how much room there is; it neither knows requests nor
changes anything. Rows of a *decode* (a running request with one row left, whose logits give the next token) come
first, then *chunks* of running requests that still have more rows, then requests that are admitted. All three lists
are first come, first served, so a policy only says how far to go down each.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from mixattn.config import PolicyName
from mixattn.sched.step_times import StepLoad, StepTimes

GROWTH_TOKENS = 16
"""Room for so many tokens is left to each running request before another one is admitted.

Without it, whoever is admitted into the last pages gives them up a few steps later, its prompt computed for nothing.
Case ``tight-pool`` of bench/serving/bench_scheduler.py: 16 save 72 % of the recomputed rows for 1.4 % more steps, 32
save 84 % for 3.4 %.
"""
LEAST_CHUNK = 8
"""Rows that a prompt goes on by in every step, whatever the limit of the step's time: a prompt is not to starve where
decodes alone take as long as a step may."""
CHUNK_DEVIATIONS = 2.0
"""A step whose time is limited is planned to end before its limit even if it takes so many standard deviations longer
than estimated: one of 44, if times were spread normally."""


@dataclass(frozen=True)
class StepView:
    """What a policy may look at.

    Args:
        token_budget: rows that a step may have.
        page_size: tokens per page.
        num_decodes: running decodes.
        partial_rows: rows left of each running request that is no decode, oldest first. Their pages are theirs already.
        waiting_rows: rows of each waiting request, first come first; read only as far as needed.
        num_growing: running requests that may come to need more pages than they have.
        num_admissible: requests that may be admitted before too many run.
        num_free_pages: free pages once every running decode has what it needs; negative when it cannot have it.
        timing: how long steps take, and may take; None when time is no matter.
    """

    token_budget: int
    page_size: int
    num_decodes: int
    partial_rows: Sequence[int]
    waiting_rows: Iterable[int]
    num_growing: int
    num_admissible: int
    num_free_pages: int
    timing: StepTiming | None = None


@dataclass(frozen=True)
class StepTiming:
    """What ``time_budget`` looks at besides.

    Args:
        times: estimates; read only.
        decodes: the running decodes, as a load.
        partial_contexts: keys that each request of ``partial_rows`` has before these rows.
        tbt_slo_s: seconds that a step with decodes may take, or None.
        max_slowdown: how many times as long as its decodes alone it may take, or None.
    """

    times: StepTimes
    decodes: StepLoad
    partial_contexts: Sequence[int]
    tbt_slo_s: float | None
    max_slowdown: float | None

    @property
    def limit_s(self) -> float:
        """Seconds that the step may take: no decode waits for the next longer than that."""
        limits = [math.inf] if self.tbt_slo_s is None else [self.tbt_slo_s]
        if self.max_slowdown is not None:
            limits.append(self.max_slowdown * self.times.estimate(self.decodes)[0])
        return min(limits)


@dataclass(frozen=True)
class StepShape:
    """What a policy decided.

    Args:
        has_decodes: all running decodes are in the step, or none.
        partial_chunks: rows for each of the first running partial requests.
        admitted_chunks: rows for each of the first waiting requests, which are thereby admitted.
    """

    has_decodes: bool
    partial_chunks: list[int] = field(default_factory=list)
    admitted_chunks: list[int] = field(default_factory=list)


Policy = Callable[[StepView], StepShape]


def sarathi(view: StepView) -> StepShape:
    """Every running decode, then chunks of prompts as far as the token budget goes: no decode waits for a prompt.

    Source: arXiv:2403.02310, algorithm 3 (stall-free batching).
    """
    return _stall_free(view, lambda num_rows, _context: num_rows)


def time_budget(view: StepView) -> StepShape:
    """Every running decode, then chunks of prompts as far as the time of the step goes, and its token budget.

    The chunk is as long as the estimate of the step's time allows; where there is no decode to wait for the step, it
    has no limit of time. Sarathi-Serve's token budget is the same for all steps: to keep an SLO where decodes and
    contexts are most, it gives rows away everywhere else.

    Source: arXiv:2403.02310, section 4.3 (how a budget follows from an SLO) and its outlook (one that changes).
    """
    timing = view.timing
    assert timing is not None, "time_budget needs a timing"
    if view.num_decodes == 0:
        return sarathi(view)
    load, limit_s, is_first = timing.decodes, timing.limit_s, True

    def cut(num_rows: int, context: int) -> int:
        nonlocal load, is_first
        chunk = timing.times.longest_chunk(load, num_rows, context, limit_s, CHUNK_DEVIATIONS)
        if is_first:
            chunk = max(chunk, min(num_rows, LEAST_CHUNK))
        is_first = False
        load = load.with_chunk(chunk, context)
        return chunk

    return _stall_free(view, cut)


def _stall_free(view: StepView, cut: Callable[[int, int], int]) -> StepShape:
    """Every running decode, then chunks in order, up to the token budget or the first that is cut short.

    Args:
        view: what there is.
        cut: from rows that fit the budget, and the keys before them, to the length of the chunk; asked in order.
    """
    rows_left = view.token_budget - view.num_decodes
    contexts = [0] * len(view.partial_rows) if view.timing is None else view.timing.partial_contexts
    shape = StepShape(has_decodes=True)
    partials = (
        (shape.partial_chunks, rows, context) for rows, context in zip(view.partial_rows, contexts, strict=True)
    )
    admitted = ((shape.admitted_chunks, rows, 0) for rows in _admissible_rows(view))
    for chunks, num_rows, context in itertools.chain(partials, admitted):
        num_fitting = min(num_rows, rows_left)
        chunk = cut(num_fitting, context) if num_fitting else 0
        if chunk:
            chunks.append(chunk)
            rows_left -= chunk
        if chunk < num_rows:
            break
    return shape


def prefill_first(view: StepView) -> StepShape:
    """Whole prompts in a step of their own while any can be admitted, and decodes only when none can.

    The prompts of a step fit the token budget together; one that is longer than the budget goes alone. This is how
    engines batched before chunked prefill, and what stall-free batching is compared with.
    """
    rows_left = view.token_budget
    shape = StepShape(has_decodes=False)
    for rows in view.partial_rows:
        if rows > rows_left and shape.partial_chunks:
            return shape
        shape.partial_chunks.append(rows)
        rows_left -= rows
    for rows in _admissible_rows(view):
        is_first = not shape.partial_chunks and not shape.admitted_chunks
        if rows > rows_left and not is_first:
            break
        shape.admitted_chunks.append(rows)
        rows_left -= rows
    has_prefill = bool(shape.partial_chunks or shape.admitted_chunks)
    return shape if has_prefill else StepShape(has_decodes=True)


def _admissible_rows(view: StepView) -> Iterator[int]:
    """Rows of the waiting requests that there are pages for, in order; asking for the next one admits this one.

    A request gets the pages of all its rows when it is admitted, however small its first chunk: afterwards only decodes
    need pages, and a prompt that has begun is never stuck. When nothing runs nothing is held back, so the
    head of the queue is always admitted in the end.
    """
    free_pages = view.num_free_pages
    for num_admitted, rows in enumerate(view.waiting_rows):
        num_pages = -(-rows // view.page_size)
        num_reserved = -(-GROWTH_TOKENS * (view.num_growing + num_admitted) // view.page_size)
        if num_admitted == view.num_admissible or num_pages + num_reserved > free_pages:
            return
        free_pages -= num_pages
        yield rows


POLICIES: dict[PolicyName, Policy] = {
    PolicyName.SARATHI: sarathi,
    PolicyName.TIME_BUDGET: time_budget,
    PolicyName.PREFILL_FIRST: prefill_first,
}
