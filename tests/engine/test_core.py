"""EngineCore: seeds, counting, and requests through both of its doors. What it schedules is tested in tests/sched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mixattn.config import PolicyName, SchedulerConfig
from mixattn.engine.core import EngineCore, derive_seed
from mixattn.kv.page_pool import PagePool
from mixattn.metrics import Histogram, SchedulerStats, StepRecord
from mixattn.sched.scheduler import QueueFull, Scheduler
from mixattn.types import BatchPlan, FinishReason, Request, SamplingParams, StepResult, TokenEvent

ROOT = Path(__file__).resolve().parents[2]
EOS = 2


def make_core(seed: int = 0, num_pages: int = 100, **config: object) -> EngineCore:
    return EngineCore(Scheduler(SchedulerConfig(16, 4, **config), PagePool(num_pages, 4)), seed)  # type: ignore[arg-type]


def make_request(request_id: str, prompt_len: int = 3, arrival_s: float = 0.0, **sampling: object) -> Request:
    return Request(
        request_id,
        range(prompt_len),
        SamplingParams(**sampling),  # type: ignore[arg-type]
        arrival_s,
        frozenset({EOS}),
    )


def tokens(plan: BatchPlan, token_id: int = 7) -> StepResult:
    return StepResult({part.request_id: token_id for part in plan.slices if part.is_sampled})


def step(core: EngineCore, begin_s: float, end_s: float, token_id: int = 7) -> list[TokenEvent]:
    plan = core.begin(begin_s)
    assert plan is not None
    return core.end(plan, tokens(plan, token_id), end_s)


def seeds(core: EngineCore) -> dict[str, int | None]:
    plan = core.begin(0.0)
    assert plan is not None
    return {part.request_id: part.sampling.seed for part in plan.slices}


# Seeds


def test_derive_seed_is_splitmix64() -> None:
    # The first three outputs of the reference implementation for the state 1234567, less their last bit.
    known = (6457827717110365317, 3203168211198807973, 9817491932198370423)
    assert [derive_seed(1234567, i) for i in range(3)] == [value >> 1 for value in known]
    assert derive_seed(0, 0) == 0xE220A8397B1DCDAF >> 1


def test_derive_seed_is_a_valid_seed_for_any_engine_seed() -> None:
    values = [derive_seed(seed, i) for seed in (-1, 0, 2**63, 2**64 + 5) for i in range(100)]
    assert len(set(values)) == len(values)
    assert all(SamplingParams(seed=value).seed == value for value in values)


def test_request_without_seed_gets_one_from_its_place_in_the_order() -> None:
    def of(engine_seed: int) -> dict[str, int | None]:
        core = make_core(engine_seed)
        core.add_request(make_request("a"))
        core.add_request(make_request("b", seed=5))
        with pytest.raises(ValueError, match="prompt_token_ids"):
            core.add_request(make_request("refused", prompt_len=0))
        core.add_request(make_request("c"))
        return seeds(core)

    assert of(3) == {"a": derive_seed(3, 0), "b": 5, "c": derive_seed(3, 2)}
    assert of(3) == of(3)
    assert of(3)["a"] != of(4)["a"]


def test_seed_survives_preemption() -> None:
    core = make_core(num_pages=10)
    for name in "ab":
        core.add_request(make_request(name, prompt_len=8, max_tokens=30))
    seen: dict[str, set[int | None]] = {"a": set(), "b": set()}
    while (plan := core.begin(0.0)) is not None:
        for part in plan.slices:
            seen[part.request_id].add(part.sampling.seed)
        core.end(plan, tokens(plan), 0.0)
    assert core.stats().num_preemptions > 0
    assert seen == {"a": {derive_seed(0, 0)}, "b": {derive_seed(0, 1)}}


# Requests


def test_door_errors_reach_the_caller_and_leave_nothing() -> None:
    core = make_core(max_num_queued_reqs=1)
    with pytest.raises(ValueError, match="prompt_token_ids"):
        core.add_request(make_request("a", prompt_len=0))
    core.add_request(make_request("a"))
    with pytest.raises(QueueFull):
        core.add_request(make_request("b"))
    with pytest.raises(ValueError, match="request_id 'a' is in use"):
        core.add_request(make_request("a"))
    assert (core.num_running, core.num_waiting) == (0, 1)
    assert core.abort("a") and not core.abort("a") and not core.has_work


def test_events_carry_tokens_and_the_end() -> None:
    core = make_core()
    core.add_request(make_request("a", max_tokens=2))
    core.add_request(make_request("b", max_tokens=9))
    assert step(core, 0.0, 1.0) == [TokenEvent("a", 7, None, 1.0), TokenEvent("b", 7, None, 1.0)]
    assert step(core, 1.0, 2.0, EOS) == [
        TokenEvent("a", EOS, FinishReason.STOP, 2.0),
        TokenEvent("b", EOS, FinishReason.STOP, 2.0),
    ]
    assert core.begin(2.0) is None and not core.has_work


def test_failed_step_tells_why_and_others_go_on() -> None:
    core = make_core(policy=PolicyName.PREFILL_FIRST)
    core.add_request(make_request("a", max_tokens=2))
    step(core, 0.0, 1.0)
    core.add_request(make_request("b"))
    plan, ahead = core.begin(1.0), core.begin(1.5)
    assert plan is not None and [part.request_id for part in plan.slices] == ["b"]
    assert ahead is not None
    assert core.fail(plan, "out of cheese", 2.0) == [TokenEvent("b", None, FinishReason.ERROR, 2.0, "out of cheese")]
    assert step(core, 3.0, 4.0) == [TokenEvent("a", 7, FinishReason.LENGTH, 4.0)]
    assert core.last_step == StepRecord(3, 1.0, 0, 1)
    assert core.metrics.num_finished[FinishReason.ERROR] == 1
    assert core.stats().num_pages_used == 0 and not core.has_work


# Counting


def test_metrics_of_one_request() -> None:
    core = make_core()
    core.add_request(make_request("a", prompt_len=20, arrival_s=10.0, max_tokens=3))
    step(core, 12.0, 13.0)
    assert core.last_step == StepRecord(0, 1.0, 16, 0)
    step(core, 13.0, 15.0)
    assert core.last_step == StepRecord(1, 2.0, 4, 0)
    step(core, 15.5, 16.0)
    step(core, 16.0, 20.0)
    assert core.last_step == StepRecord(3, 4.0, 0, 1)
    metrics = core.metrics
    assert (metrics.num_steps, metrics.num_prefill_tokens, metrics.num_decode_tokens) == (4, 20, 2)
    assert metrics.num_generated_tokens == 3
    assert (metrics.queue_s.count, metrics.queue_s.total) == (1, 2.0)
    assert (metrics.time_to_first_token_s.count, metrics.time_to_first_token_s.total) == (1, 5.0)
    assert (metrics.inter_token_s.count, metrics.inter_token_s.total) == (2, 1.0 + 4.0)
    assert (metrics.end_to_end_s.count, metrics.end_to_end_s.total) == (1, 10.0)
    assert (metrics.step_s.count, metrics.step_s.total) == (4, 1.0 + 2.0 + 0.5 + 4.0)
    assert metrics.num_finished[FinishReason.LENGTH] == 1


def test_step_time_of_overlapping_plans_is_not_counted_twice() -> None:
    core = make_core()
    core.add_request(make_request("a", max_tokens=9))
    first, second = core.begin(0.0), core.begin(0.5)
    assert first is not None and second is not None
    core.end(first, tokens(first), 2.0)
    core.end(second, tokens(second), 3.0)
    assert core.metrics.step_s.total == 2.0 + 1.0


def test_preempted_request_keeps_its_first_queue_time_and_counts_its_gap() -> None:
    core = make_core(num_pages=10)
    for name in "ab":
        core.add_request(make_request(name, prompt_len=8, max_tokens=30))
    now = 0.0
    while core.has_work:
        step(core, now, now + 1.0)
        now += 1.0
    stats = core.stats()
    assert stats.num_preemptions > 0 and stats.num_recomputed_tokens > 0
    metrics = core.metrics
    assert metrics.queue_s.count == metrics.time_to_first_token_s.count == 2
    assert metrics.inter_token_s.count == 2 * 29
    assert metrics.inter_token_s.total == metrics.end_to_end_s.total - metrics.time_to_first_token_s.total


def test_pages_free_and_used_sum_to_the_pool_at_any_time() -> None:
    core = make_core()
    core.add_request(make_request("a", prompt_len=9, max_tokens=2))
    assert core.stats() == SchedulerStats(0, 1, 100, 0, 0, 0, 0)
    plan = core.begin(0.0)
    assert plan is not None
    assert core.stats() == SchedulerStats(1, 0, 97, 3, 0, 0, 0)
    core.abort("a")
    assert core.stats() == SchedulerStats(0, 0, 97, 3, 0, 0, 0)
    core.end(plan, tokens(plan), 1.0)
    assert core.stats() == SchedulerStats(0, 0, 100, 0, 0, 0, 0)


def test_decode_stalls_are_counted() -> None:
    core = make_core(policy=PolicyName.PREFILL_FIRST)
    core.add_request(make_request("a", max_tokens=9))
    step(core, 0.0, 1.0)
    core.add_request(make_request("b"))
    step(core, 1.0, 2.0)
    assert core.stats().num_decode_stalls == 1


@pytest.mark.parametrize(
    ("reason", "num_ended_by_themselves"),
    [(FinishReason.ABORT, 0), (FinishReason.STOP, 1)],
    ids=["client", "stop-string"],
)
def test_abort_counts_as_its_reason(reason: FinishReason, num_ended_by_themselves: int) -> None:
    core = make_core()
    core.add_request(make_request("a", max_tokens=9))
    step(core, 0.0, 1.0)
    core.abort("a", reason)
    assert core.metrics.num_finished[reason] == 1
    assert core.metrics.end_to_end_s.count == num_ended_by_themselves


def test_histogram_counts_a_bound_in_its_own_bucket() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 9.0):
        histogram.observe(value)
    assert histogram.counts == [2, 2, 1]
    assert (histogram.count, histogram.total) == (5, 14.0)


# Imports


def test_engine_core_loads_and_runs_without_torch() -> None:
    code = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "numpy", "triton", "asyncio"):
            raise ImportError(f"{name} is not here")

sys.meta_path.insert(0, Blocker())
from mixattn.config import SchedulerConfig
from mixattn.engine.core import EngineCore
from mixattn.kv.page_pool import PagePool
from mixattn.sched.scheduler import Scheduler
from mixattn.types import Request, SamplingParams, StepResult

core = EngineCore(Scheduler(SchedulerConfig(), PagePool(8, 16)))
core.add_request(Request("a", [1, 2, 3], SamplingParams(max_tokens=2)))
while core.has_work:
    core.end(core.begin(0.0), StepResult({"a": 1}), 0.0)
assert core.metrics.num_generated_tokens == 2
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
