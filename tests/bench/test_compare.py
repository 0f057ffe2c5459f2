"""bench.compare: what counts as moved, and what it prints."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from bench.compare import Change, Key, main, read_records
from bench.lib.measure import Record, Timing

KEY = Key("decode", "mixattn", "float32")
REPOSITORY = Path(__file__).resolve().parents[2]


def line(case: str, median_us: float, spread_us: float = 2.0, **fields: Any) -> str:
    timing = Timing(median_us, median_us - spread_us / 2, median_us + spread_us / 2)
    record = asdict(Record(case, "mixattn", "float32", timing, 0, 0, None))
    return json.dumps({**record, "device": "cpu-a", "commit": "abc", **fields})


@pytest.mark.parametrize(
    ("after_us", "before_spread_us", "after_spread_us", "has_moved"),
    [
        (103.5, 1.0, 1.0, True),
        (96.5, 1.0, 1.0, True),
        (102.5, 1.0, 1.0, False),
        (110.0, 12.0, 1.0, False),
        (110.0, 1.0, 12.0, False),
        (110.0, 9.0, 9.0, True),
        (100.0, 0.0, 0.0, False),
    ],
    ids=["slower", "faster", "within-percent", "before-spread", "after-spread", "beyond-both", "equal"],
)
def test_change_is_beyond_noise_only_past_both_spreads_and_the_percentage(
    after_us: float, before_spread_us: float, after_spread_us: float, has_moved: bool
) -> None:
    before, after = (
        Timing(median, median - spread / 2, median + spread / 2)
        for median, spread in ((100.0, before_spread_us), (after_us, after_spread_us))
    )
    assert Change(KEY, before, after).is_beyond_noise(3.0) is has_moved


def test_main_prints_what_moved_and_what_only_one_run_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = tmp_path / "before.jsonl", tmp_path / "after.jsonl"
    before.write_text("\n".join([line("still", 100), line("slow", 100), line("fast", 100), line("gone", 5)]) + "\n")
    after.write_text("\n".join([line("slow", 150), line("still", 101), line("fast", 50), line("new", 5), ""]))
    main([str(before), str(after)])
    assert capsys.readouterr().out.splitlines() == [
        "slow mixattn float32        100.0 us ->        150.0 us  1.50x slower",
        "fast mixattn float32        100.0 us ->         50.0 us  2.00x faster",
        "2 of 3 moved by more than both spreads (p10 to p90) and 3 % of the median",
        "only before: gone mixattn float32",
        "only after: new mixattn float32",
    ]
    main([str(before), str(after), "--percent", "60"])
    assert capsys.readouterr().out.startswith("0 of 3 moved")


def test_main_tells_when_the_devices_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = tmp_path / "before.jsonl", tmp_path / "after.jsonl"
    before.write_text(line("case", 100))
    after.write_text(line("case", 100, device="cpu-b"))
    main([str(before), str(after)])
    assert capsys.readouterr().out.startswith("the devices differ: cpu-a before, cpu-b after\n0 of 1 moved")


def test_records_of_one_key_are_read_last_and_counts_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join([line("decode", 100), line("decode", 200), line("counts", 0)]))
    assert {key: measured.timing.median_us for key, measured in read_records(path).items()} == {KEY: 200}


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"case": "x"}', '{"case": "x", "backend": "y", "dtype": "z", "timing": 3}']
)
def test_line_that_is_no_record_is_an_error_that_names_it(text: str, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(line("decode", 100) + "\n" + text)
    with pytest.raises(ValueError, match=r"records\.jsonl:2 is no record"):
        read_records(path)


def test_records_in_the_repository_compare_with_themselves_as_unmoved(capsys: pytest.CaptureFixture[str]) -> None:
    paths = sorted((REPOSITORY / "bench" / "records").glob("*.jsonl"))
    assert paths
    for path in paths:
        main([str(path), str(path)])
        assert capsys.readouterr().out.startswith("0 of ")
