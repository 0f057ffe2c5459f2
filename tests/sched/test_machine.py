"""Any sequence of calls at all, with Hypothesis looking for the shortest one that breaks a rule."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from mixattn.config import PolicyName, SchedulerConfig
from mixattn.sched import policy
from mixattn.sched.scheduler import QueueFull
from tests.sched.harness import VOCAB_SIZE, Session, limits_for, make_request

MAX_QUEUED = 6


class SchedulerMachine(RuleBasedStateMachine):
    """``Session`` checks every call; the rules only make them."""

    @initialize(
        policy_name=st.sampled_from(PolicyName),
        max_num_seqs=st.integers(1, 4),
        spare_budget=st.integers(0, 6),
        page_size=st.integers(1, 4),
        num_pages=st.integers(4, 12),
        is_eager=st.booleans(),
    )
    def start(
        self,
        policy_name: PolicyName,
        max_num_seqs: int,
        spare_budget: int,
        page_size: int,
        num_pages: int,
        is_eager: bool,
    ) -> None:
        limits = limits_for(policy_name)
        config = SchedulerConfig(max_num_seqs + spare_budget, max_num_seqs, MAX_QUEUED, 40, policy_name, **limits)
        self.session = Session(config, num_pages, page_size, is_eager)
        self.num_requests = 0

    @rule(
        prompt=st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=10),
        max_tokens=st.integers(1, 20),
        ignore_eos=st.booleans(),
    )
    def add(self, prompt: list[int], max_tokens: int, ignore_eos: bool) -> None:
        request = make_request(f"r{self.num_requests}", prompt, max_tokens, ignore_eos=ignore_eos)
        if len(prompt) >= self.session.scheduler.max_context_tokens:
            with pytest.raises(ValueError, match="prompt_token_ids"):
                self.session.scheduler.add(request)
        elif len(self.session.waiting) >= MAX_QUEUED:
            with pytest.raises(QueueFull):
                self.session.scheduler.add(request)
        else:
            self.session.add(request)
            self.num_requests += 1

    @precondition(lambda self: self.num_requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.session.abort(f"r{data.draw(st.integers(0, self.num_requests - 1))}")

    @rule()
    def schedule(self) -> None:
        if len(self.session.outstanding) == 2:
            with pytest.raises(RuntimeError, match="2 plans are uncommitted"):
                self.session.scheduler.schedule(self.session.now)
        else:
            self.session.schedule()

    @precondition(lambda self: self.session.outstanding)
    @rule()
    def commit(self) -> None:
        self.session.commit()

    @precondition(lambda self: len(self.session.outstanding) == 2)
    @rule()
    def commit_in_the_wrong_order(self) -> None:
        plan, _ = self.session.outstanding[1]
        with pytest.raises(RuntimeError, match="commit in order"):
            self.session.scheduler.commit(plan, None, self.session.now)  # type: ignore[arg-type]

    @precondition(lambda self: self.session.outstanding)
    @rule()
    def fail(self) -> None:
        self.session.fail()

    def teardown(self) -> None:
        if hasattr(self, "session"):
            self.session.drain()
            self.session.check_outputs()


@pytest.fixture(autouse=True, scope="module")
def without_room_to_grow() -> Iterator[None]:
    """Requests this small would hardly ever be preempted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "GROWTH_TOKENS", 0)
        yield


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None, derandomize=True)
