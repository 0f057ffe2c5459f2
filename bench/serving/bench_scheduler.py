"""What a step costs the scheduler, executor apart.

Run ``python -m bench.serving.bench_scheduler``. It prints one JSON line per case: microseconds per step for
``schedule``, for ``commit`` (p10, median, p90 over steps), and for both with the engine core's metrics around them. All
requests run at once, as decodes; in the mixed case a prompt is always being read in chunks beside them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

from bench.lib.measure import Record, Timing, append_json, machine, parser, timing_of
from mixattn.config import SchedulerConfig
from mixattn.engine.core import EngineCore
from mixattn.kv.page_pool import PagePool
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


class Load:
    """A scheduler with ``num_decodes`` running decodes, and with a queue of long prompts if ``has_chunks``."""

    def __init__(self, num_decodes: int, has_chunks: bool, num_steps: int) -> None:
        max_len = PROMPT_LEN + num_steps + 64
        pool = PagePool((num_decodes + 4) * (max_len // PAGE_SIZE + 1), PAGE_SIZE)
        config = SchedulerConfig(
            max_num_batched_tokens=num_decodes + CHUNK,
            max_num_seqs=num_decodes + 4,
            max_num_queued_reqs=num_decodes + num_steps,
            max_model_len=max_len,
        )
        self.scheduler = Scheduler(config, pool)
        self.core = EngineCore(self.scheduler)
        for i in range(num_decodes):
            self.add(f"decode-{i}", max_tokens=num_steps + 64)
        while self.core.num_waiting or self.has_chunks():
            self.step()
        for i in range(num_steps if has_chunks else 0):
            self.add(f"prompt-{i}", max_tokens=1)

    def add(self, request_id: str, max_tokens: int) -> None:
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        self.core.add_request(Request(request_id, range(PROMPT_LEN), sampling))

    def has_chunks(self) -> bool:
        """Whether the step that is made here holds more than decodes."""
        return any(part.q_len > 1 for part in self.step().slices)

    def step(self) -> BatchPlan:
        plan = self.core.begin(0.0)
        assert plan is not None
        self.core.end(plan, result_of(plan), 0.0)
        return plan


def run(num_decodes: int, has_chunks: bool, num_steps: int) -> dict[str, Timing]:
    """Timings of the steps; the plans are checked to hold what the case says."""
    load = Load(num_decodes, has_chunks, 2 * num_steps)
    schedule_us, commit_us, core_us = [], [], []
    for _ in range(num_steps):
        start = time.perf_counter()
        plan = load.scheduler.schedule(0.0)
        schedule_us.append((time.perf_counter() - start) * 1e6)
        assert plan is not None and plan.num_decodes == num_decodes
        assert plan.num_tokens == num_decodes + (CHUNK if has_chunks else 0)
        result = result_of(plan)
        start = time.perf_counter()
        load.scheduler.commit(plan, result, 0.0)
        commit_us.append((time.perf_counter() - start) * 1e6)
    load = Load(num_decodes, has_chunks, 2 * num_steps)
    for _ in range(num_steps):
        start = time.perf_counter()
        plan = load.core.begin(0.0)
        begin_us = (time.perf_counter() - start) * 1e6
        assert plan is not None
        result = result_of(plan)
        start = time.perf_counter()
        load.core.end(plan, result, 0.0)
        core_us.append(begin_us + (time.perf_counter() - start) * 1e6)
    return {"schedule": timing_of(schedule_us), "commit": timing_of(commit_us), "core": timing_of(core_us)}


def main() -> None:
    args_parser = parser(__doc__ or "")
    args_parser.add_argument("--steps", type=int, default=200, help="steps per case and repeat")
    args = args_parser.parse_args()
    records = []
    for name, num_decodes, has_chunks in cases():
        repeats = [run(num_decodes, has_chunks, args.steps) for _ in range(args.repeats)]
        for part in ("schedule", "commit", "core"):
            # The repeat with the median of medians: a repeat is disturbed as a whole, by whoever shares the machine.
            timing = sorted((repeat[part] for repeat in repeats), key=lambda t: t.median_us)[len(repeats) // 2]
            records.append(Record(f"{name}-{part}", "scheduler", "int", timing, 0, 0, None))
            print(json.dumps({"case": f"{name}-{part}", "us": vars(timing), **machine()}))
    append_json(args.json, records)


if __name__ == "__main__":
    main()
