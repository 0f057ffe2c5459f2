"""Each rule of the scheduler by name. ``Session`` (harness.py) checks every call made through it against a model."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from mixattn.config import PolicyName, SchedulerConfig
from mixattn.kv.page_pool import PagePool
from mixattn.sched.scheduler import QueueFull, Scheduler
from mixattn.types import BatchPlan, FinishReason, StepResult
from tests.sched.harness import Session, is_decode, make_request


def session(
    *,
    budget: int = 16,
    seqs: int = 4,
    pages: int = 100,
    page_size: int = 4,
    max_len: int = 200,
    queued: int = 16,
    tick_s: float = 1.0,
    **rest: object,
) -> Session:
    config = SchedulerConfig(budget, seqs, queued, max_len, **rest)  # type: ignore[arg-type]
    return Session(config, pages, page_size, tick_s=tick_s)


def rows(plan: BatchPlan | None) -> list[tuple[str, int, int]]:
    """(request_id, q_len, kv_len) of each slice."""
    assert plan is not None
    return [(part.request_id, part.q_len, part.kv_len) for part in plan.slices]


def step(s: Session) -> list[tuple[str, int, int]]:
    planned = rows(s.schedule())
    s.commit()
    return planned


# Door


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt_token_ids must hold at least one token"),
        (200, "prompt_token_ids holds 200 tokens; with max_model_len 200 at most 199"),
        (41, "prompt_token_ids holds 41 tokens, which take 11 pages of 4 tokens; the KV pool has 10"),
        ([1.5], "prompt_token_ids must be 64-bit integers"),
        ([2**63], "prompt_token_ids must be 64-bit integers"),
    ],
)
def test_add_of_what_can_never_be_served_names_the_bound(prompt: object, message: str) -> None:
    s = session(pages=10)
    with pytest.raises(ValueError, match=message):
        s.scheduler.add(make_request("a", prompt))  # type: ignore[arg-type]
    assert not s.scheduler.has_work


def test_add_of_a_prompt_that_fills_the_pool_is_served() -> None:
    s = session(pages=10, budget=64)
    s.add(make_request("a", 40, max_tokens=9))
    s.drain()
    s.check_outputs()
    assert s.ended["a"].finish_reason is FinishReason.LENGTH
    assert len(s.ended["a"].output) == 1


def test_add_of_an_id_in_use_is_refused_until_its_end() -> None:
    s = session()
    s.add(make_request("a", 3))
    for _ in range(2):  # waiting, then running
        with pytest.raises(ValueError, match="request_id 'a' is in use"):
            s.scheduler.add(make_request("a", 3))
        step(s)
    s.drain()
    s.scheduler.add(make_request("a", 3))


def test_add_to_a_full_queue_raises_queue_full() -> None:
    s = session(queued=2)
    s.add(make_request("a", 3))
    s.add(make_request("b", 3))
    with pytest.raises(QueueFull, match=r"max_num_queued_reqs \(2\)"):
        s.scheduler.add(make_request("c", 3))
    step(s)
    s.add(make_request("c", 3))


# Stall-free batching


def test_sarathi_long_prompt_delays_no_decode() -> None:
    s = session()
    s.add(make_request("a", 3, max_tokens=20))
    s.add(make_request("b", 5, max_tokens=20))
    step(s)
    s.add(make_request("long", 50, max_tokens=1))
    planned = [step(s) for _ in range(5)]
    assert [rows[:2] for rows in planned] == [[("a", 1, 4 + i), ("b", 1, 6 + i)] for i in range(5)]
    assert [rows[2:] for rows in planned] == [
        [("long", 14, 14)],
        [("long", 14, 28)],
        [("long", 14, 42)],
        [("long", 8, 50)],
        [],
    ]
    assert s.scheduler.stats().num_decode_stalls == 0


def test_sarathi_fills_the_budget_with_the_next_prompts() -> None:
    s = session()
    for name, prompt in (("a", 10), ("b", 10), ("c", 3)):
        s.add(make_request(name, prompt))
    assert step(s) == [("a", 10, 10), ("b", 6, 6)]
    assert step(s) == [("a", 1, 11), ("b", 4, 10), ("c", 3, 3)]
    assert step(s) == [("a", 1, 12), ("b", 1, 11), ("c", 1, 4)]


def test_prefill_first_stalls_decodes_and_counts_it() -> None:
    s = session(policy=PolicyName.PREFILL_FIRST)
    s.add(make_request("a", 3))
    s.add(make_request("b", 3))
    assert step(s) == [("a", 3, 3), ("b", 3, 3)]
    s.add(make_request("long", 50))
    s.add(make_request("c", 10))
    assert step(s) == [("long", 50, 50)]
    assert step(s) == [("c", 10, 10)]
    assert s.scheduler.stats().num_decode_stalls == 2 + 3
    assert step(s) == [("a", 1, 4), ("b", 1, 4), ("long", 1, 51), ("c", 1, 11)]


def test_no_more_than_max_num_seqs_run() -> None:
    s = session(seqs=2)
    for name in "abc":
        s.add(make_request(name, 2, max_tokens=3))
    assert step(s) == [("a", 2, 2), ("b", 2, 2)]
    assert [len(step(s)) for _ in range(2)] == [2, 2]
    assert step(s) == [("c", 2, 2)]


def test_chunks_but_the_last_give_no_token() -> None:
    s = session(budget=8)
    s.add(make_request("a", 20))
    sampled = []
    for _ in range(4):
        plan = s.schedule()
        assert plan is not None
        sampled.append((plan.slices[0].is_sampled, plan.num_decodes))
        s.commit()
    assert sampled == [(False, 0), (False, 0), (True, 0), (True, 1)]


# Pages


def test_admission_takes_the_pages_of_the_whole_prompt() -> None:
    s = session(budget=4)
    s.add(make_request("a", 30))
    s.schedule()
    assert s.pool.num_used == 8


def test_small_prompt_does_not_overtake_one_that_waits_for_pages() -> None:
    s = session(pages=10)
    s.add(make_request("a", 12, max_tokens=4))
    step(s)
    s.add(make_request("big", 32))
    s.add(make_request("small", 1))
    seen = [[name for name, _, _ in step(s)] for _ in range(4)]
    assert seen == [["a"], ["a"], ["a"], ["big"]]


def test_decode_without_a_page_preempts_the_newest() -> None:
    s = session(pages=10, budget=64)
    s.add(make_request("a", 8, max_tokens=40))
    s.add(make_request("b", 8, max_tokens=40))
    while s.scheduler.num_preemptions == 0:
        step(s)
    assert s.running == ["a"] and s.waiting == ["b"]
    output = list(s.mirrors["b"].output)
    assert output, "b has lost its output"
    stats = s.scheduler.stats()
    assert stats.num_recomputed_tokens == 8 + len(output) - 1
    plan = s.schedule()
    while plan is not None and plan.slices[-1].request_id != "b":
        s.commit()
        plan = s.schedule()
    assert plan is not None
    again = plan.slices[-1]
    assert (again.q_len, again.kv_len, again.prompt_len) == (8 + len(output), 8 + len(output), 8)
    assert again.output_idx == len(output) and again.is_sampled and not is_decode(again)
    assert list(again.token_ids or ()) == [*range(1, 9), *output]
    s.drain()
    s.check_outputs()


def test_preempted_request_comes_before_all_that_waited() -> None:
    s = session(pages=10, seqs=2, budget=64)
    for name in "ab":
        s.add(make_request(name, 8, max_tokens=40))
    s.add(make_request("c", 1, max_tokens=1))
    while s.scheduler.num_preemptions == 0:
        step(s)
    assert s.waiting == ["b", "c"]
    s.drain()
    s.check_outputs()


def test_request_that_outgrows_the_pool_alone_ends_by_length() -> None:
    s = session(pages=3, budget=8)
    assert s.scheduler.max_context_tokens == 13
    s.add(make_request("a", 5, max_tokens=None))
    s.drain()
    assert len(s.ended["a"].output) == 8
    assert s.ended["a"].finish_reason is FinishReason.LENGTH


def test_page_ids_of_a_plan_do_not_change_when_the_request_grows() -> None:
    s = session()
    s.add(make_request("a", 4, max_tokens=9))
    first = s.schedule()
    assert first is not None
    before = first.slices[0].page_ids.tolist()
    view = memoryview(first.slices[0].page_ids)  # an executor's; a resize under it would raise BufferError
    second = s.schedule()
    assert second is not None
    assert view.tolist() == before
    assert second.slices[0].page_ids.tolist()[:1] == before and len(second.slices[0].page_ids) == 2


# Ends


@pytest.mark.parametrize(
    ("params", "tokens", "num_taken", "reason"),
    [
        ({"max_tokens": 3}, [5, 6, 7, 8], 3, FinishReason.LENGTH),
        ({"max_tokens": 4, "ignore_eos": False}, [5, 0, 7, 8], 2, FinishReason.STOP),
        ({"max_tokens": 4, "ignore_eos": True}, [5, 0, 7, 8], 4, FinishReason.LENGTH),
        ({"max_tokens": 2, "ignore_eos": False}, [5, 0, 7, 8], 2, FinishReason.STOP),
        ({"max_tokens": 4, "ignore_eos": False, "min_tokens": 3}, [0, 0, 0, 8], 3, FinishReason.STOP),
        ({"max_tokens": 4, "stop_token_ids": [7]}, [5, 6, 7, 8], 3, FinishReason.STOP),
        ({"max_tokens": 4, "stop_token_ids": [7], "min_tokens": 4}, [5, 7, 7, 8], 4, FinishReason.LENGTH),
        ({"max_tokens": None}, [5] * 9, 6, FinishReason.LENGTH),
    ],
    ids=["max-tokens", "eos", "ignore-eos", "eos-at-max-tokens", "min-tokens", "stop-id", "stop-id-min", "model-len"],
)
def test_request_ends(params: dict[str, object], tokens: list[int], num_taken: int, reason: FinishReason) -> None:
    pool = PagePool(10, 4)
    scheduler = Scheduler(SchedulerConfig(16, 4, 4, max_model_len=10), pool)
    scheduler.add(make_request("a", 4, **params))  # type: ignore[arg-type]
    events = []
    for token in tokens:
        plan = scheduler.schedule(0.0)
        if plan is None:
            break
        events += scheduler.commit(plan, StepResult({"a": token}), 0.0)
    assert [e.token_id for e in events] == tokens[:num_taken]
    assert [e.finish_reason for e in events] == [None] * (num_taken - 1) + [reason]
    assert pool.num_free == 10


# Abort


def test_abort_of_a_waiting_request_forgets_it() -> None:
    s = session()
    s.add(make_request("a", 3))
    s.abort("a")
    assert s.schedule() is None and not s.scheduler.has_work


def test_abort_of_a_running_request_frees_its_pages_at_once() -> None:
    s = session()
    s.add(make_request("a", 8, max_tokens=9))
    step(s)
    assert s.pool.num_used == 2
    s.abort("a")
    assert s.pool.num_used == 0
    assert s.schedule() is None


def test_abort_of_a_planned_request_frees_its_pages_at_the_commit() -> None:
    s = session()
    s.add(make_request("a", 8, max_tokens=9))
    s.schedule()
    s.schedule()
    s.abort("a")
    assert s.pool.num_used == 3, "the second plan writes to the third page"
    s.commit()
    assert s.pool.num_used == 3, "the second plan still runs"
    s.commit()
    assert s.pool.num_used == 0


def test_abort_of_an_unknown_request_is_false() -> None:
    s = session()
    assert not s.scheduler.abort("a")
    s.add(make_request("a", 3, max_tokens=1))
    step(s)
    assert not s.scheduler.abort("a")


def test_id_used_again_after_an_abort_gets_no_token_of_its_predecessor() -> None:
    s = session()
    s.scheduler.add(make_request("a", 3))
    old = s.scheduler.schedule(0.0)
    assert old is not None
    s.scheduler.abort("a")
    s.scheduler.add(make_request("a", 5, max_tokens=2))
    new = s.scheduler.schedule(0.0)
    assert rows(new) == [("a", 5, 5)]
    assert s.scheduler.commit(old, StepResult({"a": 9}), 0.0) == []
    assert new is not None
    assert [e.token_id for e in s.scheduler.commit(new, StepResult({"a": 8}), 0.0)] == [8]
    s.scheduler.check_invariants()


# One step ahead


def test_lookahead_decode_does_not_know_its_input() -> None:
    s = session()
    s.add(make_request("a", 3))
    s.schedule()
    ahead = s.schedule()
    assert rows(ahead) == [("a", 1, 4)]
    assert ahead is not None
    assert (ahead.slices[0].token_ids, ahead.slices[0].output_idx, len(ahead.slices[0].history)) == (None, 1, 3)
    s.commit()
    assert len(ahead.slices[0].history) == 4
    third = s.schedule()
    assert third is not None and third.slices[0].token_ids is None
    s.drain()
    s.check_outputs()


def test_lookahead_token_of_a_request_that_ended_meanwhile_is_dropped() -> None:
    scheduler = Scheduler(SchedulerConfig(16, 4), PagePool(10, 4))
    scheduler.add(make_request("a", 3, ignore_eos=False))
    first, second = scheduler.schedule(0.0), scheduler.schedule(0.0)
    assert first is not None and second is not None
    assert scheduler.commit(first, StepResult({"a": 0}), 0.0)[0].finish_reason is FinishReason.STOP
    assert scheduler.stats().num_pages_used == 1, "the second plan still has it"
    assert scheduler.commit(second, StepResult({"a": 4}), 0.0) == []
    assert scheduler.stats().num_pages_used == 0


def test_lookahead_leaves_out_a_request_whose_last_token_is_under_way() -> None:
    s = session()
    s.add(make_request("a", 3, max_tokens=1))
    s.add(make_request("b", 3, max_tokens=9))
    s.schedule()
    assert rows(s.schedule()) == [("b", 1, 4)]


def test_lookahead_waits_rather_than_preempt() -> None:
    s = session(pages=10, budget=64)
    s.add(make_request("a", 8, max_tokens=40))
    s.add(make_request("b", 8, max_tokens=40))
    while s.schedule() is not None:
        if len(s.outstanding) == 2:
            s.commit()
    assert s.outstanding, "without an uncommitted plan there is always a step"
    assert s.scheduler.num_preemptions == 0 and s.pool.num_free == 0
    s.commit()
    assert rows(s.schedule())[0][0] == "a"
    assert s.scheduler.num_preemptions == 1


def test_third_uncommitted_plan_is_refused() -> None:
    s = session()
    s.add(make_request("a", 3))
    s.schedule()
    s.schedule()
    with pytest.raises(RuntimeError, match="2 plans are uncommitted"):
        s.scheduler.schedule(s.now)


def test_commit_out_of_order_is_refused() -> None:
    s = session()
    s.add(make_request("a", 3))
    first, second = s.schedule(), s.schedule()
    assert first is not None and second is not None
    with pytest.raises(RuntimeError, match="step 1 is not the oldest uncommitted one"):
        s.scheduler.commit(second, StepResult({"a": 1}), s.now)
    s.commit()
    with pytest.raises(RuntimeError, match="step 0 is not the oldest uncommitted one"):
        s.scheduler.commit(first, StepResult({"a": 1}), s.now)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [({}, "lacks the sampled slice 'a'"), ({"a": 1, "b": 2}, "each of its 1 sampled slices, got 2")],
)
def test_commit_of_wrong_tokens_changes_nothing(tokens: dict[str, int], message: str) -> None:
    s = session(budget=8)
    s.add(make_request("a", 3))
    s.add(make_request("b", 10))
    plan = s.schedule()
    assert plan is not None and [part.is_sampled for part in plan.slices] == [True, False]
    with pytest.raises(ValueError, match=message):
        s.scheduler.commit(plan, StepResult(tokens), s.now)
    s.drain()
    s.check_outputs()


def test_time_that_goes_back_is_refused() -> None:
    s = session()
    s.add(make_request("a", 3))
    s.schedule()
    with pytest.raises(ValueError, match="now must not go back"):
        s.scheduler.schedule(s.now - 0.5)


# Time


class Machine:
    """A clock, and a step time that grows with rows and keys; what happens between steps takes a millisecond."""

    def __init__(self, s: Session, noise: float = 0.0) -> None:
        self.s = s
        self.noise, self.rng = noise, random.Random(0)
        self.steps: list[tuple[float, int, int]] = []
        """(seconds, decodes, rows of chunks) of each step."""

    def step(self) -> None:
        plan = self.s.schedule()
        assert plan is not None
        keys = sum(part.q_len * part.kv_len for part in plan.slices)
        step_s = (0.004 + 1e-3 * plan.num_tokens + 1e-6 * keys) * math.exp(self.rng.gauss(0.0, self.noise))
        self.steps.append((step_s, plan.num_decodes, plan.num_tokens - plan.num_decodes))
        self.s.commit(step_s)


def timed_session(**limits: float) -> Session:
    s = session(budget=256, seqs=8, pages=1000, max_len=3000, policy=PolicyName.TIME_BUDGET, tick_s=0.001, **limits)
    for idx in range(4):
        s.add(make_request(f"stream-{idx}", 32, max_tokens=400))
    return s


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_time_budget_keeps_the_slo_while_a_long_prompt_is_read(noise: float) -> None:
    s = timed_session(tbt_slo_ms=40.0)
    machine = Machine(s, noise)
    for _ in range(20):
        machine.step()
    s.add(make_request("long", 2000))
    machine.steps.clear()
    while "long" in s.waiting or not s.mirrors["long"].output:
        machine.step()
    mixed = machine.steps
    assert all(num_decodes == 4 for _, num_decodes, _ in mixed)
    late = [step_s for step_s, _, _ in mixed if step_s + 0.001 > 0.040]
    assert len(late) <= (0 if noise == 0.0 else 0.05 * len(mixed))
    # It does not keep it by giving prompts nothing: once steps are known, they take most of what they may.
    settled = [step_s for step_s, _, _ in mixed[10:-1]]
    assert statistics.mean(settled) > (0.9 if noise == 0.0 else 0.8) * 0.039
    # The longer the context, the shorter the chunk.
    assert mixed[-2][2] < mixed[10][2]


def test_time_budget_max_slowdown_is_of_the_decodes_alone() -> None:
    s = timed_session(max_slowdown=3.0)
    machine = Machine(s)
    for _ in range(20):
        machine.step()
    alone_s = machine.steps[-1][0] + 0.001
    s.add(make_request("long", 1000))
    machine.steps.clear()
    while "long" in s.waiting or not s.mirrors["long"].output:
        machine.step()
    slowdowns = [(step_s + 0.001) / alone_s for step_s, _, _ in machine.steps]
    assert max(slowdowns) < 3.2  # its decodes' keys grow meanwhile, and so does what they take alone
    assert statistics.median(slowdowns) > 2.6


def test_time_budget_learns_from_token_to_token_but_not_from_idle_time(monkeypatch: pytest.MonkeyPatch) -> None:
    s = timed_session(tbt_slo_ms=40.0)
    seen: list[float] = []
    monkeypatch.setattr(s.scheduler._step_times, "observe", lambda load, step_s: seen.append(step_s))
    machine = Machine(s)
    while s.scheduler.has_work:
        machine.step()
    s.now += 3600.0
    s.add(make_request("late", 32, max_tokens=2))
    machine.step()
    s.abort("late")  # idle without a commit that says so
    s.now += 3600.0
    s.add(make_request("later", 32, max_tokens=2))
    machine.step()
    machine.step()
    between_s = 0.001
    expected = [step_s + between_s for step_s, _, _ in machine.steps]
    for first in (0, -3, -2):  # nothing was before the first step, nor, for an hour, before the prompts that are late
        expected[first] -= between_s
    assert seen == pytest.approx(expected)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"policy": PolicyName.TIME_BUDGET}, "one of them must; policy is time_budget"),
        ({"tbt_slo_ms": 1.0}, "go with policy time_budget, and one of them must; policy is sarathi"),
        ({"policy": PolicyName.TIME_BUDGET, "tbt_slo_ms": 0.0}, "tbt_slo_ms must be > 0, got 0.0"),
        ({"policy": PolicyName.TIME_BUDGET, "max_slowdown": 1.0}, "max_slowdown must be > 1, got 1.0"),
    ],
)
def test_limits_of_time_are_checked(limits: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        session(**limits)


# Failure


def test_failed_step_ends_its_requests_and_no_others() -> None:
    s = session(policy=PolicyName.PREFILL_FIRST)
    s.add(make_request("a", 3, max_tokens=3))
    step(s)
    s.add(make_request("b", 3))
    s.schedule()
    s.fail()
    assert s.ended["b"].finish_reason is FinishReason.ERROR
    s.drain()
    s.check_outputs()
    assert len(s.ended["a"].output) == 3


def test_failed_step_withdraws_the_one_prepared_after_it() -> None:
    s = session()
    s.add(make_request("a", 16))
    assert rows(s.schedule()) == [("a", 16, 16)]
    s.add(make_request("b", 20))
    assert rows(s.schedule()) == [("a", 1, 17), ("b", 15, 15)]
    s.fail()
    assert step(s) == [("b", 16, 16)]
    s.drain()
    s.check_outputs()
    assert {name: m.finish_reason for name, m in s.ended.items()} == {"a": FinishReason.ERROR, "b": FinishReason.LENGTH}


# The invariants can fail


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s, t: s._pool.allocate(1), "3 pages held, 4 in use"),
        (lambda s, t: t.page_ids.pop(), "miscounts its slots"),
        (lambda s, t: setattr(t, "num_computed", t.num_computed + 1), "no row left"),
        (lambda s, t: setattr(t, "num_tokens", t.num_tokens + 1), "awaits 2 tokens"),
        (lambda s, t: setattr(t, "is_ended", True), "runs after its end"),
        (lambda s, t: setattr(t, "last_step_idx", -1), "wrong about being planned"),
        (lambda s, t: setattr(t, "arrival_idx", 99), "out of order"),
        (lambda s, t: s._waiting["w"].page_ids.append(9), "w waits with rows or pages"),
        (lambda s, t: setattr(s, "_config", SchedulerConfig(8, max_num_seqs=1)), "step of 12 rows"),
    ],
    ids=["leak", "lost-page", "computed", "unknown", "ended", "unplanned", "order", "waiting", "budget"],
)
def test_check_invariants_finds_damage(damage: object, message: str) -> None:
    scheduler = Scheduler(SchedulerConfig(16, max_num_seqs=1), PagePool(100, 4))
    scheduler.add(make_request("r", 12))
    scheduler.add(make_request("w", 3))
    scheduler.schedule(0.0)
    scheduler.check_invariants()
    damage(scheduler, scheduler._running["r"])  # type: ignore[operator]
    with pytest.raises(AssertionError, match=message):
        scheduler.check_invariants()
