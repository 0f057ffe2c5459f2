"""Which requests run in the next step, on which pages, with how many rows each.

It knows neither tensors nor a clock: time is an argument, tokens come in through ``commit``. Given the same calls it
makes the same plans.

Life of a request: waiting -> (admitted: gets the pages of all its known tokens) -> running, first in chunks of its
prompt, then one row per step -> ended. Running and waiting requests, one after the other, are always in the order of
their arrival: the head of the queue is admitted first, and whoever has to give up its pages is the newest running
request, which goes back to the head of the queue.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass

from mixattn.config import PolicyName, SchedulerConfig
from mixattn.kv.page_pool import PagePool
from mixattn.metrics import SchedulerStats
from mixattn.sched.policy import POLICIES, StepTiming, StepView
from mixattn.sched.step_times import StepLoad, StepTimes
from mixattn.sched.tracked import Tracked
from mixattn.types import BatchPlan, FinishReason, Request, Slice, StepResult, TokenEvent

MAX_UNCOMMITTED_PLANS = 2
"""One that is being executed, and one prepared meanwhile."""


class QueueFull(RuntimeError):  # noqa: N818
    """As many requests wait as may: the caller made no mistake, and may come again."""


@dataclass(frozen=True)
class _Uncommitted:
    """A plan, the requests of its slices, and when it was made.

    The requests are not looked up by id: an id may belong to a new request by then.
    """

    plan: BatchPlan
    tracked: list[Tracked]
    begin_s: float


class Scheduler:
    """Makes plans from requests and takes back what they gave.

    Args:
        config: budget, limits and policy.
        pool: the pages; all of them are the scheduler's to give.
    """

    def __init__(self, config: SchedulerConfig, pool: PagePool) -> None:
        self._config = config
        self._pool = pool
        self._policy = POLICIES[config.policy]
        self._waiting: OrderedDict[str, Tracked] = OrderedDict()
        self._running: dict[str, Tracked] = {}
        self._uncommitted: deque[_Uncommitted] = deque()
        self._now = float("-inf")
        self._busy_since_s: float | None = None
        """When the step before ended, if there has been something to do ever since."""
        self._step_times = StepTimes()
        self._num_steps = 0
        self._num_accepted = 0
        self._num_preemptions = 0
        self._num_recomputed_tokens = 0
        self._num_decode_stalls = 0

    @property
    def max_context_tokens(self) -> int:
        """Prompt and output tokens that a request can have: the model's context, or what the pool holds if less.

        The last token of an output is never an input, so its keys need no slot.
        """
        return min(self._config.max_model_len, self._pool.num_pages * self._pool.page_size + 1)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_preemptions(self) -> int:
        return self._num_preemptions

    @property
    def has_work(self) -> bool:
        """Whether there is a request that has not ended, or a plan to be committed."""
        return bool(self._running or self._waiting or self._uncommitted)

    def stats(self) -> SchedulerStats:
        return SchedulerStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_pages_free=self._pool.num_free,
            num_pages_used=self._pool.num_used,
            num_preemptions=self._num_preemptions,
            num_recomputed_tokens=self._num_recomputed_tokens,
            num_decode_stalls=self._num_decode_stalls,
        )

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises:
            ValueError: it can never be served, or its id is in use; the message names the field and the bound.
            QueueFull: ``max_num_queued_reqs`` wait already. Preempted requests count, but are never refused.
        """
        request_id = request.request_id
        if request_id in self._running or request_id in self._waiting:
            raise ValueError(f"request_id {request_id!r} is in use by a request that has not ended")
        try:
            tokens = array("q", request.prompt_token_ids).tolist()
        except (TypeError, OverflowError) as error:
            raise ValueError(f"prompt_token_ids must be 64-bit integers: {error}") from error
        self._check_length(len(tokens))
        if len(self._waiting) >= self._config.max_num_queued_reqs:
            raise QueueFull(f"max_num_queued_reqs ({self._config.max_num_queued_reqs}) requests are waiting")
        if not self.has_work:
            self._busy_since_s = None
        self._waiting[request_id] = Tracked(request, tokens, self._num_accepted, self.max_context_tokens)
        self._num_accepted += 1

    def _check_length(self, prompt_len: int) -> None:
        pool = self._pool
        if prompt_len == 0:
            raise ValueError("prompt_token_ids must hold at least one token")
        if prompt_len >= self._config.max_model_len:
            raise ValueError(
                f"prompt_token_ids holds {prompt_len} tokens; with max_model_len {self._config.max_model_len} "
                f"at most {self._config.max_model_len - 1} leave room for an output"
            )
        if pool.num_pages_for(prompt_len) > pool.num_pages:
            raise ValueError(
                f"prompt_token_ids holds {prompt_len} tokens, which take {pool.num_pages_for(prompt_len)} pages of "
                f"{pool.page_size} tokens; the KV pool has {pool.num_pages}"
            )

    def abort(self, request_id: str) -> bool:
        """Ends a request, waiting or running, without an event; False when there is none of this id.

        Its pages are free at once, or when the last uncommitted plan that it is in is committed.
        """
        tracked = self._waiting.pop(request_id, None) or self._running.get(request_id)
        if tracked is None:
            return False
        self._end(tracked)
        return True

    def schedule(self, now: float) -> BatchPlan | None:
        """The next step, or None when there is nothing to do.

        With a plan uncommitted, None may also mean that the step depends on what that plan gives: a decode needs a
        page and none is free. Commit and ask again. Without one, None means that there are no requests.

        Raises:
            RuntimeError: two plans are uncommitted.
            ValueError: ``now`` lies before an earlier one.
        """
        if len(self._uncommitted) == MAX_UNCOMMITTED_PLANS:
            raise RuntimeError(f"{MAX_UNCOMMITTED_PLANS} plans are uncommitted; commit the older one first")
        self._advance(now)
        while True:
            decodes, partials, full = self._classify_running()
            shape = self._policy(
                StepView(
                    token_budget=self._config.max_num_batched_tokens,
                    page_size=self._pool.page_size,
                    num_decodes=len(decodes),
                    partial_rows=[len(t.tokens) - t.num_computed for t in partials],
                    waiting_rows=(len(t.tokens) for t in self._waiting.values()),
                    num_growing=self._num_growing() if self._waiting else 0,
                    num_admissible=self._config.max_num_seqs - len(self._running),
                    num_free_pages=self._pool.num_free - len(full),
                    timing=self._timing(decodes, partials),
                )
            )
            if not shape.has_decodes or len(full) <= self._pool.num_free:
                break
            if self._uncommitted:
                return None  # whoever gives up its pages may be in that plan, or end with it
            self._preempt_newest()

        step_idx = self._num_steps
        planned: list[Tracked] = []
        slices: list[Slice] = []
        if shape.has_decodes:
            self._grow(full)
            planned += decodes
            slices += [tracked.plan_decode(step_idx) for tracked in decodes]
        else:
            self._num_decode_stalls += len(decodes)
        for tracked, num_rows in zip(partials, shape.partial_chunks, strict=False):
            planned.append(tracked)
            slices.append(tracked.plan_chunk(num_rows, step_idx))
        for num_rows in shape.admitted_chunks:
            tracked = self._admit_next()
            planned.append(tracked)
            slices.append(tracked.plan_chunk(num_rows, step_idx))
        if not slices:
            assert self._uncommitted or (not self._running and not self._waiting), "requests, but nothing to do"
            return None
        plan = BatchPlan(step_idx, tuple(slices))
        self._num_steps += 1
        self._uncommitted.append(_Uncommitted(plan, planned, now))
        return plan

    def commit(self, plan: BatchPlan, result: StepResult, now: float) -> list[TokenEvent]:
        """Takes the tokens that ``plan`` gave; one event for each, in the order of the slices.

        A token of a request that has ended since the plan was made is dropped.

        Raises:
            RuntimeError: ``plan`` is not the oldest uncommitted one.
            ValueError: the result is not one token for each sampled slice; nothing was committed.
        """
        self._check_oldest(plan)
        try:
            token_ids = [result.token_ids[part.request_id] for part in plan.slices if part.is_sampled]
        except KeyError as error:
            raise ValueError(f"token_ids of step {plan.step_idx} lacks the sampled slice {error}") from None
        if len(result.token_ids) != len(token_ids):
            raise ValueError(
                f"token_ids of step {plan.step_idx} must hold one token for each of its {len(token_ids)} sampled "
                f"slices, got {len(result.token_ids)}"
            )
        self._advance(now)
        new_tokens = iter(token_ids)
        events: list[TokenEvent] = []
        uncommitted = self._uncommitted.popleft()
        for tracked, part in zip(uncommitted.tracked, plan.slices, strict=True):
            token_id = next(new_tokens) if part.is_sampled else None
            if tracked.is_ended:
                if not self._is_planned(tracked):
                    self._release(tracked)
            elif token_id is not None:
                reason = tracked.take(token_id)
                if reason is not None:
                    self._end(tracked)
                events.append(TokenEvent(tracked.request_id, token_id, reason, now))
        self._observe(uncommitted, now)
        return events

    def fail(self, plan: BatchPlan, reason: str, now: float) -> list[TokenEvent]:
        """Gives up ``plan``, whose execution failed: its requests end with an error, all others go on.

        A plan that was prepared after it is withdrawn and must not be executed: its slices may depend on tokens that
        will never be known. What it held of other requests is planned anew.

        Raises:
            RuntimeError: ``plan`` is not the oldest uncommitted one.
        """
        self._check_oldest(plan)
        self._advance(now)
        failed = self._uncommitted[0].tracked
        for withdrawn in list(self._uncommitted)[1:]:
            for tracked, part in zip(withdrawn.tracked, withdrawn.plan.slices, strict=True):
                tracked.withdraw(part)
        involved = dict.fromkeys(tracked for uncommitted in self._uncommitted for tracked in uncommitted.tracked)
        self._uncommitted.clear()
        self._busy_since_s = None
        for tracked in involved:
            if tracked.is_ended:
                self._release(tracked)
        events = []
        for tracked in failed:
            if not tracked.is_ended:
                self._end(tracked)
                events.append(TokenEvent(tracked.request_id, None, FinishReason.ERROR, now, reason))
        return events

    def check_invariants(self) -> None:
        """Everything that must hold between calls; an AssertionError says what does not.

        Pages are conserved, in use by one request each, and enough for the rows stored in them; requests are in the
        order of their arrival; plans keep the budget and know what they hold.
        """
        pool, config = self._pool, self._config
        pool.check()
        assert len(self._uncommitted) <= MAX_UNCOMMITTED_PLANS
        holders = list(self._running.values())
        assert len(holders) <= config.max_num_seqs, f"{len(holders)} requests run"
        order = [t.arrival_idx for t in [*holders, *self._waiting.values()]]
        assert order == sorted(set(order)), f"running and waiting requests out of order: {order}"
        for tracked in self._waiting.values():
            assert tracked.num_computed == len(tracked.page_ids) == 0, f"{tracked.request_id} waits with rows or pages"
            assert not tracked.is_ended and not self._is_planned(tracked), f"{tracked.request_id} does not wait"
        planned = Counter(t for uncommitted in self._uncommitted for t in uncommitted.tracked)
        holders += [t for t in planned if t.is_ended]
        for tracked in holders:
            name = tracked.request_id
            assert tracked.is_ended == (self._running.get(name) is not tracked), f"{name} runs after its end"
            assert self._is_planned(tracked) == (tracked in planned), f"{name} is wrong about being planned"
            num_unknown = tracked.num_tokens - len(tracked.tokens)
            assert tracked.is_ended or 0 <= num_unknown <= planned[tracked], f"{name} awaits {num_unknown} tokens"
            assert tracked.num_computed < tracked.num_tokens, f"{name} has no row left"
            assert tracked.num_slots == len(tracked.page_ids) * pool.page_size, f"{name} miscounts its slots"
            assert tracked.num_computed <= tracked.num_slots, f"{name} has too few pages"
        pages = [page for tracked in holders for page in tracked.page_ids]
        assert len(pages) == len(set(pages)) == pool.num_used, f"{len(pages)} pages held, {pool.num_used} in use"
        for plan in (uncommitted.plan for uncommitted in self._uncommitted):
            is_alone = config.policy is PolicyName.PREFILL_FIRST and len(plan.slices) == 1
            assert plan.num_tokens <= config.max_num_batched_tokens or is_alone, f"step of {plan.num_tokens} rows"

    def _classify_running(self) -> tuple[list[Tracked], list[Tracked], list[Tracked]]:
        """Running decodes, running requests with more rows left, and those of the decodes whose pages are full."""
        decodes: list[Tracked] = []
        partials: list[Tracked] = []
        full: list[Tracked] = []
        for tracked in self._running.values():
            num_tokens, num_computed = tracked.num_tokens, tracked.num_computed
            if num_tokens >= tracked.max_tokens:
                continue  # its last token is under way
            if num_tokens - num_computed == 1 and num_tokens > tracked.prompt_len:
                decodes.append(tracked)
                if num_computed == tracked.num_slots:
                    full.append(tracked)
            else:
                partials.append(tracked)
        return decodes, partials, full

    def _timing(self, decodes: list[Tracked], partials: list[Tracked]) -> StepTiming | None:
        """What a policy that limits the time of a step needs to know."""
        config = self._config
        if config.policy is not PolicyName.TIME_BUDGET:
            return None
        return StepTiming(
            self._step_times,
            StepLoad(len(decodes), sum(tracked.num_tokens for tracked in decodes)),
            [tracked.num_computed for tracked in partials],
            None if config.tbt_slo_ms is None else config.tbt_slo_ms / 1e3,
            config.max_slowdown,
        )

    def _observe(self, ended: _Uncommitted, now: float) -> None:
        """Learns how long a step took: from one token of a decode to the next, what is between steps included."""
        if self._config.policy is PolicyName.TIME_BUDGET:
            num_decodes = ended.plan.num_decodes
            load = StepLoad(num_decodes, sum(part.kv_len for part in ended.plan.slices[:num_decodes]))
            for part in ended.plan.slices[num_decodes:]:
                load = load.with_chunk(part.q_len, part.kv_len - part.q_len)
            self._step_times.observe(load, now - (ended.begin_s if self._busy_since_s is None else self._busy_since_s))
        self._busy_since_s = now

    def _num_growing(self) -> int:
        """Running requests that may come to need more pages; the last token of an output needs no slot."""
        return sum(tracked.num_slots < tracked.max_tokens - 1 for tracked in self._running.values())

    def _grow(self, full: list[Tracked]) -> None:
        """A page more for each. Plans hold the old array: it stays as it is."""
        for tracked, page in zip(full, self._pool.allocate(len(full)), strict=True):
            tracked.page_ids = tracked.page_ids + array("i", (page,))
            tracked.num_slots += self._pool.page_size

    def _admit_next(self) -> Tracked:
        """The head of the queue, running, with the pages of all its tokens."""
        request_id, tracked = self._waiting.popitem(last=False)
        tracked.page_ids = array("i", self._pool.allocate(self._pool.num_pages_for(len(tracked.tokens))))
        tracked.num_slots = len(tracked.page_ids) * self._pool.page_size
        self._running[request_id] = tracked
        return tracked

    def _preempt_newest(self) -> None:
        """Takes all pages of the newest running request, which goes to the head of the queue with its output.

        No plan is uncommitted. The oldest request never comes to this: alone, it has the whole pool, which holds
        ``max_context_tokens``.
        """
        assert not self._uncommitted and len(self._running) > 1
        request_id, tracked = self._running.popitem()
        self._num_preemptions += 1
        self._num_recomputed_tokens += tracked.num_computed
        self._release(tracked)
        tracked.num_computed = 0
        self._waiting[request_id] = tracked
        self._waiting.move_to_end(request_id, last=False)

    def _end(self, tracked: Tracked) -> None:
        """It gives no more tokens; ``commit`` releases its pages if it is still in a plan."""
        tracked.is_ended = True
        self._running.pop(tracked.request_id, None)
        if not self._is_planned(tracked):
            self._release(tracked)

    def _is_planned(self, tracked: Tracked) -> bool:
        """Whether an uncommitted plan has a slice of it."""
        return bool(self._uncommitted) and tracked.last_step_idx >= self._uncommitted[0].plan.step_idx

    def _release(self, tracked: Tracked) -> None:
        self._pool.release(tracked.page_ids)
        tracked.page_ids = array("i")
        tracked.num_slots = 0

    def _advance(self, now: float) -> None:
        if not now >= self._now:
            raise ValueError(f"now must not go back, got {now} after {self._now}")
        self._now = now

    def _check_oldest(self, plan: BatchPlan) -> None:
        if not self._uncommitted or self._uncommitted[0].plan is not plan:
            raise RuntimeError(f"plan of step {plan.step_idx} is not the oldest uncommitted one; plans commit in order")
