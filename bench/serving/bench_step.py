"""Where a step's time goes: decodes at several batch sizes, a prefill chunk, and decodes with small chunks beside them.

Run ``python -m bench.serving.bench_step smollm2``.
A step is executed as the engine does it, over pages that hold
random K and V. ``step`` is the median of whole steps, wall time, and ``cpu`` the CPU time of all threads, which a busy
machine disturbs less. The operators are timed in further steps, call by call; what is missing to ``step`` is sampling,
planning and inputs.
"""

from __future__ import annotations

import statistics
import time
from array import array
from dataclasses import dataclass

import torch

from bench.lib.measure import Record, append_json, parser, timing_of
from mixattn import env
from mixattn.config import ACTIVATION_DTYPES, EngineConfig
from mixattn.executor import kv_pool
from mixattn.executor.executor import LocalExecutor
from mixattn.models.loader import LoadedModel, load_model
from mixattn.ops.recording import Recording
from mixattn.types import BatchPlan, SamplingParams, Slice

_PAGE_SIZE = 16
_OPERATORS = ("weight_rows", "rms_norm", "linear", "gated_linear", "append_kv", "attention")


@dataclass(frozen=True)
class Part:
    """``count`` slices of ``q_len`` rows that end at key ``kv_len``; a prompt that goes on gives no token."""

    count: int
    q_len: int
    kv_len: int
    is_sampled: bool = True


def cases() -> dict[str, list[Part]]:
    """Decodes alone, a whole prompt, and decodes with chunks beside them."""
    decodes = {f"decode-{count}": [Part(count, 1, 256)] for count in (1, 8, 32)}
    mixed = {
        f"mixed-8+{rows}-at-{kv_len}": [Part(8, 1, 256), Part(1, rows, kv_len, is_sampled=False)]
        for rows in (8, 16, 32)
        for kv_len in (64, 1024)
    }
    return {**decodes, "prefill-512": [Part(1, 512, 512)], **mixed}


def batch(parts: list[Part]) -> BatchPlan:
    """A greedy step of these slices."""
    slices: list[Slice] = []
    num_pages = 0
    for part in parts:
        for _ in range(part.count):
            pages = array("i", range(num_pages, num_pages + -(-part.kv_len // _PAGE_SIZE)))
            num_pages += len(pages)
            tokens = [100 + len(slices)] * part.q_len
            name, params = f"r{len(slices)}", SamplingParams(temperature=0)
            slices.append(
                Slice(name, part.q_len, part.kv_len, tokens, pages, part.is_sampled, params, 0, tokens, part.kv_len)
            )
    return BatchPlan(0, tuple(slices))


def operators_us(executor: LocalExecutor, plan: BatchPlan) -> dict[str, float]:
    """Microseconds of each operator in one more step."""
    found: dict[str, float] = {}

    def profile(recording: Recording, *size: int) -> None:  # of the forward pass, and of logits
        for name, us in recording.profile(*size).items():
            found[name] = found.get(name, 0.0) + us

    run = Recording.run
    Recording.run = profile  # type: ignore[method-assign]
    try:
        executor.execute(plan)
    finally:
        Recording.run = run  # type: ignore[method-assign]
    return found


def run(name: str, loaded: LoadedModel, kv_dtype: torch.dtype, repeats: int) -> Record:
    """The record of one case."""
    plan = batch(cases()[name])
    executor = LocalExecutor(
        loaded.model,
        loaded.config,
        num_pages=sum(len(part.page_ids) for part in plan.slices),
        page_size=_PAGE_SIZE,
        max_model_len=max(part.kv_len for part in plan.slices),
        kv_dtype=kv_dtype,
        device=loaded.device,
        is_recorded=True,
    )
    for kv in executor._kv:
        for cache in (kv.k_cache, kv.v_cache):
            cache.copy_(torch.randn(cache.shape).mul_(16 if cache.dtype == torch.int8 else 1))
        for scale in (kv.k_scale, kv.v_scale):
            if scale is not None:
                scale.fill_(1 / 16)
    executor.execute(plan)  # records the forward pass
    wall_us, cpu_us = [], []
    for _ in range(repeats):
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        executor.execute(plan)
        wall_us.append((time.perf_counter() - start_s) * 1e6)
        cpu_us.append((time.process_time() - start_cpu_s) * 1e6)
    profiles = [operators_us(executor, plan) for _ in range(repeats)]
    parts = {op: statistics.median(profile.get(op, 0.0) for profile in profiles) for op in _OPERATORS}
    extra = {"cpu_us": statistics.median(cpu_us), "operators_us": parts, "threads": env.num_threads()}
    return Record(name, "mixattn", str(loaded.dtype), timing_of(wall_us), 0, 0, None, extra)


def main() -> None:
    args_parser = parser(__doc__ or "")
    args_parser.set_defaults(repeats=9)
    args_parser.add_argument("model", nargs="?", default="smollm2")
    args_parser.add_argument("--activation-dtype", choices=ACTIVATION_DTYPES, default="float32")
    args_parser.add_argument("--kv-cache-dtype", choices=("auto", "bfloat16", "float16", "int8"), default="auto")
    args = args_parser.parse_args()
    torch.set_num_threads(env.num_threads())
    loaded = load_model(EngineConfig(args.model, dtype="float32", activation_dtype=args.activation_dtype))
    dtype = kv_pool.kv_dtype(args.kv_cache_dtype, loaded.dtype)
    print(f"{'ms':18} {'step':>8} {'cpu':>8}" + "".join(f"{op:>13}" for op in _OPERATORS))
    records = []
    for name in cases():
        record = run(name, loaded, dtype, args.repeats)
        records.append(record)
        parts = "".join(f"{us / 1e3:13.2f}" for us in record.extra["operators_us"].values())
        print(f"{name:18} {record.timing.median_us / 1e3:8.2f} {record.extra['cpu_us'] / 1e3:8.2f}{parts}", flush=True)
    append_json(args.json, records)


if __name__ == "__main__":
    main()
