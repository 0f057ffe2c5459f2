"""The batches that the scheduler makes of a trace's requests, as (q_len, kv_len) of their slices."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator
from pathlib import Path

from mixattn.config import SchedulerConfig
from mixattn.kv.page_pool import PagePool
from mixattn.sched.scheduler import Scheduler
from mixattn.types import Request, SamplingParams, StepResult

PAGE_SIZE = 16
LENGTH_COLUMNS = (
    ("ContextTokens", "GeneratedTokens"),
    ("num_prefill_tokens", "num_decode_tokens"),
    ("input_length", "output_length"),
)
"""Prompt and output, as Azure's, Vidur's and Sarathi's, and Mooncake's traces call them."""


def read_lengths(path: Path) -> Iterator[tuple[int, int]]:
    """(prompt, output) tokens of each request of a .csv or .jsonl file, gzipped or not.

    Raises:
        ValueError: it has none of the columns that hold lengths.
    """
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        is_json = ".jsonl" in path.suffixes
        for record in map(json.loads, file) if is_json else csv.DictReader(file):
            names = next((names for names in LENGTH_COLUMNS if names[0] in record), None)
            if names is None:
                raise ValueError(f"{path} must have columns {LENGTH_COLUMNS}, got {list(record)}")
            prompt, output = (max(1, round(float(record[name]))) for name in names)
            yield prompt, output


def batches(
    path: Path, *, num_steps: int, warmup_steps: int, budget_tokens: int, max_num_seqs: int, max_model_len: int
) -> Iterator[list[tuple[int, int]]]:
    """The slices of each step after the warm-up, with requests always waiting; those that are too long are left out.

    The trace's arrival times are not used.
    """
    config = SchedulerConfig(budget_tokens, max_num_seqs, max_model_len=max_model_len)
    scheduler = Scheduler(config, PagePool(max_num_seqs * (max_model_len // PAGE_SIZE + 1), PAGE_SIZE))
    lengths = ((prompt, output) for prompt, output in read_lengths(path) if prompt + output <= max_model_len)
    num_added = 0
    for step in range(warmup_steps + num_steps):
        while scheduler.stats().num_waiting < max_num_seqs and (pair := next(lengths, None)) is not None:
            prompt, output = pair
            params = SamplingParams(max_tokens=output, ignore_eos=True)
            scheduler.add(Request(str(num_added), [1] * prompt, params))
            num_added += 1
        plan = scheduler.schedule(0.0)
        if plan is None:
            return
        if step >= warmup_steps:
            yield [(part.q_len, part.kv_len) for part in plan.slices]
        scheduler.commit(plan, StepResult({p.request_id: 1 for p in plan.slices if p.is_sampled}), 0.0)
