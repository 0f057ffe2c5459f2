"""What a step costs the scheduler, executor apart, and what room to grow saves when the KV pool is tight.

Run ``python -m bench.serving.bench_scheduler``; it prints one JSON line per record. Times are microseconds per step for
``schedule``, for ``commit``, and for both through the engine core with its metrics. All decodes of a case run from the
beginning to the end; in a mixed case prompts are read beside them, 256 rows per step.

``tight-pool`` counts instead of timing: 300 requests with prompts of log-normal length (median 200 tokens) and outputs
of 16 to 400 tokens, in a pool of 8,000, with different ``GROWTH_TOKENS``.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict
from unittest import mock

from bench.lib.measure import Record, Timing, append_json, machine, parser, timing_of
from mixattn.config import SchedulerConfig
from mixattn.engine.core import EngineCore
from mixattn.kv.page_pool import PagePool
from mixattn.sched import policy
from mixattn.sched.scheduler import Scheduler
from mixattn.types import BatchPlan, Request, SamplingParams, StepResult

PAGE_SIZE = 16
PROMPT_LEN = 512
CHUNK = 256


def cases() -> Iterator[tuple[str, int, bool]]:
    """(name, running decodes, whether chunks ride along)."""
    for num_decodes in (16, 64, 256):
        yield f"decode-{num_decodes}", num_decodes, False
        yield f"mixed-{num_decodes}", num_decodes, True


def result_of(plan: BatchPlan) -> StepResult:
    """Some token for every sampled slice."""
    return StepResult({part.request_id: 1 for part in plan.slices if part.is_sampled})


def make_request(request_id: str, prompt_len: int, max_tokens: int) -> Request:
    return Request(request_id, [1] * prompt_len, SamplingParams(max_tokens=max_tokens, ignore_eos=True))


def decoding_core(num_decodes: int, has_chunks: bool, num_steps: int) -> tuple[Scheduler, EngineCore]:
    """A core with ``num_decodes`` decodes that go on for ``num_steps``, and a prompt to read in every step."""
    num_warmup = num_decodes * PROMPT_LEN // CHUNK + 1
    max_len = PROMPT_LEN + num_warmup + num_steps
    num_prompts = num_steps * CHUNK // PROMPT_LEN + 1 if has_chunks else 0
    config = SchedulerConfig(
        max_num_batched_tokens=num_decodes + CHUNK,
        max_num_seqs=num_decodes + 2,
        max_num_queued_reqs=num_decodes + num_prompts,
        max_model_len=max_len + 1,
    )
    scheduler = Scheduler(config, PagePool(2 * (num_decodes + 2) * (max_len // PAGE_SIZE + 1), PAGE_SIZE))
    core = EngineCore(scheduler)
    for i in range(num_decodes):
        core.add_request(make_request(f"decode-{i}", PROMPT_LEN, max_tokens=num_warmup + num_steps))
    is_warm = False
    while not is_warm:
        plan = core.begin(0.0)
        assert plan is not None
        core.end(plan, result_of(plan), 0.0)
        is_warm = plan.num_decodes == num_decodes
    for i in range(num_prompts):
        core.add_request(make_request(f"prompt-{i}", PROMPT_LEN, max_tokens=1))
    return scheduler, core


def time_steps(num_decodes: int, has_chunks: bool, num_steps: int) -> dict[str, Timing]:
    """Timings of the steps; each plan is checked to hold what the case says."""
    samples_us: dict[str, list[float]] = {"schedule": [], "commit": [], "core": []}
    scheduler, _ = decoding_core(num_decodes, has_chunks, num_steps)
    for _ in range(num_steps):
        start = time.perf_counter()
        plan = scheduler.schedule(0.0)
        samples_us["schedule"].append((time.perf_counter() - start) * 1e6)
        assert plan is not None and plan.num_decodes == num_decodes
        assert plan.num_tokens == num_decodes + (CHUNK if has_chunks else 0)
        result = result_of(plan)
        start = time.perf_counter()
        scheduler.commit(plan, result, 0.0)
        samples_us["commit"].append((time.perf_counter() - start) * 1e6)
    _, core = decoding_core(num_decodes, has_chunks, num_steps)
    for _ in range(num_steps):
        start = time.perf_counter()
        plan = core.begin(0.0)
        begin_s = time.perf_counter() - start
        assert plan is not None
        result = result_of(plan)
        start = time.perf_counter()
        core.end(plan, result, 0.0)
        samples_us["core"].append((begin_s + time.perf_counter() - start) * 1e6)
    return {name: timing_of(values) for name, values in samples_us.items()}


def count_tight_pool(growth_tokens: int) -> dict[str, int]:
    """Steps and rows that the requests take, and how many rows were thrown away."""
    rng = random.Random(0)
    scheduler = Scheduler(SchedulerConfig(max_model_len=4096), PagePool(8000 // PAGE_SIZE, PAGE_SIZE))
    for i in range(300):
        prompt_len = min(2000, max(4, round(200 * rng.lognormvariate(0, 0.8))))
        scheduler.add(make_request(str(i), prompt_len, rng.randint(16, 400)))
    num_steps = num_rows = 0
    with mock.patch.object(policy, "GROWTH_TOKENS", growth_tokens):
        while (plan := scheduler.schedule(0.0)) is not None:
            num_steps += 1
            num_rows += plan.num_tokens
            scheduler.commit(plan, result_of(plan), 0.0)
    stats = scheduler.stats()
    return {
        "num_steps": num_steps,
        "num_rows": num_rows,
        "num_preemptions": stats.num_preemptions,
        "num_recomputed_tokens": stats.num_recomputed_tokens,
    }


def main() -> None:
    args_parser = parser(__doc__ or "")
    args_parser.add_argument("--steps", type=int, default=200, help="steps per case and repeat")
    args = args_parser.parse_args()
    records = []
    for name, num_decodes, has_chunks in cases():
        repeats = [time_steps(num_decodes, has_chunks, args.steps) for _ in range(args.repeats)]
        for part in repeats[0]:
            # The repeat with the median of medians: who shares the machine disturbs a repeat as a whole.
            timing = sorted((repeat[part] for repeat in repeats), key=lambda t: t.median_us)[len(repeats) // 2]
            records.append(Record(f"{name}-{part}", "scheduler", "int", timing, 0, 0, None))
    for growth_tokens in (0, 8, 16, 32):
        counts = count_tight_pool(growth_tokens)
        records.append(
            Record(f"tight-pool-growth-{growth_tokens}", "scheduler", "int", Timing(0, 0, 0), 0, 0, None, counts)
        )
    where = machine()
    for record in records:
        print(json.dumps({**asdict(record), **where}))
    append_json(args.json, records)


if __name__ == "__main__":
    main()
