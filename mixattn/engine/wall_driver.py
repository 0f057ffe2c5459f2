"""Steps of an engine as real time passes: plan, execute, commit."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

from mixattn.engine.core import EngineCore
from mixattn.types import BatchPlan, FinishReason, Request, StepResult, TokenEvent

logger = logging.getLogger(__name__)


class Executor(Protocol):
    """What a driver asks of an executor."""

    def execute(self, plan: BatchPlan) -> StepResult:
        """One token for every sampled slice of the plan."""
        ...


class WallDriver:
    """Drives an ``EngineCore`` with an executor and a clock, one step per call.

    Args:
        core: the engine's state.
        executor: runs the plans that ``core`` makes.
        vocab_size: of the executor's model; ids of requests are checked against it.
        clock: seconds, never going back.
    """

    def __init__(
        self, core: EngineCore, executor: Executor, vocab_size: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.core = core
        self._executor = executor
        self._vocab_size = vocab_size
        self._clock = clock

    def add_request(self, request: Request) -> None:
        """Puts a request into the queue.

        Raises:
            ValueError: it can never be served; the message names the field and its bound.
            QueueFull: as many requests wait as may.
        """
        _check_token_ids(request, self._vocab_size)
        self.core.add_request(request)

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> bool:
        """Ends a request without an event, its pages being free at once; False if there is none of this id."""
        return self.core.abort(request_id, reason)

    def step(self) -> list[TokenEvent]:
        """What one step of the engine gave; empty when there was nothing to do.

        When the step fails, its requests end with ``FinishReason.ERROR`` and the others go on. An interruption (Ctrl-C)
        ends them too and is raised again.
        """
        plan = self.core.begin(self._clock())
        if plan is None:
            return []
        try:
            result = self._executor.execute(plan)
        except Exception as error:
            logger.exception("step %d failed", plan.step_idx)
            return self.core.fail(plan, f"{type(error).__name__}: {error}", self._clock())
        except BaseException:
            self.core.fail(plan, "interrupted", self._clock())
            raise
        return self.core.end(plan, result, self._clock())


def _check_token_ids(request: Request, vocab_size: int) -> None:
    """Raises ValueError for ids that the model's embedding or logits do not have."""
    sampling = request.sampling
    for name, ids in (
        ("prompt_token_ids", request.prompt_token_ids),
        ("logit_bias", sampling.logit_bias or ()),
        ("stop_token_ids", sampling.stop_token_ids),
    ):
        if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
            bad = min(ids) if min(ids) < 0 else max(ids)
            raise ValueError(f"{name} must be in [0, {vocab_size}), the model's vocabulary, got {bad}")
