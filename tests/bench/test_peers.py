"""bench.peers: the work is fixed, rounds become records, and records become the table."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from bench.compare import read_records
from bench.kernels.attention_cases import cases as kernel_cases
from bench.lib.measure import append_json
from bench.peers import drive, table, workloads
from bench.peers.contenders import contenders


class CountingEngine:
    """Prompts one step each, then a token of every request per step; tokens count up."""

    def __init__(self) -> None:
        self.left: dict[int, int] = {}
        self.waiting: list[int] = []

    def add(self, prompt: list[int], num_output: int) -> int:
        request_id = len(self.left)
        self.left[request_id] = num_output
        self.waiting.append(request_id)
        return request_id

    def step(self) -> dict[int, list[int]]:
        started = {r for r in self.left if r not in self.waiting and self.left[r]}
        if self.waiting:
            started.add(self.waiting.pop(0))
        for request_id in started:
            self.left[request_id] -= 1
        return {request_id: [request_id] for request_id in started}

    def has_work(self) -> bool:
        return any(self.left.values())


def rows(backend: str, us: list[float], **extra: Any) -> list[table.Row]:
    return [
        {"case": "prefill-512", "backend": backend, "dtype": "float32", "us": x, "tokens": 512, **extra} for x in us
    ]


def test_offline_requests_are_the_same_each_time_and_within_bounds() -> None:
    requests = workloads.offline_requests()
    assert requests == workloads.offline_requests()
    lengths = [len(request.prompt) for request in requests]
    assert len(requests) == 64
    assert min(lengths) >= 16 and max(lengths) <= 1500
    assert 180 < statistics.median(lengths) < 360
    assert all(16 <= request.num_output <= 128 for request in requests)


def test_greedy_prompts_span_the_text() -> None:
    text = list(range(200))
    pieces = workloads.greedy_prompts(text)
    assert len(pieces) == workloads.NUM_GREEDY_PROMPTS
    assert pieces[0][0] == 0 and pieces[-1][-1] == 199
    with pytest.raises(ValueError, match="text_ids"):
        workloads.greedy_prompts(text[:39])


def test_stall_times_count_gaps_before_and_across_the_arrival() -> None:
    times = workloads.stall_times(
        [[0.0, 1.0, 2.0, 6.0, 7.0], [0.0, 1.0, 2.0, 5.0, 30.0]], arrival_s=2.5, first_token_s=6.5
    )
    assert times == workloads.StallTimes(ttft_s=4.0, longest_gap_s=25.0, steady_gap_s=1.0)


def test_stall_times_without_a_gap_after_the_arrival_raises() -> None:
    with pytest.raises(ValueError, match="0 meanwhile"):
        workloads.stall_times([[0.0, 1.0]], arrival_s=2.0, first_token_s=3.0)


def test_attention_cases_are_those_of_the_kernel_benchmark() -> None:
    known = {case.name: (tuple(case.q_lens), tuple(case.kv_lens)) for case in kernel_cases()}
    for case in workloads.attention_cases():
        assert known[case.name] == (case.q_lens, case.kv_lens)


@pytest.mark.parametrize("batch", workloads.DECODE_BATCHES)
def test_decode_counts_only_steps_in_which_the_whole_batch_runs(batch: int) -> None:
    assert drive.decode(CountingEngine(), batch)["tokens"] == batch * workloads.DECODE_STEPS[batch]


def test_offline_and_stall_run_an_engine_to_the_end() -> None:
    engine = CountingEngine()
    assert drive.offline(engine)["tokens"] == sum(r.num_output for r in workloads.offline_requests())
    assert not engine.has_work()
    assert [row["case"] for row in drive.stall(engine)] == list(table.TIMES_MS)


def test_greedy_agreement_counts_up_to_the_first_difference() -> None:
    assert table.greedy_agreement([[1, 2, 3], [4, 9, 6]], [[1, 2, 3], [4, 5, 6]]) == (4, 6)


def test_aggregate_takes_medians_that_compare_can_read(tmp_path: Path) -> None:
    records = table.aggregate(rows("a", [3e6, 1e6, 2e6]) + rows("b", [4e6]), [0.5], "a")
    assert [(r.backend, r.timing.median_us, r.extra["tokens_per_s"]) for r in records] == [
        ("a", 2e6, 256.0),
        ("b", 4e6, 128.0),
    ]
    assert json.loads(json.dumps(asdict(records[0])))["extra"]["rounds"] == 3
    append_json(tmp_path / "records.jsonl", records)
    assert {key.backend for key in read_records(tmp_path / "records.jsonl")} == {"a", "b"}


def test_engine_lines_show_rates_quality_and_dashes() -> None:
    quality = [
        {"case": "quality", "backend": name, "dtype": "float32", "us": 0.0, "perplexity": p, "greedy": [tokens]}
        for name, p, tokens in (("a", 20.5, [1, 2]), ("b", None, [1, 3]))
    ]
    records = table.aggregate(rows("a", [1e6]) + quality, [0.5], "a")
    lines = table.engine_lines(records, {"exact": ["a", "b", "absent"]})
    assert lines[2] == "-- exact"
    assert lines[3].split() == ["a", "-", "512", *["-"] * 8, "20.500", "2/2"]
    assert lines[4].split() == ["b", *["-"] * 11, "1/2"]
    assert len(lines) == 5


def test_attention_lines_put_backends_and_roof_side_by_side() -> None:
    found = rows("mixattn", [2e3], roof_us=1e3) + rows("vllm-page16", [3e3])
    lines = table.attention_lines(table.aggregate(found, [0.5], "mixattn"))
    assert lines[1].split() == ["prefill-512", "float32", "2.0", "3.0", "1.0"]


def test_contenders_have_names_of_their_own_and_compiled_only_if_asked() -> None:
    plain, compiled = ([c.name for c in contenders(has)] for has in (False, True))
    assert len(set(compiled)) == len(compiled)
    assert set(compiled) - set(plain) == {"vllm-f32-compiled"}
