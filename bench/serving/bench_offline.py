"""Offline throughput of the engine, and what a long prompt does to running streams.

Run ``python -m bench.serving.bench_offline smollm2``. Prompts are random token ids of log-normal length, outputs have
uniform lengths and ignore the end of sequence: the work does not depend on what the model says. Throughput is the
median over ``--repeats`` runs of the same workload; the stall table takes, run by run, the ways of batching in turns.
"""

from __future__ import annotations

import statistics
import time

import numpy as np

from bench.lib.measure import Record, append_json, parser, timing_of
from mixattn import LLM, SamplingParams
from mixattn.config import EngineConfig
from mixattn.engine.demo import BATCHINGS, Observation, Scenario, observe
from mixattn.models.loader import LoadedModel, load_model


def workload(num_requests: int, vocab_size: int, seed: int) -> tuple[list[dict[str, list[int]]], list[SamplingParams]]:
    """Prompts (log-normal, median 256 tokens, at most 1,024) and how long each output is (16 to 128 tokens)."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(np.log(256), 0.8, num_requests), 8, 1024).astype(int)
    prompts = [{"prompt_token_ids": rng.integers(100, vocab_size - 100, n).tolist()} for n in lengths]
    params = [
        SamplingParams(temperature=0, max_tokens=int(n), ignore_eos=True) for n in rng.integers(16, 129, num_requests)
    ]
    return prompts, params


def bench_offline(config: EngineConfig, loaded: LoadedModel, num_requests: int, repeats: int) -> Record:
    """Prints and returns the throughput of one batch of requests, all there from the start."""
    prompts, params = workload(num_requests, loaded.config.vocab_size, seed=0)
    num_input = sum(len(p["prompt_token_ids"]) for p in prompts)
    num_output = sum(p.max_tokens or 0 for p in params)
    samples_us = []
    with LLM.from_config(config, loaded) as llm:
        llm.generate(prompts[:2], params[:2], use_tqdm=False)
        for _ in range(repeats):
            start = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            samples_us.append((time.perf_counter() - start) * 1e6)
    wall_s = statistics.median(samples_us) / 1e6
    print(
        f"Throughput: {num_requests / wall_s:.2f} requests/s, {(num_input + num_output) / wall_s:.1f} total tokens/s, "
        f"{num_output / wall_s:.1f} output tokens/s"
    )
    extra = {"num_input_tokens": num_input, "num_output_tokens": num_output, "output_tokens_per_s": num_output / wall_s}
    name = f"offline-{num_requests}-lognormal-256"
    return Record(name, "mixattn", str(loaded.dtype), timing_of(samples_us), 0, 0, None, extra)


def bench_stall(config: EngineConfig, loaded: LoadedModel, repeats: int) -> list[Record]:
    """Prints and returns the gaps between the streams' tokens for each way of batching, all runs taken together."""
    seen: dict[str, list[Observation]] = {batching.label: [] for batching in BATCHINGS}
    for _ in range(repeats):
        for batching in BATCHINGS:
            seen[batching.label].append(observe(config, loaded, Scenario(), batching))
    print(f"{'8 streams, a 1,500-token prompt arrives':42} {'TTFT ms':>8} {'steady gap ms':>14} {'longest gap ms':>15}")
    records = []
    for label, runs in seen.items():
        ttft_ms = statistics.median(run.ttft_s for run in runs) * 1e3
        steady_ms = statistics.median(gap for run in runs for gap in run.steady_gaps_s) * 1e3
        longest_ms = statistics.median(max(run.arrival_gaps_s) for run in runs) * 1e3
        print(f"{label:42} {ttft_ms:8.0f} {steady_ms:14.1f} {longest_ms:15.0f}")
        timing = timing_of([gap * 1e6 for run in runs for gap in run.arrival_gaps_s])
        extra = {"ttft_ms": ttft_ms, "steady_gap_ms": steady_ms, "longest_gap_ms": longest_ms}
        records.append(
            Record(f"stall-8-streams-1500: {label}", "mixattn", str(loaded.dtype), timing, 0, 0, None, extra)
        )
    return records


def main() -> None:
    args_parser = parser(__doc__ or "")
    args_parser.set_defaults(repeats=3)
    args_parser.add_argument("model", nargs="?", default="smollm2")
    args_parser.add_argument("--num-requests", type=int, default=32)
    args = args_parser.parse_args()
    config = EngineConfig(args.model)
    loaded = load_model(config)
    records = [
        bench_offline(config, loaded, args.num_requests, args.repeats),
        *bench_stall(config, loaded, args.repeats),
    ]
    append_json(args.json, records)


if __name__ == "__main__":
    main()
