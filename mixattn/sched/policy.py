"""What goes into the next step: pure functions from counts to counts.

A policy sees how many rows each request still has to compute, and how much room there is; it neither knows requests nor
changes anything. Rows of a *decode* (a running request with one row left, whose logits give the next token) come
first, then *chunks* of running requests that still have more rows, then requests that are admitted. All three lists
are first come, first served, so a policy only says how far to go down each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from mixattn.config import PolicyName

GROWTH_TOKENS = 16
"""Room for so many tokens is left to each running request before another one is admitted.

Without it, whoever is admitted into the last pages gives them up a few steps later, its prompt computed for nothing.
Case ``tight-pool`` of bench/serving/bench_scheduler.py: 16 save 72 % of the recomputed rows for 1.4 % more steps, 32
save 84 % for 3.4 %.
"""


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
    """

    token_budget: int
    page_size: int
    num_decodes: int
    partial_rows: Sequence[int]
    waiting_rows: Iterable[int]
    num_growing: int
    num_admissible: int
    num_free_pages: int


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
    rows_left = view.token_budget - view.num_decodes
    shape = StepShape(has_decodes=True)
    for rows in view.partial_rows:
        if rows_left == 0:
            return shape
        chunk = min(rows, rows_left)
        shape.partial_chunks.append(chunk)
        rows_left -= chunk
    for rows in _admissible_rows(view):
        if rows_left == 0:
            break
        chunk = min(rows, rows_left)
        shape.admitted_chunks.append(chunk)
        rows_left -= chunk
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


POLICIES: dict[PolicyName, Policy] = {PolicyName.SARATHI: sarathi, PolicyName.PREFILL_FIRST: prefill_first}
