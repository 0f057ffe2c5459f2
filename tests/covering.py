"""Few combinations of many options that yet have every pair of values of any two options."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

NUM_CANDIDATES = 40
"""Of random combinations, from which each row is picked: more make the list shorter and take longer."""

Pair = tuple[int, int, int, int]
"""(axis, value, other axis, its value), by index."""


def pairs_of(row: Sequence[int]) -> set[Pair]:
    """The pairs that a combination, one index per axis, has."""
    return {(i, row[i], j, row[j]) for i, j in itertools.combinations(range(len(row)), 2)}


def covering_rows(axes: Mapping[str, Sequence[Any]], num_rows: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """At least ``num_rows`` different combinations, those that cover all pairs first; the same for the same seed.

    Greedy: of some random combinations, each of which holds an uncovered pair, the one with the most uncovered pairs.
    Source: the AETG system, Cohen et al. 1997 (doi 10.1109/32.605761).
    """
    generator = random.Random(seed)
    sizes = [len(values) for values in axes.values()]
    uncovered = {
        (i, a, j, b)
        for i, j in itertools.combinations(range(len(sizes)), 2)
        for a in range(sizes[i])
        for b in range(sizes[j])
    }
    rows: dict[tuple[int, ...], None] = {}
    while uncovered or len(rows) < num_rows:
        open_pairs = sorted(uncovered)
        best: tuple[int, tuple[int, ...]] | None = None
        for _ in range(NUM_CANDIDATES if uncovered else 1):
            candidate = [generator.randrange(size) for size in sizes]
            if open_pairs:
                i, a, j, b = generator.choice(open_pairs)
                candidate[i], candidate[j] = a, b
            gain = len(pairs_of(candidate) & uncovered)
            if best is None or gain > best[0]:
                best = gain, tuple(candidate)
        assert best is not None
        rows[best[1]] = None
        uncovered -= pairs_of(best[1])
    return [{name: values[i] for (name, values), i in zip(axes.items(), row, strict=True)} for row in rows]
