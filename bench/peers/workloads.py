"""What every engine is asked to do, and how it is timed. Standard library only: each peer's environment imports it.

A driver is a file in this folder that runs in its peer's environment and calls ``main`` with something that makes an
``Engine``. It prints one JSON line per sample: {"workload": name, "value": number}.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

VOCABULARY = range(1000, 40000)
"""Ids that every tokenizer of the model has as plain text."""
OFFLINE_REQUESTS = 64
STALL_STREAMS, STALL_PROMPT = 8, 1500
UNITS = {
    "first_token": "s",
    "prefill_512": "tok/s",
    "prefill_2048": "tok/s",
    "decode_1": "tok/s",
    "decode_8": "tok/s",
    "decode_32": "tok/s",
    "offline": "output tok/s",
    "stall_ttft": "ms",
    "stall_max_gap": "ms",
    "stall_steady_gap": "ms",
}


class Engine(Protocol):
    """An engine that is stepped by hand. Outputs are greedy, as long as asked, whatever the end of sequence."""

    def submit(self, request_id: str, prompt: Sequence[int], num_tokens: int) -> None: ...

    def step(self) -> list[str]:
        """Does one step; the request of each token that it gave."""
        ...

    def is_busy(self) -> bool: ...


def tokens(count: int, seed: int) -> list[int]:
    """Random ids; another seed shares no prefix with it, so that no cache of prefixes can help."""
    rng = random.Random(seed)
    return [rng.choice(VOCABULARY) for _ in range(count)]


def offline_requests() -> list[tuple[list[int], int]]:
    """Prompts (log-normal, median 256, sigma 0.8, 16 to 1,500 tokens) and lengths of outputs (uniform, 16 to 128)."""
    rng = random.Random(1)
    made = []
    for idx in range(OFFLINE_REQUESTS):
        length = min(1500, max(16, round(math.exp(rng.gauss(math.log(256), 0.8)))))
        made.append((tokens(length, 10_000 + idx), rng.randint(16, 128)))
    return made


class _Run:
    """Requests of one sample, and when each of their tokens came."""

    def __init__(self, engine: Engine, name: str) -> None:
        self._engine = engine
        self._name = name
        self.times: dict[str, list[float]] = {}

    def submit(self, prompt: Sequence[int], num_tokens: int) -> str:
        request_id = f"{self._name}-{len(self.times)}"
        self.times[request_id] = []
        self._engine.submit(request_id, prompt, num_tokens)
        return request_id

    def step(self) -> None:
        given = self._engine.step()
        now = time.perf_counter()
        for request_id in given:
            self.times[request_id].append(now)

    def finish(self) -> None:
        while self._engine.is_busy():
            self.step()


def prefill(engine: Engine, seed: int, num_tokens: int) -> float:
    """Prompt tokens per second of one prompt, up to its first token."""
    run = _Run(engine, f"prefill-{seed}")
    prompt = tokens(num_tokens, seed)
    start = time.perf_counter()
    run.submit(prompt, 1)
    run.finish()
    return num_tokens / (time.perf_counter() - start)


def decode(engine: Engine, seed: int, batch: int) -> float:
    """Tokens per second of ``batch`` streams at some 224 to 300 tokens, while all of them run."""
    num_tokens = 64 + batch // 2  # the last stream still has as many to go when its prompt is done
    run = _Run(engine, f"decode-{seed}")
    for idx in range(batch):
        run.submit(tokens(224, seed * 100 + idx), num_tokens)
    while min(map(len, run.times.values())) < 1:
        run.step()
    given, start = sum(map(len, run.times.values())), time.perf_counter()
    while max(map(len, run.times.values())) < num_tokens:
        run.step()
    elapsed_s = time.perf_counter() - start
    given = sum(map(len, run.times.values())) - given
    run.finish()
    return given / elapsed_s


def offline(engine: Engine, seed: int) -> float:
    """Output tokens per second of all requests, there from the start."""
    run = _Run(engine, f"offline-{seed}")
    requests = offline_requests()
    start = time.perf_counter()
    for prompt, num_tokens in requests:
        run.submit(prompt, num_tokens)
    run.finish()
    return sum(num_tokens for _, num_tokens in requests) / (time.perf_counter() - start)


def stall(engine: Engine, seed: int) -> dict[str, float]:
    """Milliseconds: what a long prompt waits for its first token, the streams' longest gap meanwhile, and the median
    gap before."""
    run = _Run(engine, f"stall-{seed}")
    streams = [run.submit(tokens(200 + 8 * idx, seed * 100 + idx), 160) for idx in range(STALL_STREAMS)]
    while min(len(run.times[stream]) for stream in streams) < 40:
        run.step()
    arrival = time.perf_counter()
    long_id = run.submit(tokens(STALL_PROMPT, seed * 100 + 99), 16)
    run.finish()
    first = run.times[long_id][0]
    steady, during = [], []
    for stream in streams:
        for begin, end in itertools.pairwise(run.times[stream]):
            if end <= arrival:
                steady.append(end - begin)
            elif begin <= first:
                during.append(end - begin)
    steady = sorted(steady)[-30 * STALL_STREAMS :]
    return {
        "stall_ttft": (first - arrival) * 1e3,
        "stall_max_gap": max(during) * 1e3,
        "stall_steady_gap": steady[len(steady) // 2] * 1e3,
    }


def samples(engine: Engine, workloads: Sequence[str], repeats: int) -> Iterator[tuple[str, float]]:
    """(name, value) of each sample; the first of each workload but ``offline`` is not counted."""
    seeds = iter(range(1, 1_000_000))
    for workload in workloads:
        kind, _, size = workload.partition("_")
        for repeat in range(repeats + (kind != "offline")):
            if kind == "stall":
                values = stall(engine, next(seeds))
            elif kind == "offline":
                values = {workload: offline(engine, next(seeds))}
            else:
                values = {workload: {"prefill": prefill, "decode": decode}[kind](engine, next(seeds), int(size))}
            if kind == "offline" or repeat > 0:
                yield from values.items()


def process_age_s() -> float:
    """Seconds since this process was started, imports included; 0.01 s is the kernel's tick."""
    with open("/proc/self/stat") as file:
        ticks = int(file.read().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def main(
    make: Callable[[argparse.Namespace], Engine], add_arguments: Callable[[argparse.ArgumentParser], None]
) -> None:
    """A driver's program."""
    parser = argparse.ArgumentParser()
    parser.add_argument("workloads", help="names with commas, of workloads.py")
    parser.add_argument("--repeats", type=int, default=1)
    add_arguments(parser)
    args = parser.parse_args()
    engine = make(args)
    engine.submit("first", tokens(32, 0), 1)
    given: Counter[str] = Counter()
    while engine.is_busy():
        given.update(engine.step())
    assert given["first"] == 1, given
    print(json.dumps({"workload": "first_token", "value": process_age_s()}), flush=True)
    names = [name for name in args.workloads.split(",") if name]
    for name, value in samples(engine, names, args.repeats):
        print(json.dumps({"workload": name, "value": value}), flush=True)
