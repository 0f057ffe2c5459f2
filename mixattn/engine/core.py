"""The engine without a clock and without tensors: requests in, plans out, tokens in, events out.

Whoever drives it says what time it is and executes the plans: real executors and real time, or a simulator.

    plan = core.begin(now)
    events = core.end(plan, execute(plan), now)       # or core.fail(plan, reason, now)

One further plan may be begun before the oldest has ended, so that it is ready when the executor is.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from mixattn.metrics import EngineMetrics, RequestTimes, SchedulerStats, StepRecord
from mixattn.sched.scheduler import Scheduler
from mixattn.types import BatchPlan, FinishReason, Request, StepResult, TokenEvent

_MASK_64 = 2**64 - 1


def derive_seed(seed: int, index: int) -> int:
    """Number ``index`` of the stream that ``seed`` starts, in [0, 2^63): well mixed, and at no time a state to keep.

    Source: SplitMix64; Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014, figure 17.
    """
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & _MASK_64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return (z ^ (z >> 31)) >> 1


class EngineCore:
    """A scheduler, seeds for requests that bring none, and the counting of what happens.

    Args:
        scheduler: this engine's alone.
        seed: of the seeds that requests are given; the same requests in the same order get the same ones.
    """

    def __init__(self, scheduler: Scheduler, seed: int = 0) -> None:
        self.metrics = EngineMetrics()
        self.last_step: StepRecord | None = None
        """The step that ended last."""
        self._scheduler = scheduler
        self._seed = seed
        self._num_requests = 0
        self._times: dict[str, RequestTimes] = {}
        self._begin_times_s: deque[float] = deque()
        self._last_end_s = float("-inf")

    @property
    def num_running(self) -> int:
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        return self._scheduler.num_waiting

    @property
    def has_work(self) -> bool:
        """Whether there is a request that has not ended, or a plan that has not."""
        return self._scheduler.has_work

    def stats(self) -> SchedulerStats:
        return self._scheduler.stats()

    def add_request(self, request: Request) -> None:
        """Queues a request. Its ``arrival_s`` is on the clock of ``now``.

        Raises:
            ValueError: it can never be served, or its id is in use; the message names the field and the bound.
            QueueFull: as many requests wait as may.
        """
        if request.sampling.seed is None:
            seed = derive_seed(self._seed, self._num_requests)
            request = replace(request, sampling=replace(request.sampling, seed=seed))
        self._scheduler.add(request)
        self._num_requests += 1
        self._times[request.request_id] = RequestTimes(request.arrival_s)

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> bool:
        """Ends a request without an event; False when there is none of this id.

        Args:
            request_id: waiting or running.
            reason: what it counts as; ``STOP`` for one that has come to a stop string.
        """
        if not self._scheduler.abort(request_id):
            return False
        self._times.pop(request_id).on_finish(self.metrics, reason)
        return True

    def begin(self, now: float) -> BatchPlan | None:
        """The next step to execute, or None: there is nothing to do, or nothing before the plan that runs has ended.

        Raises:
            RuntimeError: two plans have begun and not ended.
        """
        plan = self._scheduler.schedule(now)
        if plan is not None:
            self._begin_times_s.append(now)
            for part in plan.slices[plan.num_decodes :]:
                self._times[part.request_id].on_scheduled(self.metrics, now)
        return plan

    def end(self, plan: BatchPlan, result: StepResult, now: float) -> list[TokenEvent]:
        """The tokens that an executed step gave its requests, and which of them ended.

        Raises:
            RuntimeError: ``plan`` is not the one that began first.
            ValueError: the result is not one token for each sampled slice; nothing has changed.
        """
        events = self._scheduler.commit(plan, result, now)
        num_decodes = plan.num_decodes
        step_s = now - max(self._begin_times_s.popleft(), self._last_end_s)
        self._last_end_s = now
        self.last_step = StepRecord(plan.step_idx, step_s, plan.num_tokens - num_decodes, num_decodes)
        self.metrics.on_step(self.last_step)
        self._count(events)
        return events

    def fail(self, plan: BatchPlan, reason: str, now: float) -> list[TokenEvent]:
        """Ends the requests of a step whose execution failed, each with an event of ``FinishReason.ERROR``.

        All other requests go on. A plan that has begun after this one is withdrawn: it must not be executed, nor ended.

        Raises:
            RuntimeError: ``plan`` is not the one that began first.
        """
        events = self._scheduler.fail(plan, reason, now)
        self._begin_times_s.clear()
        self._last_end_s = now
        self._count(events)
        return events

    def _count(self, events: list[TokenEvent]) -> None:
        for event in events:
            times = self._times[event.request_id]
            if event.token_id is not None:
                times.on_token(self.metrics, event.time_s)
            if event.finish_reason is not None:
                del self._times[event.request_id]
                times.on_finish(self.metrics, event.finish_reason)
