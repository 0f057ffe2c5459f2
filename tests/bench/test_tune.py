"""The search for tiles without a GPU: its problems and candidates, and its whole path on CPU tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.kernels import tune
from bench.kernels.attention_cases import Case
from bench.kernels.predicted import GPUS
from mixattn.ops.attention import attention
from mixattn.triton_kernels import mixed_attention as triton_attention
from mixattn.triton_kernels import tuned_tiles
from mixattn.triton_kernels.tiles import PLAN_BLOCK_ROWS, SHARED_BYTES, TileChoice, TileProblem, shared_bytes
from mixattn.triton_kernels.tuned_tiles import read_choices
from tests.bench.test_gpu_attention import DEVICE, wall_clock

CENTRE = TileProblem(128, 128, 2, 16)


def tiny_cases(problem: TileProblem) -> list[Case]:
    centre = Case(
        "tiny", 2, 40, 9, 40, 4, 2, problem.head_dim, kv_dtype=tune.CACHE_DTYPES[problem.kv_format],
        v_head_dim=problem.v_head_dim,
    )  # fmt: skip
    return [centre, *centre.parts]


def test_problems_have_every_axis_through_the_centre_and_full_their_product() -> None:
    few, full = tune.problems(False), tune.problems(True)
    assert few[0] == CENTRE and len(few) == 5 + 5 + 1 + 1 + 1
    assert len(set(full)) == len(full) == 6 * 6 * 2 * 2 and set(few) < set(full)
    assert len({tune.name_of(problem) for problem in full}) == len(full)
    assert tune.name_of(TileProblem(64, 64, 2, 8, "int8", True, True)) == "hd64-16bit-int8-terms-one"
    assert tune.name_of(TileProblem(192, 128, 2, 16)) == "hd192-v128-16bit"


@pytest.mark.parametrize("capability", [*SHARED_BYTES, (11, 0)])
def test_candidates_fit_an_sm_and_begin_with_those_of_choose_tiles(capability: tuple[int, int]) -> None:
    limit = SHARED_BYTES.get(capability, min(SHARED_BYTES.values()))
    for problem in tune.problems(True):
        tried = tune.candidates(problem, capability)
        assert tried[0] == problem.choose(capability) and len(tried) > 1
        assert len({tune.short(tiles) for tiles in tried}) == len(tried)
        for tiles in tried:
            taken = shared_bytes(tiles, problem.element_bytes, capability, problem.stored_bits)
            assert tiles.programs_per_sm * (taken + 1024) <= limit + 1024
            threads = 32 * tiles.num_warps * tiles.programs_per_sm
            assert threads * (256 if tiles.max_registers is None else tiles.max_registers) <= 65536
            assert tiles.block_m[0] <= PLAN_BLOCK_ROWS[0] and all(128 % keys == 0 for keys in tiles.block_n)
            assert (len(tiles.block_m) == 1) is problem.has_one_kind


def test_candidates_try_each_axis() -> None:
    tried = tune.candidates(CENTRE, (9, 0))
    assert {tiles.block_m for tiles in tried} == {(128, 16), (64, 16), (32, 16), (128, 64, 16), (128, 32, 16)}
    assert {(tiles.num_warps, tiles.programs_per_sm) for tiles in tried} == {(8, 1), (8, 2), (4, 2), (4, 3)}
    assert {tiles.num_stages[0] for tiles in tune.candidates(CENTRE, (8, 0))} == {1, 2, 3}


def test_without_a_gpu_candidates_are_printed_and_the_status_is_77(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    file, record = tmp_path / "tiles.json", tmp_path / "records.jsonl"
    monkeypatch.setattr("sys.argv", ["tune", "--problems", "hd64-16bit", "--tiles", str(file), "--json", str(record)])
    assert tune.main() == 77
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("No GPU: ") and not file.exists() and not record.exists()
    problem = TileProblem(64, 64, 2, 16)
    expected = [tune.short(tiles) for gpu in GPUS for tiles in tune.candidates(problem, gpu.capability)]
    assert [line.strip() for line in lines[1:] if line.startswith(" ")] == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--launches", "0"], "--launches must be >= 1, got 0"),
        (["--problems", "hd7"], "--problems must be among hd128"),
    ],
    ids=["launches", "problems"],
)
def test_main_refuses_what_cannot_be_run(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["tune", *arguments])
    with pytest.raises(SystemExit):
        tune.main()
    assert message in capsys.readouterr().err


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "tiles.json"
    monkeypatch.setenv("MIXATTN_TILES", str(path))
    tuned_tiles.forget()
    yield path
    tuned_tiles.forget()


INTERPRETER = replace(DEVICE, name=triton_attention.INTERPRETED_NAME)
"""Whose tiles calls on CPU tensors run in."""
PROBLEMS = [
    TileProblem(64, 64, 2, 16),
    TileProblem(64, 64, 2, 8, "int8", has_row_terms=True),
    TileProblem(64, 64, 4, 32, has_one_kind=True),
    TileProblem(192, 128, 2, 16),
]


def few(problem: TileProblem, capability: tuple[int, int]) -> list[TileChoice]:
    return tune.candidates(problem, capability)[:3]


class ClockOf:
    """Says that launches in the tiles ``fast`` take so long and others 10 us, and runs them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fast: TileChoice, fast_us: float) -> None:
        self.fast, self.fast_us = fast, fast_us
        self.launched: list[TileChoice] = []
        run = tune.mixed_attention

        def watched(*arguments: Any, tiles: TileChoice, **options: Any) -> None:
            self.launched.append(tiles)
            run(*arguments, tiles=tiles, **options)

        monkeypatch.setattr(tune, "mixed_attention", watched)

    def __call__(self, run: Callable[[], object]) -> float:
        run()
        return self.fast_us if self.launched[-1] == self.fast else 10.0


def test_whole_search_on_cpu_tensors_writes_the_fastest_which_calls_then_run_in(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    problem = PROBLEMS[0]
    tried = few(problem, (9, 0))
    clock = ClockOf(monkeypatch, tried[2], 5.0)
    record = file.with_suffix(".jsonl")
    assert tune.run_on(INTERPRETER, [problem], 2, clock, file, record, tiny_cases, few) == 0
    (choice,) = read_choices(file)
    assert choice.tiles == tried[2] and choice.problem == problem
    assert choice.measured_us == {name: (5.0, 10.0) for name in ("tiny", "tiny/decodes", "tiny/chunk")}
    assert f"2.00x as fast as {tune.short(tried[0])}, of 3" in capsys.readouterr().out
    records = [json.loads(line) for line in record.read_text().splitlines()]
    assert len(records) == 3 * 3 and {r["backend"] for r in records if r["extra"]["is_best"]} == {tune.short(tried[2])}
    batch = tune.TunedBatch(problem, tiny_cases(problem)[0], INTERPRETER).batch
    launches: list[TileChoice] = []
    monkeypatch.setattr(triton_attention, "mixed_attention", lambda *a, tiles, **k: launches.append(tiles))
    attention(
        batch.q, batch.k_cache, batch.v_cache, cu_seqlens_q=batch.cu_seqlens_q, seq_lens=batch.seq_lens,
        block_table=batch.block_table, backend="triton",
    )  # fmt: skip
    assert launches == [tried[2]]


@pytest.mark.parametrize("problem", PROBLEMS[1:], ids=tune.name_of)
def test_search_verifies_quantised_and_invariant_problems(
    problem: TileProblem, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tune.run_on(INTERPRETER, [problem], 1, wall_clock, file, None, tiny_cases, lambda *a: few(*a)[:2]) == 0
    assert [choice.problem for choice in read_choices(file)] == [problem]


def test_candidate_that_gains_less_than_runs_differ_leaves_those_of_choose_tiles(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = PROBLEMS[0]
    clock = ClockOf(monkeypatch, few(problem, (9, 0))[1], 9.95)
    assert tune.run_on(INTERPRETER, [problem], 1, clock, file, None, lambda p: tiny_cases(p)[1:2], few) == 0
    assert read_choices(file)[0].tiles == problem.choose((9, 0))


def test_candidate_that_is_wrong_or_fails_is_named_and_neither_timed_nor_chosen(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    problem = PROBLEMS[0]
    tried = few(problem, (9, 0))
    run = tune.mixed_attention

    def sometimes(*arguments: Any, tiles: TileChoice, **options: Any) -> None:
        if tiles == tried[1]:
            raise RuntimeError("out of resources\nshared memory")
        run(*arguments, tiles=tiles, **options)
        out: Tensor = arguments[7]
        if tiles == tried[2]:
            out *= 1.2

    monkeypatch.setattr(tune, "mixed_attention", sometimes)
    assert tune.run_on(INTERPRETER, [problem], 1, wall_clock, file, None, lambda p: tiny_cases(p)[1:2], few) == 1
    out = capsys.readouterr().out
    assert f"{tune.short(tried[1])} " in out and "not timed: RuntimeError: out of resources\n" in out
    assert "not timed: differs from the reference by" in out
    (choice,) = read_choices(file)
    assert choice.tiles == tried[0]
    monkeypatch.setattr(tune, "mixed_attention", lambda *a, **k: None)  # the results stay NaN
    file.unlink()
    assert tune.run_on(INTERPRETER, [problem], 1, wall_clock, file, None, lambda p: tiny_cases(p)[1:2], few) == 1
    assert "nothing written" in capsys.readouterr().out and not file.exists()


def test_problem_that_fits_no_sm_is_left_out_aloud(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = replace(INTERPRETER, capability=(8, 6))
    assert tune.run_on(small, [TileProblem(1024, 1024, 4, 32)], 1, wall_clock, file) == 0
    assert "hd1024-32bit             left out: head_dim 1024 and v_head_dim 1024 with 4-byte" in capsys.readouterr().out
    assert not file.exists()


def test_malformed_file_ends_the_search_before_it_begins(file: Path) -> None:
    file.write_text("[]")
    with pytest.raises(ValueError, match="is no file of tiles"):
        tune.run_on(INTERPRETER, PROBLEMS, 1, wall_clock, file)
