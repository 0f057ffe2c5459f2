"""The policies as what they are: functions from counts to counts."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest

from mixattn.config import PolicyName
from mixattn.sched.policy import (
    GROWTH_TOKENS,
    LEAST_CHUNK,
    POLICIES,
    StepShape,
    StepTiming,
    StepView,
    prefill_first,
    sarathi,
    time_budget,
)
from mixattn.sched.step_times import StepLoad, StepTimes


def view(
    *,
    budget: int = 32,
    decodes: int = 0,
    partial: Sequence[int] = (),
    waiting: Sequence[int] = (),
    growing: int = 0,
    admissible: int = 8,
    free_pages: int = 1000,
    contexts: Sequence[int] = (),
    tbt_slo_s: float | None = 0.010,
    max_slowdown: float | None = None,
) -> StepView:
    timing = StepTiming(
        TIMES, StepLoad(decodes, 100 * decodes), contexts or [0] * len(partial), tbt_slo_s, max_slowdown
    )
    return StepView(budget, 16, decodes, partial, waiting, growing, admissible, free_pages, timing)


def known_times() -> StepTimes:
    """Of a machine that takes 1 ms for each row, and 1 us for each key of a chunk's row, and has shown it often."""
    times, rng = StepTimes(), random.Random(0)
    for _ in range(300):
        load = StepLoad(decodes := rng.randrange(9), 100 * decodes).with_chunk(rng.randrange(64), rng.randrange(2000))
        times.observe(load, 1e-3 * (load.num_decodes + load.chunk_rows) + 1e-6 * load.chunk_pairs)
    return times


TIMES = known_times()


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


class TestTimeBudget:
    """The machine is known to 2 %: two deviations below 10 ms leave 9 rows, below 20 ms 18."""

    @pytest.mark.parametrize(
        ("case", "expected"),
        [
            ({"decodes": 4}, ([], [])),
            ({"decodes": 4, "partial": [3]}, ([3], [])),
            ({"decodes": 2, "partial": [3], "waiting": [2]}, ([3], [2])),
            ({"decodes": 1, "waiting": [100]}, ([], [8])),
            ({"decodes": 1, "partial": [12, 100], "waiting": [1], "tbt_slo_s": 0.020}, ([12, 5], [])),
            ({"decodes": 1, "waiting": [100], "tbt_slo_s": 0.020}, ([], [17])),
            ({"decodes": 1, "waiting": [100], "tbt_slo_s": None, "max_slowdown": 20}, ([], [17])),
            ({"decodes": 1, "waiting": [100], "tbt_slo_s": 0.020, "max_slowdown": 100}, ([], [17])),
            ({"decodes": 1, "waiting": [100], "tbt_slo_s": 1.0}, ([], [31])),
        ],
    )
    def test_gives_prompts_what_the_time_leaves(self, case: dict[str, object], expected: object) -> None:
        shape = time_budget(view(**case))  # type: ignore[arg-type]
        assert shape.has_decodes
        assert (shape.partial_chunks, shape.admitted_chunks) == expected

    def test_counts_the_keys_before_a_chunk(self) -> None:
        near, far = (
            time_budget(view(decodes=1, partial=[100], contexts=[context], tbt_slo_s=0.020)).partial_chunks[0]
            for context in (0, 1000)
        )
        assert far == pytest.approx(near / 2, abs=1)

    def test_lets_a_prompt_go_on_where_decodes_take_all_the_time(self) -> None:
        shape = time_budget(view(decodes=20, partial=[100, 100], waiting=[50]))
        assert (shape.partial_chunks, shape.admitted_chunks) == ([LEAST_CHUNK], [])
        shape = time_budget(view(decodes=20, waiting=[50]))
        assert (shape.partial_chunks, shape.admitted_chunks) == ([], [LEAST_CHUNK])

    def test_has_no_limit_but_the_token_budget_without_decodes(self) -> None:
        assert time_budget(view(partial=[20, 50], waiting=[1])).partial_chunks == [20, 12]

    def test_before_the_first_step_is_careful(self) -> None:
        timing = StepTiming(StepTimes(), StepLoad(4, 400), [0], 10.0, None)
        case = StepView(32, 16, 4, [100], [], 0, 8, 1000, timing)
        assert time_budget(case).partial_chunks == [LEAST_CHUNK]


@pytest.mark.parametrize("policy", [sarathi, prefill_first, time_budget], ids=lambda p: p.__name__)
class TestAdmission:
    """What all policies have in common; page_size is 16."""

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
