"""What the engine process makes of commands, without a process, a model or a socket."""

from __future__ import annotations

import pickle

import msgspec
import pytest

from mixattn.config import SchedulerConfig
from mixattn.engine import ipc
from mixattn.engine.core import EngineCore
from mixattn.engine.process import EngineServer
from mixattn.engine.wall_driver import WallDriver
from mixattn.kv.page_pool import PagePool
from mixattn.sched.scheduler import Scheduler
from mixattn.types import BatchPlan, FinishReason, Request, SamplingParams, StepResult

VOCAB_SIZE = 10


class NothingToDoError(Exception):
    """The engine would wait for a command now."""


class ScriptedChannel:
    """Hands over commands step by step, through the wire's format both ways."""

    def __init__(self, script: list[list[ipc.Command]]) -> None:
        self._script = [[ipc.encoder.encode(command) for command in commands] for commands in script]
        self.events: list[ipc.Event] = []

    def send(self, event: ipc.Event) -> None:
        self.events.append(ipc.event_decoder.decode(ipc.encoder.encode(event)))
        if isinstance(event, ipc.StepOutputs) and self._script:
            self._script.pop(0)

    def receive(self, is_blocking: bool) -> ipc.Command | None:
        if self._script and self._script[0]:
            return ipc.command_decoder.decode(self._script[0].pop(0))
        if is_blocking:
            raise NothingToDoError
        return None


class CountingExecutor:
    """Gives token 5 to every request; fails in step ``fails_in``."""

    def __init__(self, fails_in: int | None = None) -> None:
        self._fails_in = fails_in

    def execute(self, plan: BatchPlan) -> StepResult:
        if plan.step_idx == self._fails_in:
            raise RuntimeError("the device is gone")
        return StepResult({part.request_id: 5 for part in plan.slices if part.is_sampled})


def run(script: list[list[ipc.Command]], fails_in: int | None = None) -> tuple[list[ipc.Event], WallDriver]:
    """All that the engine says, and the engine: commands of ``script[i]`` come before its i-th report."""
    config = SchedulerConfig(max_num_batched_tokens=16, max_num_seqs=2, max_num_queued_reqs=2, max_model_len=32)
    core = EngineCore(Scheduler(config, PagePool(num_pages=8, page_size=4)))
    driver = WallDriver(core, CountingExecutor(fails_in), VOCAB_SIZE)
    channel = ScriptedChannel(script)
    with pytest.raises(NothingToDoError):
        EngineServer(driver, channel).run()
    return channel.events, driver


def add(group_id: int, *names: str, prompt: tuple[int, ...] = (1, 2), max_tokens: int = 3) -> ipc.AddRequests:
    sampling = SamplingParams(max_tokens=max_tokens, stop_token_ids=[7], logit_bias={5: 1.0})
    return ipc.AddRequests(group_id, [Request(name, list(prompt), sampling) for name in names])


def test_requests_are_admitted_then_served_to_their_end() -> None:
    events, _ = run([[add(0, "a", "b")]])
    assert events[0] == ipc.Admission(0, None)
    steps = [event for event in events if isinstance(event, ipc.StepOutputs)]
    assert [[e.token_id for e in step.events] for step in steps] == [[5, 5]] * 3
    assert [e.finish_reason for e in steps[-1].events] == [FinishReason.LENGTH] * 2
    assert [(s.stats.step.num_prefill_tokens, s.stats.step.num_decode_tokens) for s in steps] == [
        (4, 0),
        (0, 2),
        (0, 2),
    ]
    assert steps[0].stats.scheduler.num_pages_used > 0
    assert steps[-1].stats.scheduler.num_pages_used == 0
    assert sum(steps[-1].stats.queue_counts) == 2


def test_group_with_one_bad_request_is_refused_whole() -> None:
    command = add(0, "a")
    bad = Request("b", [VOCAB_SIZE], SamplingParams())
    events, driver = run([[ipc.AddRequests(4, [*command.requests, bad])]])
    admission = events[0]
    assert (admission.group_id, admission.is_queue_full) == (4, False)
    assert f"[0, {VOCAB_SIZE})" in admission.error
    assert not driver.core.has_work


def test_group_that_the_queue_cannot_hold_is_refused_whole() -> None:
    events, _ = run([[add(0, "a", "b", "c"), add(1, "d")]])
    assert events[0].is_queue_full
    assert "max_num_queued_reqs (2)" in events[0].error
    assert events[1] == ipc.Admission(1, None)
    names = {e.request_id for event in events if isinstance(event, ipc.StepOutputs) for e in event.events}
    assert names == {"d"}


def test_abort_gives_pages_back_before_the_next_step() -> None:
    events, driver = run([[add(0, "a", max_tokens=20)], [], [ipc.AbortRequests(["a", "unknown"], FinishReason.STOP)]])
    *_, before, after = events
    assert before.stats.scheduler.num_pages_used > 0
    assert (after.events, after.stats.step) == ([], None)
    assert after.stats.scheduler.num_pages_used == 0
    assert driver.core.metrics.num_finished[FinishReason.STOP] == 1


def test_failed_step_ends_its_requests_and_no_others() -> None:
    events, _ = run([[add(0, "a")], [add(1, "b")]], fails_in=0)
    ends = {
        e.request_id: e.finish_reason
        for event in events
        if isinstance(event, ipc.StepOutputs)
        for e in event.events
        if e.finish_reason is not None
    }
    assert ends == {"a": FinishReason.ERROR, "b": FinishReason.LENGTH}


@pytest.mark.parametrize("data", [b"", b"\xc1", pickle.dumps(["add", 1, []]), msgspec.msgpack.encode(["eval", "1"])])
def test_message_that_is_none_of_ours_is_refused(data: bytes) -> None:
    for decoder in (ipc.command_decoder, ipc.event_decoder):
        with pytest.raises(msgspec.DecodeError):
            decoder.decode(data)
