"""Random scripts: whatever the budget, the pool, the policy and the look-ahead, each request gives its own tokens."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from mixattn.config import PolicyName, SchedulerConfig
from mixattn.sched import policy
from mixattn.types import Request
from tests.sched.harness import VOCAB_SIZE, Session, limits_for, make_request

NUM_BATCHES = 10
SCRIPTS_PER_BATCH = 100


@dataclass(frozen=True)
class Script:
    """What arrives before which step, and what is aborted or breaks in it."""

    requests: dict[int, list[Request]]
    aborts: dict[int, list[str]]
    failures: set[int]
    num_steps: int


def random_script(rng: random.Random, has_accidents: bool, min_requests: int = 1) -> Script:
    num_steps = rng.choice([1, 5, 30])
    requests: dict[int, list[Request]] = {}
    aborts: dict[int, list[str]] = {}
    for i in range(rng.randint(min_requests, 10)):
        step = rng.randrange(num_steps)
        prompt = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 18))]
        max_tokens = rng.choice([None, 1, rng.randint(1, 60), rng.randint(30, 60)])
        request = make_request(
            f"r{i}",
            prompt,
            max_tokens,
            ignore_eos=rng.random() < 0.8,
            min_tokens=rng.randint(0, max_tokens or 4) if rng.random() < 0.3 else 0,
            stop_token_ids=(3,) if rng.random() < 0.1 else (),
        )
        requests.setdefault(step, []).append(request)
        if has_accidents and rng.random() < 0.3:
            aborts.setdefault(step + rng.randint(0, 10), []).append(request.request_id)
    failures = {step for step in range(num_steps + 20) if has_accidents and rng.random() < 0.03}
    return Script(requests, aborts, failures, num_steps)


def play(script: Script, session: Session, is_ahead: bool) -> None:
    """Runs the script; with ``is_ahead`` a further plan is made while one is uncommitted."""
    for step in range(script.num_steps + 20):
        for request in script.requests.get(step, []):
            session.add(request)
        while len(session.outstanding) < (2 if is_ahead else 1) and session.schedule():
            pass
        for request_id in script.aborts.get(step, []):
            session.abort(request_id)
        if session.outstanding:
            (session.fail if step in script.failures else session.commit)()
    session.drain(is_ahead)
    session.check_outputs()


def random_session(rng: random.Random) -> Session:
    page_size = rng.choice([1, 2, 3, 4, 16])
    max_num_seqs = rng.choice([1, 3, 8, 8])
    policy_name = rng.choice(list(PolicyName))
    config = SchedulerConfig(
        max_num_batched_tokens=max_num_seqs + rng.choice([0, 1, 3, 10, 1000]),
        max_num_seqs=max_num_seqs,
        max_num_queued_reqs=100,
        max_model_len=rng.choice([24, 80]),
        policy=policy_name,
        **limits_for(policy_name),
    )
    num_pages = -(-rng.choice([20, 50, 60, 80, 300]) // page_size)
    return Session(config, num_pages, page_size, is_eager=rng.random() < 0.5)


@pytest.mark.parametrize("batch", range(NUM_BATCHES))
def test_random_script_keeps_every_rule_and_every_token(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    num_preemptions = num_stalls = 0
    for i in range(SCRIPTS_PER_BATCH):
        rng = random.Random(batch * SCRIPTS_PER_BATCH + i)
        # Without room to grow, requests of this size are preempted often.
        monkeypatch.setattr(policy, "GROWTH_TOKENS", rng.choice([0, 0, 16]))
        session = random_session(rng)
        script = random_script(rng, has_accidents=rng.random() < 0.5)
        try:
            play(script, session, is_ahead=rng.random() < 0.6)
        except BaseException as error:
            error.args = (f"script {batch * SCRIPTS_PER_BATCH + i}: {error}",)
            raise
        num_preemptions += session.scheduler.stats().num_preemptions
        num_stalls += session.scheduler.stats().num_decode_stalls
    assert num_preemptions > 30, "the scripts hardly preempt"
    assert num_stalls > 30, "prefill_first hardly stalls"


@pytest.mark.parametrize("seed", range(5))
def test_outputs_do_not_depend_on_budget_pool_policy_or_lookahead(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "GROWTH_TOKENS", 0)
    script = random_script(random.Random(seed), has_accidents=False, min_requests=8)
    outputs = []
    num_preemptions = 0
    for policy_name in PolicyName:
        for budget, page_size, num_pages in [(8, 1, 300), (11, 4, 20), (1000, 16, 5), (1000, 16, 30)]:
            for is_ahead, is_eager in [(False, False), (True, False), (True, True)]:
                limits = limits_for(policy_name)
                config = SchedulerConfig(budget, max_num_seqs=8, max_model_len=80, policy=policy_name, **limits)
                session = Session(config, num_pages, page_size, is_eager)
                play(script, session, is_ahead)
                outputs.append(session.outputs())
                num_preemptions += session.scheduler.stats().num_preemptions
    assert all(output == outputs[0] for output in outputs)
    assert num_preemptions > 0, "this script does not preempt"


def test_same_calls_make_the_same_plans() -> None:
    def plans(seed: int) -> list[object]:
        rng = random.Random(seed)
        session = random_session(rng)
        script = random_script(rng, has_accidents=True)
        seen: list[object] = []
        for step in range(script.num_steps):
            for request in script.requests.get(step, []):
                session.add(request)
            plan = session.schedule()
            if plan is not None:
                seen.append([(s.request_id, s.q_len, s.kv_len, list(s.page_ids), s.token_ids) for s in plan.slices])
                session.commit()
        return seen

    for seed in range(20):
        assert plans(seed) == plans(seed)
