"""What moved between two runs of a benchmark: ``python -m bench.compare before.jsonl after.jsonl``.

Records are matched by case, backend and dtype; of several in one file the last counts. One has moved if its medians are
further apart than the p10 to p90 spread of either file's samples, and than ``--percent`` of the earlier median: less is
noise as far as these samples can tell. Nothing is judged: the exit status is 0 whatever moved.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bench.lib.measure import Timing

DEFAULT_PERCENT = 3.0
"""Repeats of one build on a quiet machine differ by 1 to 2 percent without any sample showing it."""


class Key(NamedTuple):
    """What makes records of two runs comparable."""

    case: str
    backend: str
    dtype: str


@dataclass(frozen=True)
class Measured:
    """A record's timing, and the device and commit that it names."""

    timing: Timing
    device: str
    commit: str


@dataclass(frozen=True)
class Change:
    """One record of both runs. ``ratio`` is after over before."""

    key: Key
    before: Timing
    after: Timing

    @property
    def ratio(self) -> float:
        return self.after.median_us / self.before.median_us

    def is_beyond_noise(self, percent: float) -> bool:
        """Whether the medians are further apart than both spreads, and than ``percent`` of the earlier one."""
        spreads = (timing.p90_us - timing.p10_us for timing in (self.before, self.after))
        bound = max(*spreads, percent / 100 * self.before.median_us)
        return abs(self.after.median_us - self.before.median_us) > bound


def read_records(path: Path) -> dict[Key, Measured]:
    """The last record of each key in a file of JSON lines; those without a time (counts) are left out.

    Raises:
        ValueError: a line that is no record, naming file and line.
    """
    records = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            fields: dict[str, Any] = json.loads(line)
            key = Key(fields["case"], fields["backend"], fields["dtype"])
            measured = Measured(Timing(**fields["timing"]), fields.get("device", ""), fields.get("commit", ""))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}:{number} is no record of a benchmark: {error!r}") from error
        if measured.timing.median_us > 0:
            records[key] = measured
    return records


def changes(before: Mapping[Key, Measured], after: Mapping[Key, Measured]) -> list[Change]:
    """The records that both runs have, those that became slower most first."""
    both = [Change(key, before[key].timing, after[key].timing) for key in before if key in after]
    return sorted(both, key=lambda change: -change.ratio)


def report(before: Mapping[Key, Measured], after: Mapping[Key, Measured], percent: float) -> list[str]:
    """The lines to print: what moved, how much did not, what only one run has, and whether the devices differ."""
    common = changes(before, after)
    moved = [change for change in common if change.is_beyond_noise(percent)]
    lines = []
    devices = [sorted({measured.device for measured in run.values()}) for run in (before, after)]
    if devices[0] != devices[1]:
        lines.append(f"the devices differ: {', '.join(devices[0])} before, {', '.join(devices[1])} after")
    width = max((len(" ".join(change.key)) for change in moved), default=0)
    for change in moved:
        times = f"{change.before.median_us:12.1f} us -> {change.after.median_us:12.1f} us"
        word = "slower" if change.ratio > 1 else "faster"
        factor = change.ratio if change.ratio > 1 else 1 / change.ratio
        lines.append(f"{' '.join(change.key):{width}} {times}  {factor:.2f}x {word}")
    lines.append(
        f"{len(moved)} of {len(common)} moved by more than both spreads (p10 to p90) and {percent:g} % of the median"
    )
    for word, run, other in (("before", before, after), ("after", after, before)):
        lines += [f"only {word}: {' '.join(key)}" for key in run if key not in other]
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="records of the earlier run, JSON lines")
    parser.add_argument("after", type=Path, help="records of the later run")
    parser.add_argument("--percent", type=float, default=DEFAULT_PERCENT, help="of the median; less is noise")
    options = parser.parse_args(arguments)
    for line in report(read_records(options.before), read_records(options.after), options.percent):
        print(line)


if __name__ == "__main__":
    main()
