"""The policies as what they are: functions from counts to counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from mixattn.config import PolicyName
from mixattn.sched.policy import GROWTH_TOKENS, POLICIES, StepShape, StepView, prefill_first, sarathi


def view(
    *,
    budget: int = 32,
    decodes: int = 0,
    partial: Sequence[int] = (),
    waiting: Sequence[int] = (),
    growing: int = 0,
    admissible: int = 8,
    free_pages: int = 1000,
) -> StepView:
    return StepView(budget, 16, decodes, partial, waiting, growing, admissible, free_pages)


def test_every_policy_name_has_a_policy() -> None:
    assert set(POLICIES) == set(PolicyName)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=lambda p: p.__name__)
def test_policy_without_requests_takes_nothing(policy: object) -> None:
    shape = policy(view())  # type: ignore[operator]
    assert (shape.partial_chunks, shape.admitted_chunks) == ([], [])


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ({"decodes": 5}, ([], [])),
        ({"waiting": [100]}, ([], [32])),
        ({"decodes": 5, "waiting": [100]}, ([], [27])),
        ({"decodes": 5, "partial": [10], "waiting": [100]}, ([10], [17])),
        ({"decodes": 5, "partial": [100, 50], "waiting": [1]}, ([27], [])),
        ({"partial": [20, 50], "waiting": [1]}, ([20, 12], [])),
        ({"waiting": [10, 10, 100, 5]}, ([], [10, 10, 12])),
        ({"waiting": [1, 1, 1], "admissible": 2}, ([], [1, 1])),
        ({"decodes": 32, "partial": [4], "waiting": [4]}, ([], [])),
    ],
)
def test_sarathi_gives_prompts_what_decodes_leave(case: dict[str, object], expected: object) -> None:
    shape = sarathi(view(**case))  # type: ignore[arg-type]
    assert shape.has_decodes
    assert (shape.partial_chunks, shape.admitted_chunks) == expected


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ({"decodes": 5, "waiting": [10, 10, 10, 10]}, StepShape(False, [], [10, 10, 10])),
        ({"decodes": 5, "waiting": [100, 1]}, StepShape(False, [], [100])),
        ({"decodes": 5, "waiting": [1, 100]}, StepShape(False, [], [1])),
        ({"decodes": 5, "waiting": [10], "admissible": 0}, StepShape(True)),
        ({"decodes": 5}, StepShape(True)),
        ({"decodes": 5, "partial": [40, 10], "waiting": [1]}, StepShape(False, [40], [])),
        ({"decodes": 5, "partial": [20], "waiting": [10, 10]}, StepShape(False, [20], [10])),
    ],
)
def test_prefill_first_takes_whole_prompts_or_decodes(case: dict[str, object], expected: StepShape) -> None:
    assert prefill_first(view(**case)) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", [sarathi, prefill_first], ids=lambda p: p.__name__)
class TestAdmission:
    """What both policies have in common; page_size is 16."""

    def admitted(self, policy: object, **case: object) -> list[int]:
        return policy(view(budget=1000, **case)).admitted_chunks  # type: ignore[operator,arg-type,no-any-return]

    def test_needs_pages_for_all_rows(self, policy: object) -> None:
        assert self.admitted(policy, waiting=[33], free_pages=3) == [33]
        assert self.admitted(policy, waiting=[33], free_pages=2) == []

    def test_stops_at_the_first_that_does_not_fit(self, policy: object) -> None:
        assert self.admitted(policy, waiting=[16, 160, 16], free_pages=8) == [16]

    def test_leaves_running_requests_room_to_grow(self, policy: object) -> None:
        assert GROWTH_TOKENS == 16
        assert self.admitted(policy, waiting=[16], growing=3, free_pages=4) == [16]
        assert self.admitted(policy, waiting=[16], growing=3, free_pages=3) == []

    def test_leaves_those_admitted_before_room_to_grow(self, policy: object) -> None:
        assert self.admitted(policy, waiting=[16, 16], free_pages=3) == [16, 16]
        assert self.admitted(policy, waiting=[16, 16], free_pages=2) == [16]

    def test_is_closed_while_decodes_lack_pages(self, policy: object) -> None:
        assert self.admitted(policy, waiting=[1], free_pages=-1) == []

    def test_reads_no_further_into_the_queue_than_needed(self, policy: object) -> None:
        def queue() -> Iterator[int]:
            yield 100
            yield 5000
            raise AssertionError("read on past a request that does not fit")

        assert self.admitted(policy, waiting=queue(), free_pages=20) == [100]
