"""Estimates of steps' times against machines whose law is known."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from mixattn.sched.step_times import StepLoad, StepTimes

Machine = Callable[[StepLoad], float]


def machine(scale: float = 1.0) -> Machine:
    """Seconds of a load: near what a model of 135M parameters takes on two cores."""

    def step_s(load: StepLoad) -> float:
        return scale * (
            0.004
            + 1.2e-3 * load.num_decodes
            + 2e-6 * load.num_keys
            + 1.3e-3 * load.chunk_rows
            + 4e-7 * load.chunk_pairs
        )

    return step_s


def varied(rng: random.Random) -> StepLoad:
    num_decodes = rng.randrange(9)
    load = StepLoad(num_decodes, num_decodes * rng.randrange(1, 2000))
    return load.with_chunk(rng.randrange(64), rng.randrange(2000)) if rng.random() < 0.5 else load


def trained(step_s: Machine, num_steps: int, noise: float = 0.0, seed: int = 0) -> StepTimes:
    rng, times = random.Random(seed), StepTimes()
    for _ in range(num_steps):
        load = varied(rng)
        times.observe(load, step_s(load) * math.exp(rng.gauss(0.0, noise)))
    return times


def test_with_chunk_counts_its_keys_and_what_each_row_sees_of_them() -> None:
    load = StepLoad(2, 30).with_chunk(3, 10).with_chunk(2, 0)
    assert load == StepLoad(2, 30 + 13 + 2, 5, (11 + 12 + 13) + (1 + 2))


def test_estimate_before_the_first_step_knows_nothing() -> None:
    assert StepTimes().estimate(StepLoad(1, 10)) == (0.0, math.inf)
    assert StepTimes().longest_chunk(StepLoad(1, 10), 100, 0, 1e9, 1.0) == 0


def test_estimate_meets_a_linear_machine() -> None:
    step_s, rng = machine(), random.Random(1)
    times = trained(step_s, 200)
    for _ in range(50):
        load = varied(rng)
        mean, deviation = times.estimate(load)
        assert mean == pytest.approx(step_s(load), rel=0.02)
        assert deviation < 0.1 * mean


def test_estimate_of_a_noisy_machine_stays_within_its_deviations() -> None:
    step_s, rng = machine(), random.Random(2)
    times = trained(step_s, 400, noise=0.15)
    far = 0
    for _ in range(200):
        load = varied(rng)
        mean, deviation = times.estimate(load)
        assert 0.05 * mean < deviation < 0.4 * mean
        far += abs(step_s(load) * math.exp(rng.gauss(0.0, 0.15)) - mean) > 2 * deviation
    assert far <= 20


def test_estimate_follows_a_machine_that_slows_down() -> None:
    times, rng, slow = trained(machine(), 200), random.Random(3), machine(2.0)
    for _ in range(100):
        load = varied(rng)
        times.observe(load, slow(load))
    load = StepLoad(8, 4000).with_chunk(24, 500)
    assert times.estimate(load)[0] == pytest.approx(slow(load), rel=0.1)


def test_estimate_follows_a_machine_that_slows_down_little_by_little() -> None:
    times, rng = trained(machine(), 1000, noise=0.1), random.Random(5)
    for idx in range(600):
        load = varied(rng)
        times.observe(load, machine(1.001**idx)(load) * math.exp(rng.gauss(0.0, 0.1)))
    load = StepLoad(8, 4000).with_chunk(24, 500)
    assert times.estimate(load)[0] == pytest.approx(machine(1.001**600)(load), rel=0.07)


def test_outliers_make_nothing_less_sure_than_at_first() -> None:
    times = StepTimes()
    decodes, mixed = StepLoad(8, 4000), StepLoad(8, 4000).with_chunk(24, 500)
    times.observe(decodes, 0.02)
    at_first = times.estimate(mixed)[1]
    for idx in range(1000):
        times.observe(decodes, 0.02 if idx % 5 else 0.2)
    assert times.estimate(mixed)[1] <= 1.01 * at_first


def test_one_outlier_moves_the_estimate_little() -> None:
    step_s, load = machine(), StepLoad(8, 4000).with_chunk(24, 500)
    times = trained(step_s, 200)
    before = times.estimate(load)[0]
    times.observe(load, 50 * step_s(load))
    assert times.estimate(load)[0] < 1.5 * before


def test_loads_alike_for_long_do_not_spoil_the_estimate() -> None:
    """Decodes alone say nothing of chunks: their numbers stay, and what is known of them fades, down to the prior."""
    step_s, rng, times = machine(), random.Random(4), trained(machine(), 200, noise=0.05)
    mixed = StepLoad(8, 4000).with_chunk(24, 500)
    known = times.estimate(mixed)[1]
    for idx in range(5000):
        load = StepLoad(8, 4000 + idx % 100)
        times.observe(load, step_s(load) * math.exp(rng.gauss(0.0, 0.05)))
    mean, deviation = times.estimate(mixed)
    assert mean == pytest.approx(step_s(mixed), rel=0.15)
    assert known < deviation < 1.0
    assert times.estimate(StepLoad(8, 4050))[0] == pytest.approx(step_s(StepLoad(8, 4050)), rel=0.05)


@pytest.mark.parametrize("step_s", [0.0, -1.0])
def test_a_step_without_time_teaches_nothing(step_s: float) -> None:
    times = StepTimes()
    times.observe(StepLoad(1, 10), step_s)
    assert times.estimate(StepLoad(1, 10)) == (0.0, math.inf)


class TestLongestChunk:
    def test_is_the_last_that_fits(self) -> None:
        times, load = trained(machine(), 200), StepLoad(8, 4000)
        rows = times.longest_chunk(load, 1000, 300, 0.060, 2.0)
        assert 0 < rows < 1000

        def upper(num_rows: int) -> float:
            mean, deviation = times.estimate(load.with_chunk(num_rows, 300))
            return mean + 2.0 * deviation

        assert upper(rows) <= 0.060 < upper(rows + 1)

    def test_takes_all_rows_that_fit_and_none_that_do_not(self) -> None:
        times, load = trained(machine(), 200), StepLoad(8, 4000)
        assert times.longest_chunk(load, 5, 300, 1.0, 2.0) == 5
        assert times.longest_chunk(load, 5, 300, 0.010, 2.0) == 0

    def test_is_shorter_at_a_longer_context_and_with_more_caution(self) -> None:
        times, load = trained(machine(), 200, noise=0.1), StepLoad(8, 4000)
        near, far = (times.longest_chunk(load, 1000, context, 0.060, 2.0) for context in (0, 2000))
        assert far < near
        assert times.longest_chunk(load, 1000, 0, 0.060, 4.0) < near
