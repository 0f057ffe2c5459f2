"""Linear maps over packed weights of every form, against torch in float32 and bfloat16; ``q4_1-int8`` rounds x to int8.

Run ``python -m bench.kernels.bench_linear``.
The shapes are those of smollm2 and of a 1B Llama. All candidates take
turns in one process; each runs through copies of its weights that are together larger than the last-level cache, as
the layers of a model are, and is compared with a product in float64 before it is timed. ``--cpu-time`` counts CPU
seconds of the process instead of wall time: on a machine that others use, wall time says who else was there.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import gguf
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.lib.measure import Record, append_json, parser, time_interleaved
from mixattn import _C
from mixattn.env import num_threads
from mixattn.ops.linear import QUANTISED_FORMS, WEIGHT_FORMS, linear, pack_weight, row_bytes

_FLUSH_BYTES = 64 << 20
"""Twice the last-level cache of the reference machine, in the form that takes the least."""


@dataclass(frozen=True)
class Case:
    """y [num_rows, num_cols] = x [num_rows, depth] W^T."""

    name: str
    num_cols: int
    depth: int
    num_rows: int


_SHAPES = {
    "smollm2-qkv": (960, 576),
    "smollm2-o": (576, 576),
    "smollm2-gate-up": (3072, 576),
    "smollm2-down": (576, 1536),
    "smollm2-lm-head": (49152, 576),
    "llama1b-qkv": (3072, 2048),
    "llama1b-gate-up": (16384, 2048),
    "llama1b-down": (2048, 8192),
}


def cases() -> list[Case]:
    """Every shape, with a decode, two batches of decodes and a prefill chunk."""
    return [Case(f"{name}-m{m}", *shape, m) for name, shape in _SHAPES.items() for m in (1, 8, 32, 256)]


def stored(form: str, values: Tensor) -> Tensor:
    """The rows of ``values`` as a checkpoint of this form has them."""
    if form in QUANTISED_FORMS:
        return torch.from_numpy(gguf.quantize(values.numpy(), gguf.GGMLQuantizationType[form.upper()]))
    return values.to(getattr(torch, form))


def candidates(case: Case) -> dict[str, tuple[Callable[[], Tensor], int, float]]:
    """By name: the product over the next copy of the weights, bytes of one copy, and the error against float64."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(case.num_cols, case.depth, generator=generator)
    x = torch.randn(case.num_rows, case.depth, generator=generator)
    truth = x.double() @ values.double().T
    made: dict[str, tuple[Callable[[], Tensor], int, float]] = {}

    def add(name: str, run: Callable[[], Tensor], num_bytes: int) -> None:
        made[name] = (run, num_bytes, float((run().double() - truth).abs().max() / truth.abs().max()))

    def copies(num_bytes: int) -> range:
        return range(max(1, _FLUSH_BYTES // num_bytes))

    for form, rounds_x in [*((form, False) for form in WEIGHT_FORMS), ("q4_1", True)]:
        num_bytes = case.num_cols * row_bytes(form, case.depth)
        rows = stored(form, values)
        weights = itertools.cycle(
            [pack_weight(rows, form, case.depth, rounds_x=rounds_x) for _ in copies(num_bytes)]
        )  # fmt: skip
        name = f"{form}-int8" if rounds_x else form
        add(name, lambda weights=weights: linear(x, next(weights)), num_bytes)  # type: ignore[misc]
    for dtype in (torch.float32, torch.bfloat16):
        num_bytes = values.numel() * dtype.itemsize
        matrices = itertools.cycle([values.to(dtype) for _ in copies(num_bytes)])
        rounded = x.to(dtype)
        name = f"torch-{str(dtype).removeprefix('torch.')}"
        add(name, lambda matrices=matrices, rounded=rounded: F.linear(rounded, next(matrices)).float(), num_bytes)  # type: ignore[misc]
    return made


def run(case: Case, repeats: int, roofs: dict[str, float], clock: Callable[[], float]) -> list[Record]:
    """The records of one case."""
    made = candidates(case)
    timings = time_interleaved({name: made[name][0] for name in made}, repeats, clock=clock)
    flops = 2 * case.num_rows * case.num_cols * case.depth
    records = []
    for name, timing in timings.items():
        _, num_bytes, error = made[name]
        roof_us = max(flops / roofs["fma_gflop_s"], num_bytes / roofs["read_gb_s"]) / 1e3
        extra = {"threads": num_threads(), "error": error, "roofs": roofs}
        records.append(Record(case.name, name, "float32", timing, num_bytes, flops, roof_us / timing.median_us, extra))
    return records


def main() -> None:
    args_parser = parser(__doc__ or "")
    args_parser.add_argument("--cases", nargs="+", help="only cases whose name starts with one of these")
    args_parser.add_argument("--cpu-time", action="store_true", help="CPU time of all threads instead of wall time")
    args = args_parser.parse_args()
    torch.set_num_threads(num_threads())
    roofs = _C.measure_roofs(num_threads())
    print(f"{num_threads()} threads: {roofs['read_gb_s']:.1f} GB/s, {roofs['fma_gflop_s']:.0f} GFLOP/s in float32")
    names = [*WEIGHT_FORMS, "q4_1-int8", "torch-float32", "torch-bfloat16"]
    print(f"{'us':24}" + "".join(f"{name:>15}" for name in names) + f"{'q4_1 vs torch':>15}")
    records = []
    for case in cases():
        if args.cases and not case.name.startswith(tuple(args.cases)):
            continue
        found = run(case, args.repeats, roofs, time.process_time if args.cpu_time else time.perf_counter)
        records += found
        us = {record.backend: record.timing.median_us for record in found}
        ratio = us["torch-float32"] / us["q4_1"]
        print(f"{case.name:24}" + "".join(f"{us[name]:15.0f}" for name in names) + f"{ratio:14.1f}x", flush=True)
    append_json(args.json, records)


if __name__ == "__main__":
    main()
