"""Time on a GPU: what one launch takes by the device's own events, the L2 cold; and what the device reaches at most."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch

from bench.lib.measure import Timing, timing_of

Clock = Callable[[Callable[[], object]], float]
"""Microseconds that one run of a callable takes on the device."""

HEAD_START_CYCLES = 1_000_000
"""The device idles this long before the first event, half a millisecond, so that the host, which takes some 100 us to
check and launch a call, has enqueued all of it by then; else its time would be measured."""
WARMUP_RUNS = 3
"""The first compiles, the second may still allocate."""


class CudaClock:
    """A ``Clock`` by CUDA events on the current stream; before each run the L2 is filled with other data."""

    def __init__(self, device: torch.device, l2_bytes: int) -> None:
        # Read, not written: lines that are dirty would be written back while the run is timed.
        self._other_data = torch.ones(2 * max(l2_bytes, 1 << 20) // 4, dtype=torch.float32, device=device)
        self._device = device

    def flush(self) -> None:
        """Fills the L2 with other data."""
        self._other_data.sum()

    def __call__(self, run: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush()
        torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize(self._device)
        return float(start.elapsed_time(end)) * 1e3


def time_launches(candidates: Mapping[str, Callable[[], object]], launches: int, clock: Clock) -> dict[str, Timing]:
    """Timing of each candidate over single launches, taken in turns, so that a drift of clocks meets all alike."""
    for run in candidates.values():
        for _ in range(WARMUP_RUNS):
            run()
    samples_us: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(launches):
        for name, run in candidates.items():
            samples_us[name].append(clock(run))
    return {name: timing_of(values) for name, values in samples_us.items()}


@dataclass(frozen=True)
class Roofs:
    """What the device reached in this run: copying memory, bytes read and written, and a bfloat16 matrix product."""

    copy_gb_s: float
    gemm_tflop_s: float

    def least_us(self, flops: int, num_bytes: int) -> float:
        """The time of this work with all of its compute and memory traffic overlapped."""
        return max(flops / self.gemm_tflop_s / 1e6, num_bytes / self.copy_gb_s / 1e3)

    def record(self) -> dict[str, float]:
        return asdict(self)


COPY_BYTES, GEMM_SIZE, ROOF_LAUNCHES = 1 << 30, 8192, 20


def measure_roofs(
    device: torch.device, clock: Clock, copy_bytes: int = COPY_BYTES, gemm_size: int = GEMM_SIZE
) -> Roofs:
    """The medians of ``ROOF_LAUNCHES`` copies of ``copy_bytes`` and products of ``gemm_size`` cubed, in turns."""
    source, target = (torch.ones(copy_bytes // 4, dtype=torch.float32, device=device) for _ in range(2))
    # Random, for a GPU that multiplies ones draws less power, and clocks higher.
    a, b = (torch.randn(gemm_size, gemm_size, device=device).bfloat16() for _ in range(2))
    product = torch.empty_like(a)
    runs: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(source),
        "gemm": lambda: torch.mm(a, b, out=product),
    }
    timings = time_launches(runs, ROOF_LAUNCHES, clock)
    return Roofs(
        copy_gb_s=2 * copy_bytes / timings["copy"].median_us / 1e3,
        gemm_tflop_s=2 * gemm_size**3 / timings["gemm"].median_us / 1e6,
    )
