"""How long a step will take: learned from the steps that an engine has taken, while it serves.

A step takes some time however little it has, some for each row, some for each key that is read for a sequence, and some
for each pair of a chunk's row and a key that it sees:

    t = base + a * decodes + b * keys + c * rows of chunks + d * pairs of chunks

The five numbers differ from machine to machine and model to model, and from hour to hour where a machine is shared, so
they are filtered from the times of the steps (a Kalman filter with a random walk of the numbers): the estimate
follows the machine, and comes with a deviation, which is large for loads unlike any seen. Numbers that the steps so far
cannot tell apart may have any share of their sum, even below zero; the sum is what counts.

Source: what depends on rows alone and what on keys, as Vidur tells operators apart (arXiv:2405.05465); the filter is
R. E. Kalman, "A new approach to linear filtering and prediction problems", 1960, gains limited as P. J. Huber's
estimates are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

_DRIFT = 0.01
"""Standard deviation of what a step changes each of the five numbers by, as a share of it."""
_FIRST_NOISE = 0.1
_LEAST_NOISE, _MOST_NOISE = 0.02, 0.5
"""Standard deviation of a step's time around the model, as a share of it: at first, and its bounds."""
_NOISE_MEMORY = 0.95
_OUTLIER_DEVIATIONS = 3.0
"""A step further off than so many deviations counts as if it were so far off, and all that is known becomes less sure:
one such step moves the numbers little; when the next are as far off, the machine has changed, and they move fast."""
_SURPRISE = 2.0
"""What the variances are multiplied with then."""
_PRIOR_ROWS = (4.0, 1 / 128, 4.0, 1 / 512)
"""Deviation of the last four numbers before anything is known, in times of a row of the first step: a key, which is
read from memory, costs less than a row, and a pair still less: with h hidden units a row takes some 6 h times the
arithmetic of a pair. That of the first number is the first step."""


class StepLoad(NamedTuple):
    """What a step's time depends on.

    Args:
        num_decodes: rows of decodes.
        num_keys: of all sequences in the step.
        chunk_rows: rows of chunks.
        chunk_pairs: of such a row and a key that it sees: all before it, and itself.
    """

    num_decodes: int
    num_keys: int
    chunk_rows: int = 0
    chunk_pairs: int = 0

    def with_chunk(self, num_rows: int, context: int) -> StepLoad:
        """And ``num_rows`` more of a request that has ``context`` keys before them."""
        return StepLoad(
            self.num_decodes,
            self.num_keys + context + num_rows,
            self.chunk_rows + num_rows,
            self.chunk_pairs + num_rows * context + num_rows * (num_rows + 1) // 2,
        )


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    """Written out: to size a chunk takes some sixty of these."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3] + a[4] * b[4]


class StepTimes:
    """Estimates of steps' times, from those observed."""

    def __init__(self) -> None:
        self._theta = [0.0] * 5
        self._prior: list[float] = []
        """Variances before anything is known; empty until the first step, which gives the scale."""
        self._covariance: list[list[float]] = []
        self._noise = _FIRST_NOISE**2

    def observe(self, load: StepLoad, step_s: float) -> None:
        """A step of ``load`` has taken ``step_s`` seconds."""
        if step_s <= 0:
            return  # below the clock's resolution: nothing to learn
        if not self._prior:
            row_s = step_s / max(1, load.num_decodes + load.chunk_rows)
            self._prior = [step_s**2, *((rows * row_s) ** 2 for rows in _PRIOR_ROWS)]
            self._covariance = [[v if i == j else 0.0 for j in range(5)] for i, v in enumerate(self._prior)]
        self._drift()
        x = (1, *load)
        spread = [_dot(row, x) for row in self._covariance]
        model_variance = _dot(spread, x)
        error = step_s - _dot(self._theta, x)
        noise_variance = self._noise * step_s**2
        variance = model_variance + noise_variance
        is_outlier = error**2 > variance * _OUTLIER_DEVIATIONS**2
        if is_outlier:
            variance = math.sqrt(variance) * abs(error) / _OUTLIER_DEVIATIONS
        if model_variance < noise_variance:  # else the error says more of the model than of the machine
            seen = min((error / step_s) ** 2, self._noise * _OUTLIER_DEVIATIONS**2)
            noise = _NOISE_MEMORY * self._noise + (1 - _NOISE_MEMORY) * seen
            self._noise = min(max(noise, _LEAST_NOISE**2), _MOST_NOISE**2)
        growth = _SURPRISE if is_outlier else 1.0
        for i, row in enumerate(self._covariance):
            gain = spread[i] / variance
            self._theta[i] += gain * error
            self._covariance[i] = [growth * (p - gain * s) for p, s in zip(row, spread, strict=True)]

    def estimate(self, load: StepLoad) -> tuple[float, float]:
        """Seconds that a step of ``load`` will take, and their standard deviation; (0, inf) before the first step."""
        if not self._prior:
            return 0.0, math.inf
        x = (1, *load)
        mean = _dot(self._theta, x)
        variance = _dot([_dot(row, x) for row in self._covariance], x)
        return mean, math.sqrt(max(0.0, variance) + self._noise * mean**2)

    def longest_chunk(self, load: StepLoad, num_rows: int, context: int, limit_s: float, num_deviations: float) -> int:
        """The most rows, up to ``num_rows``, with which a step of ``load`` and a chunk still takes ``limit_s`` at most.

        Args:
            load: what the step has already.
            num_rows: rows that there are.
            context: keys before them.
            limit_s: seconds.
            num_deviations: how far above its estimate the step's time may come to lie.
        """

        def fits(rows: int) -> bool:
            mean, deviation = self.estimate(load.with_chunk(rows, context))
            return mean + num_deviations * deviation <= limit_s

        if fits(num_rows):
            return num_rows
        fitting, too_many = 0, num_rows
        while too_many - fitting > 1:
            rows = (fitting + too_many) // 2
            fitting, too_many = (rows, too_many) if fits(rows) else (fitting, rows)
        return fitting

    def _drift(self) -> None:
        """The machine may have changed since the step before, but never is less known than at first."""
        for i in range(5):
            row = self._covariance[i]
            row[i] += (_DRIFT * self._theta[i]) ** 2
            if row[i] > self._prior[i]:
                # Scaling the row and the column keeps the matrix one of covariances.
                shrink = math.sqrt(self._prior[i] / row[i])
                for j in range(5):
                    row[j] *= shrink
                    self._covariance[j][i] *= shrink
