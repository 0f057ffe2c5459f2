"""Attention on a GPU: ours beside other libraries', each verified once, against the device's measured roofs.

``python -m bench.kernels.bench_mixed_attention --backend triton`` runs it. All candidates of a case take turns, launch
by launch, the L2 filled with other data before each. The roof's time of a batch is the longer of all its flops at the
rate of a bfloat16 matrix product and all its bytes at the rate of a copy: compute and memory perfectly overlapped.
Reading alone is a little faster than copying, so that decodes can come to more than 1.0. ``overlap`` is the time of the
batch over that of its longer half alone, its decodes or its chunk, by the same kernel: 1.0 hides the shorter one.
A call is timed as a layer of a model makes it: work plans were made before, as others' ``plan`` is, while the copy of
ours to the device and the zeros that its kernel counts in are part of it.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

import mixattn
from bench.kernels import predicted
from bench.kernels.attention_cases import (
    Batch,
    Case,
    cache_bytes,
    cases,
    flops_and_bytes,
    kind_cases,
    make_batch,
    scaling_cases,
    sweep,
)
from bench.kernels.attention_peers import PEERS, Call
from bench.lib.device_clock import Clock, CudaClock, Roofs, measure_roofs, time_launches
from bench.lib.measure import Record, Timing, append_json
from mixattn.executor.kv_pool import kv_dtype
from mixattn.ops import attention_cuda
from mixattn.ops.kv_dtypes import kv_dtype_name
from mixattn.ops.plan import Hardware, base_hardware, with_workers
from mixattn.triton_kernels.tuned_tiles import Gpu, tiles_for

DTYPE = predicted.Q_DTYPE
NO_GPU_STATUS = 77
"""The exit status where there is no GPU, as of bench.static.selftest_device: nothing was measured."""
TOLERANCE = 2e-2
"""Of the largest output, which is what bfloat16 leaves: outputs over 128k keys are about 0.005, so that a tolerance in
absolute terms would pass anything."""
RESERVED_BYTES = 3 << 30
"""Beside a case's own tensors: roofs, the flush, workspaces of FlashInfer's, the context."""
JUDGE = "torch-sdpa"
"""Whose output the others are held to, where it runs."""


@dataclass(frozen=True)
class Device:
    """A GPU as a run found it.

    Args:
        free_bytes: of its memory, before anything was allocated.
    """

    torch_device: torch.device
    name: str
    driver: str
    capability: tuple[int, int]
    num_sms: int
    free_bytes: int
    l2_bytes: int

    def hardware(self, case: Case, backend: str = "triton") -> Hardware:
        """The workers that a plan of the case is balanced over, by the rates of the nearest known data sheet."""
        base = base_hardware(self.capability)
        if backend == "cuda":
            hardware = with_workers(base, self.num_sms, attention_cuda.WORKERS_PER_SM)
            return replace(hardware, separates_small=self.capability == (9, 0))
        tiles = tiles_for(predicted.problem_of(case), Gpu(self.name, self.capability))
        return with_workers(base, self.num_sms, tiles.programs_per_sm)

    def where(self) -> dict[str, str]:
        """What its records say about it."""
        return {"device": self.name, "driver": self.driver, "torch": torch.__version__}


def find_device() -> Device | None:
    """The current GPU; None if torch sees none."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    return Device(
        torch.device("cuda", torch.cuda.current_device()),
        properties.name,
        driver,
        (properties.major, properties.minor),
        properties.multi_processor_count,
        torch.cuda.mem_get_info()[0],
        properties.L2_cache_size,
    )


@dataclass(frozen=True)
class Options:
    """What to run.

    Args:
        backends: ours, ``triton`` and ``cuda``. peers: names of ``PEERS``.
        launches: timed of each candidate and case.
        json: the file that records are appended to, each as soon as it is there.
    """

    backends: tuple[str, ...]
    peers: tuple[str, ...]
    launches: int
    json: Path | None = None


@dataclass
class CaseResult:
    """Of one case, by candidate: how long it took, why it was left out, and how its output is wrong."""

    timings: dict[str, Timing] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)


def needed_bytes(case: Case) -> int:
    """Device memory for the case's own tensors, at the moment of the most: while its cache is drawn."""
    caches = cache_bytes(case, DTYPE)
    drawn = 0 if case.kv_dtype == "auto" else caches // (2 * kv_dtype(case.kv_dtype, DTYPE).itemsize) * DTYPE.itemsize
    rows = sum(case.q_lens) * case.num_q_heads * (case.head_dim + case.value_dim) * DTYPE.itemsize
    return caches + drawn + rows


def why_not_here(case: Case, device: Device) -> str | None:
    """The reason why the case does not fit the device's memory; None if it does."""
    needed = needed_bytes(case) + RESERVED_BYTES
    if needed <= device.free_bytes:
        return None
    return f"needs {needed / 2**30:.1f} GiB of the {device.free_bytes / 2**30:.1f} GiB that are free"


def our_call(batch: Batch, device: Device, backend: str) -> Call:
    """The call as a layer of a model makes it: the step's plan was made before."""
    plan = predicted.plan_of(batch.case, device.hardware(batch.case, backend))
    out = torch.empty_like(batch.q)
    return lambda: mixattn.attention(
        batch.q, batch.k_cache, batch.v_cache, cu_seqlens_q=batch.cu_seqlens_q, seq_lens=batch.seq_lens,
        block_table=batch.block_table, k_scale=batch.k_scale, v_scale=batch.v_scale, plan=plan, out=out,
        backend=backend,
    )  # fmt: skip


def in_words(error: Exception) -> str:
    """Its type and the first line of its message."""
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


def prepare(batch: Batch, device: Device, options: Options, result: CaseResult) -> dict[str, Call]:
    """Every candidate's call that runs, and its output verified; the others go to ``result``."""
    calls: dict[str, Call] = {}
    outputs: dict[str, Tensor] = {}
    for backend in options.backends:
        name = f"mixattn-{backend}"
        try:
            calls[name] = our_call(batch, device, backend)
            outputs[name] = calls[name]().clone()
        except NotImplementedError as error:
            result.left_out[name] = str(error)
        except Exception as error:  # a kernel that does not compile, say: it fails the run, after the other cases
            result.wrong[name] = in_words(error)
    for name in options.peers:
        try:
            calls[name] = PEERS[name](batch)
            outputs[name] = calls[name]().clone()
        except ImportError as error:
            result.left_out[name] = f"not installed ({error})"
        except Exception as error:  # whatever another library raises must not end a sweep of ours
            result.left_out[name] = in_words(error)
    if not outputs:
        return {}
    judge = JUDGE if JUDGE in outputs else next(iter(outputs))
    expected = outputs[judge].float()
    for name, output in outputs.items():
        difference = (output.float() - expected).abs().max().item()
        bound = TOLERANCE * expected.abs().max().item()
        if not difference <= bound:  # NaN is wrong too
            result.wrong[name] = f"differs from {judge} by {difference:.2g}, more than {bound:.2g}"
    return {name: calls[name] for name in outputs if name not in result.wrong}


def time_case(case: Case, device: Device, options: Options, clock: Clock) -> CaseResult:
    """Verifies and times every candidate over one case."""
    result = CaseResult()
    calls = prepare(make_batch(case, DTYPE, device.torch_device), device, options, result)
    try:
        result.timings = time_launches(calls, options.launches, clock)
    except torch.OutOfMemoryError as error:
        # Each has run alone, but the copies of K and V that the others keep leave no room for all.
        for name in set(calls).intersection(options.peers):
            result.left_out[name] = in_words(error)
            del calls[name]
        result.timings = time_launches(calls, options.launches, clock)
    del calls
    if device.torch_device.type == "cuda":
        torch.cuda.empty_cache()
    return result


class Sweep:
    """Runs cases, prints a line per candidate, and remembers batches that several cases have as halves."""

    def __init__(self, device: Device, options: Options, clock: Clock, roofs: Roofs) -> None:
        self._device, self._options, self._clock, self._roofs = device, options, clock, roofs
        self._halves: dict[Case, CaseResult] = {}
        self._said: set[str] = set()
        self.has_wrong = False

    def run(self, chosen: Iterable[Case]) -> None:
        """Times the cases; each one's records are written before the next begins."""
        print(
            f"{'case':46} {'by':20} {'us':>9} {'p10..p90':>18} {'GB/s':>6} {'TFLOP/s':>8} {'of roof':>7} "
            f"{'overlap':>7} {'/ours':>6} {'predicted us':>12}"
        )
        for case in chosen:
            reason = why_not_here(case, self._device)
            if reason is not None:
                print(f"{case.name:46} skipped: {reason}", flush=True)
                continue
            result = time_case(case, self._device, self._options, self._clock)
            halves = [self._half(half) for half in case.parts]
            records = self._records(case, result, halves)
            append_json(self._options.json, records, self._device.where())
            self._print(case, result, records)

    def measured_kinds(self, case: Case) -> dict[str, float]:
        """By item kind, what a batch of that kind alone took, by our first backend; empty where it takes none."""
        ours = replace(self._options, backends=self._options.backends[:1], peers=())
        found: dict[str, float] = {}
        for kind, kind_case in kind_cases(case).items():
            if why_not_here(kind_case, self._device) is None:
                result = time_case(kind_case, self._device, ours, self._clock)
                self._note(kind_case, result)
                for timing in result.timings.values():
                    found[kind] = timing.median_us
        return found

    def _half(self, half: Case) -> CaseResult:
        key = replace(half, name="")
        if key not in self._halves:
            self._halves[key] = time_case(half, self._device, self._options, self._clock)
            self._note(half, self._halves[key])
        return self._halves[key]

    def _records(self, case: Case, result: CaseResult, halves: list[CaseResult]) -> list[Record]:
        stored = kv_dtype(case.kv_dtype, DTYPE)
        per_slice = flops_and_bytes(case, DTYPE.itemsize, (case.head_dim + case.value_dim) * stored.itemsize)
        flops, num_bytes = sum(f for f, _ in per_slice), sum(b for _, b in per_slice)
        plan = predicted.plan_of(case, self._device.hardware(case))
        roof_us = self._roofs.least_us(flops, num_bytes)
        records = []
        for name, timing in result.timings.items():
            alone_us = [half.timings[name].median_us for half in halves if name in half.timings]
            has_halves = alone_us and len(alone_us) == len(halves)
            records.append(
                Record(
                    case.name, name, str(DTYPE).removeprefix("torch."), timing, num_bytes, flops,
                    share_of_roof=roof_us / timing.median_us,
                    extra={
                        "kv_dtype": kv_dtype_name(stored),
                        "roofs": self._roofs.record(),
                        "launches": self._options.launches,
                        "l2": "flushed",
                        "overlap": timing.median_us / max(alone_us) if has_halves else None,
                        "predicted_us": plan.cost.predicted_s * 1e6 if name.startswith("mixattn-") else None,
                        "headroom": plan.cost.headroom,
                    },
                )
            )  # fmt: skip
        return records

    def _print(self, case: Case, result: CaseResult, records: list[Record]) -> None:
        ours_us = next((r.timing.median_us for r in records if r.backend.startswith("mixattn-")), None)
        for record in records:
            t, extra = record.timing, record.extra
            overlap = "-" if extra["overlap"] is None else f"{extra['overlap']:.2f}"
            ratio = "-" if ours_us is None else f"{t.median_us / ours_us:.2f}"
            expected = "-" if extra["predicted_us"] is None else f"{extra['predicted_us']:.1f}"
            print(
                f"{case.name:46} {record.backend:20} {t.median_us:9.1f} {t.p10_us:8.1f}..{t.p90_us:<8.1f} "
                f"{record.bytes / t.median_us / 1e3:6.0f} {record.flops / t.median_us / 1e6:8.1f} "
                f"{record.share_of_roof or 0.0:7.2f} {overlap:>7} {ratio:>6} {expected:>12}"
            )
        self._note(case, result)

    def _note(self, case: Case, result: CaseResult) -> None:
        for name, reason in result.wrong.items():
            self.has_wrong = True
            print(f"{case.name:46} {name:20} WRONG or failing, not timed: {reason}")
        for name, reason in result.left_out.items():
            if f"{name}: {reason}" not in self._said:  # "not installed" once, not for each case
                self._said.add(f"{name}: {reason}")
                print(f"{case.name:46} {name:20} left out: {reason}")
        print(end="", flush=True)


def named_case(name: str) -> Case:
    """The case of this name, of any sweep.

    Raises:
        ValueError: there is none.
    """
    known = {case.name: case for case in [*sweep(True), *cases(), *scaling_cases()]}
    if name not in known:
        raise ValueError(f"--profile must name a case, such as {sweep(False)[0].name}, got {name!r}")
    return known[name]


def profile(
    case: Case,
    device: Device,
    options: Options,
    flush: Callable[[], None],
    range_of: Callable[[str], contextlib.AbstractContextManager[object]],
) -> CaseResult:
    """One launch of every candidate that runs, warm but for the L2, in a range named as the candidate is."""
    result = CaseResult()
    for name, call in prepare(make_batch(case, DTYPE, device.torch_device), device, options, result).items():
        call()
        flush()
        if device.torch_device.type == "cuda":
            torch.cuda.synchronize()
        with range_of(name):
            call()
        print(f"{case.name}: range {name}")
    for name, reason in {**result.left_out, **result.wrong}.items():
        print(f"{case.name}: no range {name}: {reason}")
    return result


def predict_only(chosen: list[Case]) -> int:
    """Says that there is no GPU and prints what the plans predict for others; the status of a run without one."""
    print(f"No GPU: torch {torch.__version__} sees none, so nothing is measured and no record is written.")
    print("\n".join(predicted.table_lines(chosen)))
    for gpu in predicted.GPUS:
        for case in chosen[:1]:
            hardware = predicted.hardware_of(case, gpu.base, gpu.num_sms, gpu.capability)
            print("\n".join(predicted.kind_lines(case, hardware)))
    return NO_GPU_STATUS


def run_on(device: Device, options: Options, chosen: list[Case], clock: Clock, roofs: Roofs) -> int:
    """Times the chosen cases and prints the report; 1 if a candidate's output was wrong, else 0."""
    print(f"{device.name}, driver {device.driver}, {device.num_sms} SMs, {device.free_bytes / 2**30:.1f} GiB free")
    print(f"roofs, measured: copy {roofs.copy_gb_s:.0f} GB/s, bfloat16 product {roofs.gemm_tflop_s:.0f} TFLOP/s")
    runner = Sweep(device, options, clock, roofs)
    runner.run(chosen)
    for case in chosen[:1]:
        print("\n".join(predicted.kind_lines(case, device.hardware(case), runner.measured_kinds(case))))
    return 1 if runner.has_wrong else 0


def main(options: Options, chosen: list[Case], profiled: str | None) -> int:
    """Runs the cases, or profiles one, on the current GPU; without one, prints predictions. The exit status."""
    device = find_device()
    if device is None:
        return predict_only([named_case(profiled)] if profiled is not None else chosen)
    clock = CudaClock(device.torch_device, device.l2_bytes)
    if profiled is not None:
        result = profile(named_case(profiled), device, options, clock.flush, torch.cuda.nvtx.range)
        return 1 if result.wrong else 0
    return run_on(device, options, chosen, clock, measure_roofs(device.torch_device, clock))
