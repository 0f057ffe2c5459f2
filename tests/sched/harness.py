"""A model of the scheduler's duties to hold it against, and an executor whose tokens betray any wrong key.

The executor keeps "keys" in pages as a real one does (here: the token itself), reads the whole context of a row back
through the pages, and makes the next token a function of exactly that. A token that was lost, doubled, read from a
page that somebody else got, or fed at the wrong position changes everything after it.
"""

from __future__ import annotations

import zlib
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from mixattn.config import PolicyName, SchedulerConfig
from mixattn.kv.page_pool import PagePool
from mixattn.sched import policy
from mixattn.sched.scheduler import Scheduler
from mixattn.types import BatchPlan, FinishReason, Request, SamplingParams, Slice, StepResult

VOCAB_SIZE = 11
EOS = 0


def next_token(context: Sequence[int]) -> int:
    """The "model": a token of [0, VOCAB_SIZE) that depends on every token before it and on its place."""
    return zlib.crc32(array("i", context).tobytes()) % VOCAB_SIZE


def make_request(
    request_id: str,
    prompt: Sequence[int] | int,
    max_tokens: int | None = 4,
    *,
    ignore_eos: bool = True,
    min_tokens: int = 0,
    stop_token_ids: Sequence[int] = (),
    arrival_s: float = 0.0,
) -> Request:
    """A request; a prompt given as a length is 1, 2, 3, ..."""
    tokens = list(range(1, prompt + 1)) if isinstance(prompt, int) else list(prompt)
    sampling = SamplingParams(
        max_tokens=max_tokens, ignore_eos=ignore_eos, min_tokens=min_tokens, stop_token_ids=stop_token_ids
    )
    return Request(request_id, tokens, sampling, arrival_s, frozenset({EOS}))


def finish_reason(request: Request, output: Sequence[int], max_context_tokens: int) -> FinishReason | None:
    """Why ``output`` is complete, spelled out."""
    sampling = request.sampling
    is_stop = (output[-1] in request.eos_token_ids and not sampling.ignore_eos) or output[-1] in sampling.stop_token_ids
    if is_stop and len(output) >= sampling.min_tokens:
        return FinishReason.STOP
    if len(output) == sampling.max_tokens or len(request.prompt_token_ids) + len(output) == max_context_tokens:
        return FinishReason.LENGTH
    return None


def reference_output(request: Request, max_context_tokens: int) -> tuple[list[int], FinishReason]:
    """What the request gives when it is alone in the world."""
    output: list[int] = []
    while True:
        output.append(next_token([*request.prompt_token_ids, *output]))
        reason = finish_reason(request, output, max_context_tokens)
        if reason is not None:
            return output, reason


def limits_for(policy_name: PolicyName) -> dict[str, float]:
    """The limits of time that a configuration with this policy needs."""
    return {"max_slowdown": 1.5} if policy_name is PolicyName.TIME_BUDGET else {}


def is_decode(part: Slice) -> bool:
    return part.q_len == 1 and part.output_idx > 0 and part.is_sampled


class FakeExecutor:
    """Executes plans on pages of tokens."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self._page_size = page_size
        self._pages: list[list[int | None]] = [[None] * page_size for _ in range(num_pages)]
        self._last_token_ids: dict[str, int] = {}

    def execute(self, plan: BatchPlan) -> StepResult:
        written: set[tuple[int, int]] = set()
        for part in plan.slices:
            inputs = [self._last_token_ids[part.request_id]] if part.token_ids is None else part.token_ids
            assert len(inputs) == part.q_len
            for position, token in enumerate(inputs, start=part.kv_len - part.q_len):
                slot = part.page_ids[position // self._page_size], position % self._page_size
                assert slot not in written, f"two rows of step {plan.step_idx} write {slot}"
                written.add(slot)
                self._pages[slot[0]][slot[1]] = token
        token_ids = {}
        for part in plan.slices:
            context = [
                self._pages[part.page_ids[i // self._page_size]][i % self._page_size] for i in range(part.kv_len)
            ]
            known = list(part.history[: part.kv_len])
            if len(known) < part.kv_len:
                known.append(self._last_token_ids[part.request_id])
            assert context == known, f"{part.request_id} reads {context}, its tokens are {known}"
            if part.is_sampled:
                token_ids[part.request_id] = next_token(known)
        self._last_token_ids = token_ids
        return StepResult(token_ids)


@dataclass
class Mirror:
    """What a request must look like from outside."""

    request: Request
    output: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    num_computed: int = 0
    num_under_way: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.request.prompt_token_ids) + len(self.output) + self.num_under_way

    def is_last_under_way(self, max_context_tokens: int) -> bool:
        """Whether a plan that is not committed gives its last token, whatever that is."""
        max_tokens = self.request.sampling.max_tokens
        num_outputs = len(self.output) + self.num_under_way
        return self.num_tokens >= max_context_tokens or (max_tokens is not None and num_outputs >= max_tokens)

    @property
    def is_decoding(self) -> bool:
        return self.num_tokens - self.num_computed == 1 and len(self.output) + self.num_under_way > 0


class Session:
    """A scheduler with its executor, every call of which is checked against the rules.

    Args:
        config, num_pages, page_size: of the scheduler.
        is_eager: execute a plan when it is made, not when it is committed.
        tick_s: from one call to the next.
    """

    def __init__(
        self, config: SchedulerConfig, num_pages: int, page_size: int, is_eager: bool = False, tick_s: float = 1.0
    ) -> None:
        self.config = config
        self.pool = PagePool(num_pages, page_size)
        self.scheduler = Scheduler(config, self.pool)
        self.executor = FakeExecutor(num_pages, page_size)
        self.is_eager = is_eager
        self.tick_s = tick_s
        self.now = 0.0
        self.mirrors: dict[str, Mirror] = {}
        self.waiting: list[str] = []
        self.running: list[str] = []
        self.ended: dict[str, Mirror] = {}
        self.outstanding: deque[tuple[BatchPlan, StepResult | None]] = deque()

    def add(self, request: Request) -> None:
        self.scheduler.add(request)
        self.mirrors[request.request_id] = Mirror(request)
        self.waiting.append(request.request_id)
        self.check_state()

    def abort(self, request_id: str) -> None:
        is_live = request_id in self.mirrors
        assert self.scheduler.abort(request_id) == is_live
        if is_live:
            self._end(request_id, FinishReason.ABORT)
        self.check_state()

    def schedule(self) -> BatchPlan | None:
        self.now += self.tick_s
        before = self.scheduler.stats()
        plan = self.scheduler.schedule(self.now)
        after = self.scheduler.stats()
        num_preempted = after.num_preemptions - before.num_preemptions
        if plan is None:
            assert self.outstanding or not self.mirrors, "requests, but neither a plan nor one to wait for"
            assert num_preempted == 0
        else:
            if num_preempted:
                self._preempt(num_preempted)
            self._check_plan(plan, after.num_decode_stalls - before.num_decode_stalls)
            self.outstanding.append((plan, self.executor.execute(plan) if self.is_eager else None))
        self.check_state()
        return plan

    def commit(self, step_s: float | None = None) -> None:
        self.now += self.tick_s if step_s is None else step_s
        plan, result = self.outstanding.popleft()
        result = result or self.executor.execute(plan)
        expected = []
        for part in plan.slices:
            mirror = self.mirrors.get(part.request_id)
            if mirror is None or not part.is_sampled:
                continue
            token = result.token_ids[part.request_id]
            mirror.output.append(token)
            mirror.num_under_way -= 1
            reason = finish_reason(mirror.request, mirror.output, self.scheduler.max_context_tokens)
            if reason is not None:
                self._end(part.request_id, reason)
            expected.append((part.request_id, token, reason, self.now))
        events = self.scheduler.commit(plan, result, self.now)
        assert [(e.request_id, e.token_id, e.finish_reason, e.time_s) for e in events] == expected
        self.check_state()

    def fail(self) -> None:
        self.now += self.tick_s
        plan, _ = self.outstanding.popleft()
        for withdrawn, _ in self.outstanding:
            for part in withdrawn.slices:
                if part.request_id in self.mirrors:
                    self.mirrors[part.request_id].num_computed -= part.q_len
                    self.mirrors[part.request_id].num_under_way -= part.is_sampled
        self.outstanding.clear()
        expected = [part.request_id for part in plan.slices if part.request_id in self.mirrors]
        for request_id in expected:
            self._end(request_id, FinishReason.ERROR)
        events = self.scheduler.fail(plan, "broken", self.now)
        assert [e.request_id for e in events] == expected
        assert all((e.token_id, e.finish_reason, e.error) == (None, FinishReason.ERROR, "broken") for e in events)
        self.check_state()

    def drain(self, is_ahead: bool = False) -> None:
        """Goes on until every request has ended; no more steps than if each ran alone, a row at a time."""
        for _ in range(10_000):
            while len(self.outstanding) < (2 if is_ahead else 1) and self.schedule():
                pass
            if not self.outstanding:
                break
            self.commit()
        assert not self.scheduler.has_work
        assert not self.mirrors
        assert self.pool.num_free == self.pool.num_pages

    def outputs(self) -> dict[str, tuple[list[int], FinishReason | None]]:
        return {request_id: (mirror.output, mirror.finish_reason) for request_id, mirror in self.ended.items()}

    def check_outputs(self) -> None:
        """Whoever ended by itself has the very tokens that it gives alone, the others the first of them."""
        for mirror in self.ended.values():
            output, reason = reference_output(mirror.request, self.scheduler.max_context_tokens)
            if mirror.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
                assert mirror.output == output[: len(mirror.output)]
            else:
                assert (mirror.output, mirror.finish_reason) == (output, reason)

    def check_state(self) -> None:
        self.scheduler.check_invariants()
        stats = self.scheduler.stats()
        assert (stats.num_running, stats.num_waiting) == (len(self.running), len(self.waiting))
        assert stats.num_pages_free + stats.num_pages_used == self.pool.num_pages

    def _end(self, request_id: str, reason: FinishReason) -> None:
        mirror = self.mirrors.pop(request_id)
        mirror.finish_reason = reason
        assert request_id not in self.ended
        self.ended[request_id] = mirror
        (self.running if request_id in self.running else self.waiting).remove(request_id)

    def _preempt(self, num_preempted: int) -> None:
        """The newest go, never the oldest, and only between steps; they are the queue's head in their old order."""
        assert not self.outstanding
        assert num_preempted < len(self.running)
        victims = self.running[-num_preempted:]
        del self.running[-num_preempted:]
        self.waiting[:0] = victims
        for request_id in victims:
            self.mirrors[request_id].num_computed = 0

    def _check_plan(self, plan: BatchPlan, num_stalls: int) -> None:
        limit = self.scheduler.max_context_tokens
        is_stall_free = self.config.policy is not PolicyName.PREFILL_FIRST
        ids = [part.request_id for part in plan.slices]
        assert ids and len(set(ids)) == len(ids)
        assert plan.num_tokens == sum(part.q_len for part in plan.slices)
        assert plan.num_tokens <= self.config.max_num_batched_tokens or (not is_stall_free and len(ids) == 1)

        # Decodes come first, and all of them or (only with prefill_first) none.
        decodes = [
            i for i in self.running if self.mirrors[i].is_decoding and not self.mirrors[i].is_last_under_way(limit)
        ]
        assert [part.request_id for part in plan.slices if is_decode(part)] == ids[: plan.num_decodes]
        if ids[: plan.num_decodes] == decodes:
            assert num_stalls == 0
        else:
            assert not is_stall_free and plan.num_decodes == 0
            assert num_stalls == len(decodes)

        # Then running requests, then the queue, both in the order of arrival.
        partials = [i for i in self.running if not self.mirrors[i].is_decoding]
        chunks = ids[plan.num_decodes :]
        assert chunks == [*partials, *self.waiting][: len(chunks)]
        num_admitted = max(0, len(chunks) - len(partials))
        assert all(part.kv_len == part.q_len for part in plan.slices[len(ids) - num_admitted :])
        self.running += self.waiting[:num_admitted]
        del self.waiting[:num_admitted]
        assert len(self.running) <= self.config.max_num_seqs

        for part in plan.slices:
            self._check_slice(part)
        self._check_pages_are_apart([*(p for p, _ in self.outstanding), plan])
        if is_stall_free:
            self._check_no_room_is_left(plan)
        self._check_oldest(plan)

    def _check_slice(self, part: Slice) -> None:
        mirror = self.mirrors[part.request_id]
        tokens = [*mirror.request.prompt_token_ids, *mirror.output]
        begin = part.kv_len - part.q_len
        assert part.q_len >= 1 and begin == mirror.num_computed
        assert part.output_idx == len(mirror.output) + mirror.num_under_way
        assert list(part.history) == tokens and part.prompt_len == len(mirror.request.prompt_token_ids)
        if mirror.num_under_way:
            assert part.token_ids is None
        else:
            assert list(part.token_ids or ()) == tokens[begin : part.kv_len]
        assert part.is_sampled == (part.kv_len == mirror.num_tokens)
        assert len(part.page_ids) * self.pool.page_size >= part.kv_len
        if self.config.policy is PolicyName.PREFILL_FIRST:
            assert part.is_sampled, "a prompt was cut"
        mirror.num_computed = part.kv_len
        mirror.num_under_way += part.is_sampled

    def _check_pages_are_apart(self, plans: Sequence[BatchPlan]) -> None:
        """No page is in the tables of two requests, over all uncommitted plans."""
        owner: dict[int, int] = {}
        for plan in plans:
            for part in plan.slices:
                for page in part.page_ids:  # an id may be used again; the list of tokens is the request's own
                    assert owner.setdefault(page, id(part.history)) == id(part.history), f"page {page} has two owners"

    def _check_no_room_is_left(self, plan: BatchPlan) -> None:
        """A step below the budget has all rows of all running requests, and the head of the queue could not come in.

        Or, with time_budget, its time is up: beside decodes, and after the first prompt got the least, or all its rows.
        """
        if plan.num_tokens == self.config.max_num_batched_tokens:
            return
        chunks = plan.slices[plan.num_decodes :]
        if self.config.policy is PolicyName.TIME_BUDGET and plan.num_decodes and chunks:
            assert chunks[0].is_sampled or chunks[0].q_len >= policy.LEAST_CHUNK
            return
        assert all(self.mirrors[i].num_computed >= self.mirrors[i].num_tokens - 1 for i in self.running)
        if self.waiting and len(self.running) < self.config.max_num_seqs:
            rows = self.mirrors[self.waiting[0]].num_tokens + policy.GROWTH_TOKENS * len(self.running)
            assert rows > (self.pool.num_free - 1) * self.pool.page_size

    def _check_oldest(self, plan: BatchPlan) -> None:
        """The oldest request is in every step. With prefill_first it may wait for prompts, as long as such come."""
        oldest = self.running[0]
        if oldest not in [part.request_id for part in plan.slices]:
            is_last_under_way = self.mirrors[oldest].is_last_under_way(self.scheduler.max_context_tokens)
            is_prefill = all(part.kv_len == part.q_len for part in plan.slices)
            assert is_last_under_way or (is_prefill and self.config.policy is PolicyName.PREFILL_FIRST)
