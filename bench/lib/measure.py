"""What every benchmark shares: interleaved timing, the machine's description, one JSON line per record."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Timing:
    """Microseconds over the repeats of one candidate."""

    median_us: float
    p10_us: float
    p90_us: float


@dataclass(frozen=True)
class Record:
    """One line of a benchmark's output. ``share_of_roof`` is the roof's time over the measured time."""

    case: str
    backend: str
    dtype: str
    timing: Timing
    bytes: int
    flops: int
    share_of_roof: float | None
    extra: dict[str, Any] = field(default_factory=dict)


def time_interleaved(
    candidates: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int = 2,
    min_sample_s: float = 0.02,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Timing of each candidate, measured in turns, so that a drift of the machine meets all of them alike.

    Args:
        candidates: name to a callable that does the work once.
        repeats: samples of each; a sample runs the callable often enough to last ``min_sample_s``.
        warmup: runs of each before anything is measured.
        clock: seconds; ``time.process_time`` counts what this process's threads worked.
    """
    loops = {}
    for name, run in candidates.items():
        for _ in range(warmup):
            run()
        start = clock()
        run()
        loops[name] = max(1, int(min_sample_s / max(clock() - start, 1e-9)))
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, run in candidates.items():
            start = clock()
            for _ in range(loops[name]):
                run()
            samples[name].append((clock() - start) / loops[name] * 1e6)
    return {name: timing_of(values) for name, values in samples.items()}


def timing_of(samples_us: list[float]) -> Timing:
    """Median, 10th and 90th percentile (nearest rank) of samples in microseconds."""
    ordered = sorted(samples_us)
    last = len(ordered) - 1
    return Timing(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)])


def machine() -> dict[str, str]:
    """What a record must say about where it was made."""
    model = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    ).stdout.strip()
    return {"device": model, "system": platform.release(), "commit": commit, "date": time.strftime("%Y-%m-%d")}


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def parser(description: str) -> argparse.ArgumentParser:
    """The arguments that every benchmark takes."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--repeats", type=int, default=7, help="samples per candidate")
    made.add_argument("--json", type=Path, help="append the records to this file, one JSON line each")
    return made


def append_json(path: Path | None, records: list[Record], where: Mapping[str, str] | None = None) -> None:
    """Append the records, each with the machine's description, to ``path``; nothing when it is None.

    Args:
        where: what to say of the machine otherwise, or besides: of a GPU ``device`` and ``driver``.
    """
    if path is None:
        return
    where = {**machine(), **(where or {})}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for record in records:
            file.write(json.dumps({**asdict(record), **where}) + "\n")
