"""Records from the rounds' rows, and the table from the records."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from bench.lib.measure import Record, timing_of
from bench.peers.workloads import DECODE_BATCHES, PREFILL_TOKENS

RATES = (
    *(f"prefill-{n}" for n in PREFILL_TOKENS),
    *(f"decode-{n}" for n in DECODE_BATCHES),
    "offline-64",
)
"""Cases that are shown as tokens per second."""
TIMES_MS = ("stall-ttft", "stall-longest-gap", "stall-steady-gap")
Row = dict[str, Any]


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many leading elements are equal."""
    for idx, (a, b) in enumerate(zip(left, right)):  # noqa: B905 - up to the shorter's end
        if a != b:
            return idx
    return min(len(left), len(right))


def greedy_agreement(found: list[list[int]], reference: list[list[int]]) -> tuple[int, int]:
    """Tokens that are the reference's up to the first that is not, over all continuations; and of how many."""
    pairs = list(zip(found, reference, strict=True))
    return sum(common_prefix(a, b) for a, b in pairs), sum(len(b) for _, b in pairs)


def aggregate(rows: list[Row], load: list[float], reference: str) -> list[Record]:
    """One record per case, backend and dtype: the timing over the rounds, quality compared with ``reference``.

    Args:
        rows: as the drivers print them, with ``backend`` and ``dtype``.
        load: the machine's load averages at the starts of the rounds.
        reference: the backend whose greedy tokens the others' are compared with.
    """
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["backend"], row["case"], row["dtype"]].append(row)
    greedy = next(
        (group[-1]["greedy"] for (name, case, _), group in groups.items() if (name, case) == (reference, "quality")),
        None,
    )
    records = []
    for (backend, case, dtype), group in groups.items():
        last = {k: v for k, v in group[-1].items() if k not in ("backend", "case", "dtype", "us", "greedy")}
        extra = {**last, "rounds": len(group), "load": load}
        timing = timing_of([row["us"] for row in group])
        if case in RATES:
            extra["tokens_per_s"] = last["tokens"] / timing.median_us * 1e6
        if case == "quality" and greedy is not None:
            extra["greedy_equal"], extra["greedy_tokens"] = greedy_agreement(group[-1]["greedy"], greedy)
        records.append(Record(case, backend, dtype, timing, 0, 0, None, extra))
    return records


def _engine_cells(records: dict[str, Record]) -> list[str]:
    """A line of the engines' table; a dash where there is no record."""

    def cell(case: str, form: str, scale: float) -> str:
        return f"{records[case].timing.median_us * scale:{form}}" if case in records else "-"

    cells = [cell("start", ".1f", 1e-6)]
    cells += [f"{records[case].extra['tokens_per_s']:.0f}" if case in records else "-" for case in RATES]
    cells += [cell(case, ".0f", 1e-3) for case in TIMES_MS]
    quality = records["quality"].extra if "quality" in records else {}
    perplexity = quality.get("perplexity")
    cells.append("-" if perplexity is None else f"{perplexity:.3f}")
    cells.append(f"{quality['greedy_equal']}/{quality['greedy_tokens']}" if "greedy_equal" in quality else "-")
    return cells


def engine_lines(records: list[Record], classes: dict[str, list[str]]) -> list[str]:
    """The engines, in classes of equal exactness: class name to backends."""
    by_name: dict[str, dict[str, Record]] = defaultdict(dict)
    for record in records:
        by_name[record.backend][record.case] = record
    heads = ["start s", *RATES, "TTFT", "longest", "steady", "perplexity", "greedy"]
    widths = [max(9, len(head)) + 1 for head in heads]
    lines = [
        "tokens/s; stall (8 streams, a 1,500-token prompt arrives, budget at most 256): TTFT and gaps in ms",
        f"{'':20}" + "".join(f"{head:>{width}}" for head, width in zip(heads, widths, strict=True)),
    ]
    for title, names in classes.items():
        lines.append(f"-- {title}")
        for name in names:
            if name in by_name:
                cells = _engine_cells(by_name[name])
                lines.append(f"{name:20}" + "".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True)))
    return lines


def attention_lines(records: list[Record]) -> list[str]:
    """The attention operator in ms, by case and dtype; the roof is the time at this machine's measured rates."""
    groups: dict[tuple[str, str], dict[str, Record]] = defaultdict(dict)
    for record in records:
        groups[record.case, record.dtype][record.backend] = record
    backends = list(dict.fromkeys(record.backend for record in records))
    lines = [f"{'attention, ms':40}{'dtype':10}" + "".join(f"{b:>14}" for b in backends) + f"{'roof':>10}"]
    for (case, dtype), found in groups.items():
        cells = [f"{found[b].timing.median_us / 1e3:.1f}" if b in found else "-" for b in backends]
        roofs = [r.extra["roof_us"] for r in found.values() if "roof_us" in r.extra]
        roof = f"{statistics.median(roofs) / 1e3:.1f}" if roofs else "-"
        lines.append(f"{case:40}{dtype:10}" + "".join(f"{c:>14}" for c in cells) + f"{roof:>10}")
    return lines
