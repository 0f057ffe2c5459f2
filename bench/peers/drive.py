"""Rows of the table from an engine that is stepped in process. The standard library alone, as ``workloads``.

A driver makes an ``Engine`` and calls ``main``. Each row is one JSON line on stdout that starts with ``MARK``; whatever
else a peer prints does not.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from bench.peers import workloads

MARK = "@row "
ROWS = ("prefill", "decode", "offline", "stall", "quality")
CaseTimer = Callable[["Engine"], Iterable[dict[str, Any]]]


class Engine(Protocol):
    """What every engine can do. Outputs are greedy and ignore the end of sequence."""

    def add(self, prompt: list[int], num_output: int) -> int:
        """Queues a request and returns its id."""
        ...

    def step(self) -> dict[int, list[int]]:
        """Runs one step; the new tokens by request."""
        ...

    def has_work(self) -> bool:
        """Whether a request is unfinished."""
        ...


@dataclass(frozen=True)
class Peer:
    """An engine's way to be measured.

    Args:
        engine: makes the engine for a kind of row (one of ``ROWS``, or ``decode-32`` with the batch); may return the
            same one each time.
        text_log_likelihood: the sum of log probabilities of a text's tokens but the first, or None if the peer does not
            give it.
        about: versions and settings, kept in the records.
    """

    engine: Callable[[str], Engine]
    text_log_likelihood: Callable[[list[int]], float] | None
    about: dict[str, Any]


class Outputs:
    """Steps an engine and collects tokens and their times by request."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tokens: dict[int, list[int]] = {}
        self.times_s: dict[int, list[float]] = {}

    def add(self, prompt: list[int], num_output: int) -> int:
        request_id = self.engine.add(prompt, num_output)
        self.tokens[request_id], self.times_s[request_id] = [], []
        return request_id

    def step(self) -> float:
        """Returns the time at the end of the step."""
        new = self.engine.step()
        now_s = time.perf_counter()
        for request_id, tokens in new.items():
            self.tokens[request_id] += tokens
            self.times_s[request_id] += [now_s] * len(tokens)
        return now_s

    def finish(self) -> None:
        while self.engine.has_work():
            self.step()


def row(case: str, seconds: float, **extra: Any) -> dict[str, Any]:
    return {"case": case, "us": seconds * 1e6, **extra}


def prefill(engine: Engine, num_tokens: int, seed: int) -> dict[str, Any]:
    """Time until the first token after a prompt."""
    outputs = Outputs(engine)
    start_s = time.perf_counter()
    outputs.add(workloads.prompt(num_tokens, seed), 1)
    outputs.finish()
    return row(f"prefill-{num_tokens}", time.perf_counter() - start_s, tokens=num_tokens)


def decode(engine: Engine, batch: int) -> dict[str, Any]:
    """Time of steps in which all of the batch decode and nothing else runs."""
    outputs = Outputs(engine)
    steps = workloads.DECODE_STEPS[batch]
    # The first to start may be far ahead when the last prompt has been read.
    ids = [
        outputs.add(workloads.prompt(workloads.DECODE_PROMPT_TOKENS, seed), steps + 4 + batch) for seed in range(batch)
    ]
    while not all(outputs.tokens[i] for i in ids):
        outputs.step()
    start_s, before = outputs.step(), sum(len(outputs.tokens[i]) for i in ids)
    for _ in range(steps):
        end_s = outputs.step()
    num_tokens = sum(len(outputs.tokens[i]) for i in ids) - before
    if num_tokens != steps * batch:
        raise RuntimeError(f"{steps} steps of {batch} decodes gave {num_tokens} tokens")
    outputs.finish()
    return row(f"decode-{batch}", end_s - start_s, tokens=num_tokens)


def offline(engine: Engine) -> dict[str, Any]:
    """Time of all requests, all there from the start."""
    outputs = Outputs(engine)
    requests = workloads.offline_requests()
    start_s = time.perf_counter()
    for request in requests:
        outputs.add(request.prompt, request.num_output)
    outputs.finish()
    wall_s = time.perf_counter() - start_s
    num_output = sum(map(len, outputs.tokens.values()))
    if num_output != sum(request.num_output for request in requests):
        raise RuntimeError(f"{num_output} tokens came out, not what was asked for")
    return row("offline-64", wall_s, tokens=num_output, prompt_tokens=sum(len(r.prompt) for r in requests))


def stall(engine: Engine) -> list[dict[str, Any]]:
    """TTFT of a long prompt that meets running streams, and the streams' gaps."""
    scenario = workloads.Stall()
    outputs = Outputs(engine)
    streams = [
        outputs.add(workloads.prompt(scenario.stream_prompt_tokens, seed), scenario.max_tokens)
        for seed in range(scenario.num_streams)
    ]
    # Two tokens of each with cold caches are left out.
    while not all(len(outputs.tokens[i]) >= 2 for i in streams):
        outputs.step()
    begin = {i: len(outputs.times_s[i]) - 1 for i in streams}
    for _ in range(scenario.steady_tokens):
        outputs.step()
    arrival_s = time.perf_counter()
    long_id = outputs.add(workloads.prompt(scenario.long_prompt_tokens, 99), 2)
    outputs.finish()
    if any(outputs.times_s[i][-1] < outputs.times_s[long_id][0] for i in streams):
        raise RuntimeError("a stream ended before the long prompt's first token")
    stream_times = [outputs.times_s[i][begin[i] :] for i in streams]
    times = workloads.stall_times(stream_times, arrival_s, outputs.times_s[long_id][0])
    return [
        row("stall-ttft", times.ttft_s),
        row("stall-longest-gap", times.longest_gap_s),
        row("stall-steady-gap", times.steady_gap_s),
    ]


def greedy(engine: Engine, text_ids: list[int]) -> list[list[int]]:
    """The greedy continuations of pieces of the text, one request at a time."""
    continuations = []
    for piece in workloads.greedy_prompts(text_ids):
        outputs = Outputs(engine)
        request_id = outputs.add(piece, workloads.GREEDY_TOKENS)
        outputs.finish()
        continuations.append(outputs.tokens[request_id])
    return continuations


def quality(peer: Peer, text_ids: list[int]) -> dict[str, Any]:
    """Perplexity of the text, where the peer gives probabilities of a prompt's tokens, and greedy continuations."""
    found: dict[str, Any] = {"greedy": greedy(peer.engine("quality"), text_ids), "perplexity": None}
    if peer.text_log_likelihood is not None:
        found["perplexity"] = math.exp(-peer.text_log_likelihood(text_ids) / (len(text_ids) - 1))
    return row("quality", 0.0, **found)


def measure(peer: Peer, rows: list[str], text_ids: list[int]) -> Iterable[dict[str, Any]]:
    """Everything that is asked for, row by row."""
    if "prefill" in rows:
        engine = peer.engine("prefill")
        prefill(engine, workloads.PREFILL_TOKENS[0], seed=1)
        for num_tokens in workloads.PREFILL_TOKENS:
            yield prefill(engine, num_tokens, seed=num_tokens)
    if "decode" in rows:
        for batch in workloads.DECODE_BATCHES:
            yield decode(peer.engine(f"decode-{batch}"), batch)
    if "offline" in rows:
        yield offline(peer.engine("offline"))
    if "stall" in rows:
        engine = peer.engine("stall")
        prefill(engine, workloads.PREFILL_TOKENS[0], seed=1)
        yield from stall(engine)
    if "quality" in rows:
        yield quality(peer, text_ids)


def emit(fields: dict[str, Any]) -> None:
    print("\n" + MARK + json.dumps(fields), flush=True)


def main(make_peer: Callable[[argparse.Namespace], Peer], start_s: float, arguments: argparse.ArgumentParser) -> None:
    """Prints ``start`` (process start of the driver's imports to a first token) and the rows that are asked for."""
    arguments.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    arguments.add_argument("--text", help="JSON file with the token ids of the text of the quality row")
    args = arguments.parse_args()
    peer = make_peer(args)
    outputs = Outputs(peer.engine("start"))
    outputs.add(workloads.prompt(32, 0), 1)
    outputs.finish()
    emit(row("start", time.time() - start_s, about=peer.about))
    text_ids: list[int] = []
    if "quality" in args.rows:
        if args.text is None:
            sys.exit("the quality row needs --text")
        with open(args.text) as file:
            text_ids = json.load(file)
    for fields in measure(peer, args.rows, text_ids):
        emit(fields)
