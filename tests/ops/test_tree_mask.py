"""The words of a draft tree."""

from __future__ import annotations

import random

import pytest

import mixattn


def ancestors(parents: list[int | None], row: int) -> set[int]:
    parent = parents[row]
    return {row} if parent is None else {row} | ancestors(parents, parent)


@pytest.mark.parametrize("num_rows", [0, 1, 7, 63, 64])
def test_tree_mask_of_random_tree_has_the_bits_of_its_ancestors(num_rows: int) -> None:
    rng = random.Random(num_rows)
    parents = [rng.choice([None, *range(row)]) for row in range(num_rows)]
    words = mixattn.tree_mask(parents).tolist()
    assert len(words) == num_rows
    for row, word in enumerate(words):
        assert {row - d for d in range(64) if word >> d & 1} == ancestors(parents, row)


def test_tree_mask_of_a_line_of_64_rows_ends_in_minus_one() -> None:
    words = mixattn.tree_mask([None, *range(63)])
    assert int(words[0]) == 1 and int(words[62]) == 2**63 - 1 and int(words[63]) == -1


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ([None] * 65, "parents must be at most 64 rows, got 65"),
        ([None, 1], r"parents\[1\] must be None or in \[0, 1\), got 1"),
        ([None, 0, -1], r"parents\[2\] must be None or in \[0, 2\), got -1"),
        ([0], r"parents\[0\] must be None or in \[0, 0\), got 0"),
    ],
)
def test_tree_mask_of_bad_parents_names_the_row(parents: list[int | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixattn.tree_mask(parents)
