"""What a long prompt does to running streams, measured: in chunks beside them, and in steps of its own."""

from __future__ import annotations

import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from mixattn.config import EngineConfig, PolicyName, SchedulerConfig
from mixattn.engine.build import build_engine
from mixattn.engine.wall_driver import WallDriver
from mixattn.models.loader import LoadedModel
from mixattn.types import Request, SamplingParams

_LONG = "long"


@dataclass(frozen=True)
class Scenario:
    """Streams that decode, and a long prompt that arrives.

    Args:
        num_streams: how many decode.
        stream_prompt_len: tokens of their prompts.
        long_prompt_len: tokens of the prompt that arrives.
        steady_steps: steps of all streams that are measured before it arrives.
        seed: of the prompts' tokens.
    """

    num_streams: int = 8
    stream_prompt_len: int = 32
    long_prompt_len: int = 1500
    steady_steps: int = 24
    seed: int = 0


@dataclass(frozen=True)
class Batching:
    """A way to fill steps, and its name in the table."""

    label: str
    policy: PolicyName
    token_budget: int
    max_slowdown: float | None = None


BATCHINGS = (
    Batching("chunked, at most 3x", PolicyName.TIME_BUDGET, 256, max_slowdown=3.0),
    Batching("chunked, budget 64", PolicyName.SARATHI, 64),
    Batching("chunked, budget 256", PolicyName.SARATHI, 256),
    Batching("not chunked", PolicyName.PREFILL_FIRST, 256),
)


@dataclass(frozen=True)
class Observation:
    """What one way of batching did, in seconds.

    Args:
        ttft_s: of the long prompt.
        steady_gaps_s: between tokens of a stream before it arrived.
        arrival_gaps_s: between tokens of a stream, those that ended after the arrival and began before its first token.
    """

    batching: Batching
    ttft_s: float
    steady_gaps_s: list[float]
    arrival_gaps_s: list[float]


def observe(config: EngineConfig, loaded: LoadedModel, scenario: Scenario, batching: Batching) -> Observation:
    """Runs the scenario on the wall clock, in this process, on an engine of its own around ``loaded``."""
    scheduler = SchedulerConfig(
        max_num_batched_tokens=batching.token_budget,
        max_num_seqs=scenario.num_streams + 1,
        policy=batching.policy,
        max_slowdown=batching.max_slowdown,
    )
    driver = build_engine(replace(config, scheduler=scheduler), loaded).driver
    rng = random.Random(scenario.seed)

    def add(request_id: str, prompt_len: int) -> float:
        prompt = [rng.randrange(loaded.config.vocab_size) for _ in range(prompt_len)]
        sampling = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
        now = time.monotonic()
        driver.add_request(Request(request_id, prompt, sampling, now))
        return now

    streams = [f"stream-{idx}" for idx in range(scenario.num_streams)]
    times_s: dict[str, list[float]] = {request_id: [] for request_id in [*streams, _LONG]}
    for request_id in streams:
        add(request_id, scenario.stream_prompt_len)
    # The first tokens after the streams' own prompts still have cold caches: they are left out.
    _run_until(driver, times_s, lambda: all(len(times_s[s]) >= 3 for s in streams))
    num_before = {s: len(times_s[s]) for s in streams}
    _run_until(driver, times_s, lambda: all(len(times_s[s]) >= num_before[s] + scenario.steady_steps for s in streams))
    steady_gaps_s = [gap for s in streams for _, gap in _gaps(times_s[s][num_before[s] - 1 :])]
    arrival_s = add(_LONG, scenario.long_prompt_len)
    _run_until(driver, times_s, lambda: bool(times_s[_LONG]))
    first_token_s = times_s[_LONG][0]
    # A stream that stood still meanwhile gets its token in the next step: that gap counts too.
    _run_until(driver, times_s, lambda: all(times_s[s][-1] > first_token_s for s in streams))
    arrival_gaps_s = [
        gap for s in streams for end_s, gap in _gaps(times_s[s]) if end_s > arrival_s and end_s - gap < first_token_s
    ]
    for request_id in times_s:
        driver.abort(request_id)
    return Observation(batching, first_token_s - arrival_s, steady_gaps_s, arrival_gaps_s)


def run(config: EngineConfig, loaded: LoadedModel, scenario: Scenario, console: Console) -> None:
    """Prints the table of ``observe`` for every batching.

    Raises:
        ValueError: the long prompt does not fit the context.
    """
    context = config.max_model_len or loaded.config.max_model_len
    if scenario.long_prompt_len >= context:
        raise ValueError(f"prompt_len must be < {context}, the context, got {scenario.long_prompt_len}")
    console.print(
        f"While {scenario.num_streams} streams decode, a prompt of {scenario.long_prompt_len:,} tokens arrives. "
        "How long does it wait for its first token (TTFT), and how long do the streams wait for their next ones? "
        "Milliseconds, measured here and now."
    )
    table = Table()
    table.add_column("the prompt is")
    table.add_column("TTFT", justify="right")
    for heading in ("gap before\nmedian", "gap meanwhile\nmedian", "\np99", "\nlongest"):
        table.add_column(heading, justify="right")
    for batching in BATCHINGS:
        with console.status(batching.label):
            seen = observe(config, loaded, scenario, batching)
        table.add_row(
            batching.label,
            _ms(seen.ttft_s),
            _ms(statistics.median(seen.steady_gaps_s)),
            _ms(statistics.median(seen.arrival_gaps_s)),
            _ms(_percentile(seen.arrival_gaps_s, 0.99)),
            _ms(max(seen.arrival_gaps_s)),
        )
    console.print(table)


def _run_until(driver: WallDriver, times_s: dict[str, list[float]], is_done: Callable[[], bool]) -> None:
    """Steps, noting when each request got its tokens."""
    while not is_done():
        for event in driver.step():
            if event.finish_reason is not None:
                raise RuntimeError(f"{event.request_id} ended early: {event.error or 'its context is full'}")
            times_s[event.request_id].append(event.time_s)


def _gaps(times_s: list[float]) -> Iterator[tuple[float, float]]:
    """(end, length) between neighbours."""
    for begin_s, end_s in itertools.pairwise(times_s):
        yield end_s, end_s - begin_s


def _percentile(values: list[float], share: float) -> float:
    """The smallest value that ``share`` of the values do not exceed (nearest rank)."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f}"
