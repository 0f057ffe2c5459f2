"""What an engine counts: numbers only, no clock and no exporter. Times come from whoever drives the engine."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

from mixattn.types import FinishReason

_TIME_BOUNDS_S = tuple(mantissa * 10.0**exponent for exponent in range(-4, 3) for mantissa in (1.0, 2.5, 5.0))
"""0.1 ms to 500 s: from a step of a simulated GPU to a request that waited for minutes."""


@dataclass(frozen=True)
class SchedulerStats:
    """Gauges of this moment and counters since the start. Free and used pages always sum to the pool."""

    num_running: int
    num_waiting: int
    num_pages_free: int
    num_pages_used: int
    num_preemptions: int
    num_recomputed_tokens: int
    """Rows that were computed and then thrown away by a preemption."""
    num_decode_stalls: int
    """How many times a running decode was left out of a step; 0 for a stall-free policy."""


@dataclass(frozen=True)
class StepRecord:
    """One executed step."""

    step_idx: int
    step_s: float
    """From its beginning, or the end of the step before it if that is later, to its end."""
    num_prefill_tokens: int
    num_decode_tokens: int


class Histogram:
    """Counts of values by bound: ``counts[i]`` of those in (bounds[i - 1], bounds[i]], the last of those above all.

    Args:
        bounds: ascending.
    """

    __slots__ = ("bounds", "count", "counts", "total")

    def __init__(self, bounds: Sequence[float] = _TIME_BOUNDS_S) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.count = 0
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.count += 1
        self.total += value


@dataclass
class EngineMetrics:
    """Since the start of an engine. A time to first token or an end-to-end time begins at the request's arrival."""

    num_steps: int = 0
    num_prefill_tokens: int = 0
    """Rows of chunks; what a preemption makes to be computed again counts again."""
    num_decode_tokens: int = 0
    num_generated_tokens: int = 0
    num_finished: dict[FinishReason, int] = field(default_factory=lambda: dict.fromkeys(FinishReason, 0))
    step_s: Histogram = field(default_factory=Histogram)
    queue_s: Histogram = field(default_factory=Histogram)
    """Arrival to the beginning of the first step."""
    time_to_first_token_s: Histogram = field(default_factory=Histogram)
    inter_token_s: Histogram = field(default_factory=Histogram)
    end_to_end_s: Histogram = field(default_factory=Histogram)
    """Arrival to the last token, of requests that ended by themselves or by a stop string."""

    def on_step(self, step: StepRecord) -> None:
        self.num_steps += 1
        self.num_prefill_tokens += step.num_prefill_tokens
        self.num_decode_tokens += step.num_decode_tokens
        self.step_s.observe(step.step_s)


class RequestTimes:
    """When things happened to one request; what is observed goes into ``EngineMetrics``.

    Args:
        arrival_s: on the clock of all other times.
    """

    __slots__ = ("arrival_s", "is_scheduled", "last_token_s")

    def __init__(self, arrival_s: float) -> None:
        self.arrival_s = arrival_s
        self.is_scheduled = False
        self.last_token_s: float | None = None

    def on_scheduled(self, metrics: EngineMetrics, now: float) -> None:
        """It is in a step; only the first time counts."""
        if not self.is_scheduled:
            self.is_scheduled = True
            metrics.queue_s.observe(now - self.arrival_s)

    def on_token(self, metrics: EngineMetrics, now: float) -> None:
        metrics.num_generated_tokens += 1
        if self.last_token_s is None:
            metrics.time_to_first_token_s.observe(now - self.arrival_s)
        else:
            metrics.inter_token_s.observe(now - self.last_token_s)
        self.last_token_s = now

    def on_finish(self, metrics: EngineMetrics, reason: FinishReason) -> None:
        metrics.num_finished[reason] += 1
        if reason in (FinishReason.STOP, FinishReason.LENGTH) and self.last_token_s is not None:
            metrics.end_to_end_s.observe(self.last_token_s - self.arrival_s)
