"""Where a step's time goes: decodes at several batch sizes, and a prefill chunk.

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

import torch

from bench.lib.measure import Record, append_json, parser, timing_of
from mixattn import env
from mixattn.config import EngineConfig
from mixattn.executor.executor import LocalExecutor
from mixattn.models.loader import LoadedModel, load_model
from mixattn.ops.recording import Recording
from mixattn.types import BatchPlan, SamplingParams, Slice

_PAGE_SIZE = 16
_OPERATORS = ("weight_rows", "rms_norm", "linear", "append_kv", "attention", "silu_mul")


def cases() -> dict[str, tuple[int, int, int]]:
    """By name: sequences, rows and keys of each."""
    return {"decode-1": (1, 1, 256), "decode-8": (8, 1, 256), "decode-32": (32, 1, 256), "prefill-512": (1, 512, 512)}


def batch(num_seqs: int, q_len: int, kv_len: int) -> BatchPlan:
    """A step of equal slices, greedy."""
    num_pages = -(-kv_len // _PAGE_SIZE)
    slices = []
    for idx in range(num_seqs):
        pages = array("i", range(idx * num_pages, (idx + 1) * num_pages))
        tokens = [100 + idx] * q_len
        params = SamplingParams(temperature=0)
        slices.append(Slice(f"r{idx}", q_len, kv_len, tokens, pages, True, params, 0, tokens, kv_len))
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


def run(name: str, loaded: LoadedModel, repeats: int) -> Record:
    """The record of one case."""
    num_seqs, q_len, kv_len = cases()[name]
    executor = LocalExecutor(
        loaded.model,
        loaded.config,
        num_pages=num_seqs * -(-kv_len // _PAGE_SIZE),
        page_size=_PAGE_SIZE,
        max_model_len=kv_len,
        kv_dtype=loaded.dtype,
        device=loaded.device,
        is_recorded=True,
    )
    for kv in executor._kv:
        kv.k_cache.normal_()
        kv.v_cache.normal_()
    plan = batch(num_seqs, q_len, kv_len)
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
    args = args_parser.parse_args()
    torch.set_num_threads(env.num_threads())
    loaded = load_model(EngineConfig(args.model, dtype="float32"))
    print(f"{'ms':12} {'step':>8} {'cpu':>8}" + "".join(f"{op:>12}" for op in _OPERATORS))
    records = []
    for name in cases():
        record = run(name, loaded, args.repeats)
        records.append(record)
        parts = "".join(f"{us / 1e3:12.2f}" for us in record.extra["operators_us"].values())
        print(f"{name:12} {record.timing.median_us / 1e3:8.2f} {record.extra['cpu_us'] / 1e3:8.2f}{parts}", flush=True)
    append_json(args.json, records)


if __name__ == "__main__":
    main()
