"""Finds the tiles in which the Triton attention kernel is fastest on this GPU, and writes them down for it.

Run ``python -m bench.kernels.tune``. For each problem (head_dim, elements, form of K and V, row terms, kinds of tiles)
it tries the candidates on a batch of decodes, a chunk and both together. Each candidate is verified against the
reference before it is timed; all take turns, launch by launch, the L2 filled with other data before each. The best is
the one with the least geometric mean of its times over those of ``choose_tiles``' tiles, which stay where none is
faster by more than ``LEAST_GAIN``. The file (``MIXATTN_TILES``, or the user's cache directory) is written after each
problem, and read by ``mixattn.attention`` from then on (triton_kernels/tuned_tiles.py). A candidate is compiled first,
which takes longer than to time it. Without a GPU it prints the candidates and exits with 77.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.kernels.attention_cases import Batch, Case, flops_and_bytes, make_batch
from bench.kernels.gpu_attention import NO_GPU_STATUS, TOLERANCE, Device, find_device, in_words
from bench.kernels.predicted import GPUS
from bench.lib.device_clock import Clock, CudaClock, time_launches
from bench.lib.measure import Record, Timing, append_json, parser
from mixattn import env
from mixattn.ops.attention import attention
from mixattn.ops.kv_dtypes import kv_format
from mixattn.ops.plan import base_hardware, plan, with_workers
from mixattn.triton_kernels.mixed_attention import mixed_attention
from mixattn.triton_kernels.tiles import (
    MAX_BLOCK_N,
    MAX_REGISTERS,
    SM_REGISTERS,
    TileChoice,
    TileProblem,
    why_not,
)
from mixattn.triton_kernels.tuned_tiles import (
    Gpu,
    TunedChoice,
    kernel_hash,
    read_choices,
    triton_version,
    write_choices,
)

HEADS = ((128, 128), (64, 64), (96, 96), (192, 192), (256, 256), (192, 128))
"""head_dim and v_head_dim."""
FORMS = ((2, 16, None), (4, 32, None), (2, 8, "int8"), (2, 8, "float8_e4m3fn"), (2, 8, "float8_e5m2"), (2, 4, "int4"))
"""Bytes of an element in the products, bits of one in memory, and what K and V are quantised to."""
CACHE_DTYPES = {
    None: "auto",
    "int8": "int8",
    "float8_e4m3fn": "fp8_e4m3",
    "float8_e5m2": "fp8_e5m2",
    "int4": "int4",
}
"""The ``kv_dtype`` of a case, by format."""
LEAST_GAIN = 0.01
"""Of the geometric mean: less is within what one run differs from the next by."""
NUM_Q_HEADS, GROUP_SIZE = 32, 4

LARGE_TILES = tuple(itertools.product((128, 64, 32), (32, 64, 128)))
"""Rows and keys of the tile for chunks."""
OCCUPANCIES = ((8, 1), (8, 2), (4, 2), (4, 3), (4, 4))
"""Warps of a program, and programs per SM."""
SMALL_ROWS = 16
OTHER_STAGES = (1, 3)


def problems(is_full: bool) -> list[TileProblem]:
    """What is tuned for: each axis alone through head_dim 128 in 16 bits, which is first, or all combinations."""
    product = [
        TileProblem(*head, *form, has_row_terms, has_one_kind)
        for head, form, has_row_terms, has_one_kind in itertools.product(HEADS, FORMS, (False, True), (False, True))
    ]
    if is_full:
        return product

    def num_changes(problem: TileProblem) -> int:
        form = (problem.element_bytes, problem.stored_bits, problem.kv_format)
        return sum(
            (
                (problem.head_dim, problem.v_head_dim) != HEADS[0],
                form != FORMS[0],
                problem.has_row_terms,
                problem.has_one_kind,
            )
        )

    return [problem for problem in product if num_changes(problem) <= 1]


def name_of(problem: TileProblem) -> str:
    """As ``hd128-16bit-int8-terms-one``, or ``hd192-v128-16bit`` where V has another size."""
    parts = [f"hd{problem.head_dim}"]
    parts += [f"v{problem.v_head_dim}"] if problem.v_head_dim != problem.head_dim else []
    parts += [f"{8 * problem.element_bytes}bit"]
    parts += [problem.kv_format] if problem.kv_format is not None else []
    return "-".join(parts + ["terms"] * problem.has_row_terms + ["one"] * problem.has_one_kind)


def short(tiles: TileChoice) -> str:
    """As ``128x64+16x128-s2+2-w8-p2``: rows x keys, stages, warps, programs per SM."""
    sizes = "+".join(f"{rows}x{keys}" for rows, keys in zip(tiles.block_m, tiles.block_n, strict=True))
    return f"{sizes}-s{'+'.join(map(str, tiles.num_stages))}-w{tiles.num_warps}-p{tiles.programs_per_sm}"


def candidates(problem: TileProblem, capability: tuple[int, int]) -> list[TileChoice]:
    """The tiles to try: those of ``choose_tiles``, which are first; then every large tile with every occupancy, then
    other small tiles and stages with the first's; of these the ones that ``why_not`` finds room for."""
    chosen = problem.choose(capability)
    most_keys = min(MAX_BLOCK_N[1], chosen.block_n[-1])
    tried = [chosen]
    for (rows, keys), (num_warps, programs_per_sm) in itertools.product(LARGE_TILES, OCCUPANCIES):
        registers = SM_REGISTERS // (32 * num_warps * programs_per_sm) // 8 * 8
        tiles = replace(
            chosen,
            block_m=(rows,),
            block_n=(keys,),
            num_stages=(2,),
            num_warps=num_warps,
            programs_per_sm=programs_per_sm,
            max_registers=None if registers > MAX_REGISTERS else registers,
        )
        tried.append(tiles if problem.has_one_kind else _with_small(tiles, most_keys))
    if not problem.has_one_kind:
        large = replace(chosen, block_m=chosen.block_m[:1], block_n=chosen.block_n[:1], num_stages=(2,))
        tried += [_with_small(large, keys) for keys in (64, 32)]
        tried += [
            replace(
                chosen, block_m=(chosen.block_m[0], rows, SMALL_ROWS),
                block_n=(chosen.block_n[0], *chosen.block_n), num_stages=(2, 2, 2),
            )
            for rows in (64, 32)
            if rows < chosen.block_m[0]
        ]  # fmt: skip
    tried += [replace(chosen, num_stages=(stages,) * len(chosen.num_stages)) for stages in OTHER_STAGES]
    return [tiles for tiles in dict.fromkeys(tried) if why_not(tiles, problem, capability) is None]


def _with_small(large: TileChoice, keys: int) -> TileChoice:
    """The tile for chunks, and one of few rows for decodes."""
    return replace(
        large, block_m=(*large.block_m, SMALL_ROWS), block_n=(*large.block_n, keys), num_stages=(*large.num_stages, 2)
    )


def cases_of(problem: TileProblem) -> list[Case]:
    """Decodes, a chunk, and both together."""
    centre = Case(
        f"tune-{name_of(problem)}", 32, 4096, 512, 4096, NUM_Q_HEADS, NUM_Q_HEADS // GROUP_SIZE, problem.head_dim,
        kv_dtype=CACHE_DTYPES[problem.kv_format], v_head_dim=problem.v_head_dim,
    )  # fmt: skip
    return [centre, *centre.parts]


@dataclass
class ProblemResult:
    """Of one problem, by candidate's short name: times by batch, and why it is wrong or does not run."""

    timings: dict[str, dict[str, Timing]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    best: TunedChoice | None = None

    def relative(self, name: str, first: str) -> float:
        """The geometric mean of the candidate's times over the first's."""
        ratios = [by_name[name].median_us / by_name[first].median_us for by_name in self.timings.values()]
        return math.exp(sum(math.log(ratio) for ratio in ratios) / len(ratios))


class TunedBatch:
    """A batch of a problem on the device, and what the kernel needs besides it."""

    def __init__(self, problem: TileProblem, case: Case, device: Device) -> None:
        dtype = torch.bfloat16 if problem.element_bytes == 2 else torch.float32
        self.batch: Batch = make_batch(case, dtype, device.torch_device, has_row_scales=True)
        self._problem, self._device = problem, device
        self.alibi_slopes: Tensor | None = None
        if problem.has_row_terms:
            exponents = torch.arange(1, case.num_q_heads + 1, device=device.torch_device) / -case.num_q_heads
            self.alibi_slopes = torch.exp2(8 * exponents).float()

    def expected(self) -> Tensor:
        """By the reference."""
        batch = self.batch
        return attention(
            batch.q, batch.k_cache, batch.v_cache, cu_seqlens_q=batch.cu_seqlens_q, seq_lens=batch.seq_lens,
            block_table=batch.block_table, k_scale=batch.k_scale, v_scale=batch.v_scale,
            alibi_slopes=self.alibi_slopes, backend="reference",
        )  # fmt: skip

    def call(self, tiles: TileChoice) -> Callable[[], Tensor]:
        """A launch in these tiles, by a plan for as many programs as they leave room for."""
        batch, case, device = self.batch, self.batch.case, self._device
        made = plan(
            np.concatenate([[0], np.cumsum(case.q_lens)]).astype(np.int32), case.kv_lens,
            num_q_heads=case.num_q_heads, num_kv_heads=case.num_kv_heads, head_dim=case.head_dim,
            v_head_dim=case.value_dim, kv_element_bytes=batch.k_cache.element_size(),
            invariant=self._problem.has_one_kind,
            hardware=with_workers(base_hardware(device.capability), device.num_sms, tiles.programs_per_sm),
        )  # fmt: skip
        to = device.torch_device
        words = torch.from_numpy(made.buffer).to(to)
        out = batch.q.new_full((*batch.q.shape[:2], case.value_dim), torch.nan)
        partial_out = torch.empty(made.num_partial_rows, case.value_dim, device=to)
        partial_lse = torch.empty(made.num_partial_rows, device=to)
        tickets = torch.zeros(1 + made.num_merges, dtype=torch.int32, device=to)

        def run() -> Tensor:
            mixed_attention(
                batch.q, batch.k_cache, batch.v_cache, batch.cu_seqlens_q, batch.seq_lens, batch.block_table, words,
                out, None, partial_out, partial_lse, tickets, softmax_scale=case.head_dim**-0.5, causal=True,
                window_left=None, soft_cap=None, alibi_slopes=self.alibi_slopes,
                kv_format=kv_format(batch.k_cache.dtype), k_scale=batch.k_scale, v_scale=batch.v_scale,
                invariant=self._problem.has_one_kind, tiles=tiles,
            )  # fmt: skip
            return out

        return run


def tune(
    problem: TileProblem, tried: list[TileChoice], cases: list[Case], device: Device, launches: int, clock: Clock
) -> ProblemResult:
    """Verifies and times the candidates, of which the first is the one to beat, over the cases."""
    result = ProblemResult()
    by_name = {short(tiles): tiles for tiles in tried}
    for case in cases:
        tuned_batch = TunedBatch(problem, case, device)
        expected = tuned_batch.expected().float()
        bound = TOLERANCE * expected.abs().max().item()
        calls: dict[str, Callable[[], Tensor]] = {}
        for name, tiles in by_name.items():
            if name in result.failed:
                continue
            try:
                calls[name] = tuned_batch.call(tiles)
                difference = (calls[name]().float() - expected).abs().max().item()
            except Exception as error:  # a candidate that does not compile must not end the others
                result.failed[name] = in_words(error)
                continue
            if not difference <= bound:  # NaN is wrong too
                result.failed[name] = f"differs from the reference by {difference:.2g}, more than {bound:.2g}"
        result.timings[case.name] = time_launches(
            {name: call for name, call in calls.items() if name not in result.failed}, launches, clock
        )
    first = short(tried[0])
    running = [name for name in by_name if name not in result.failed]
    if first in result.failed or not cases:
        return result
    best = min(running, key=lambda name: result.relative(name, first))
    if result.relative(best, first) > 1 - LEAST_GAIN:
        best = first
    result.best = TunedChoice(
        Gpu(device.name, device.capability), triton_version(), kernel_hash(), problem, by_name[best],
        {
            case_name: (timings[best].median_us, timings[first].median_us)
            for case_name, timings in result.timings.items()
        },
    )  # fmt: skip
    return result


def records_of(problem: TileProblem, result: ProblemResult, cases: list[Case]) -> list[Record]:
    """One for each candidate and batch that was timed."""
    records = []
    for case in cases:
        scale_bytes = 0 if problem.kv_format is None else 4
        key_bytes = (case.head_dim + case.value_dim) * problem.stored_bits / 8 + 2 * scale_bytes
        per_slice = flops_and_bytes(case, problem.element_bytes, key_bytes)
        for name, timing in result.timings[case.name].items():
            is_best = result.best is not None and short(result.best.tiles) == name
            records.append(
                Record(
                    case.name, name, "bfloat16" if problem.element_bytes == 2 else "float32", timing,
                    bytes=sum(b for _, b in per_slice), flops=sum(f for f, _ in per_slice), share_of_roof=None,
                    extra={"problem": name_of(problem), "is_best": is_best, "triton": triton_version()},
                )
            )  # fmt: skip
    return records


def run_on(
    device: Device,
    chosen: list[TileProblem],
    launches: int,
    clock: Clock,
    file: Path,
    json: Path | None = None,
    cases: Callable[[TileProblem], list[Case]] = cases_of,
    tried: Callable[[TileProblem, tuple[int, int]], list[TileChoice]] = candidates,
) -> int:
    """Tunes the problems one after the other, each written as soon as it is done; 1 if a candidate failed, else 0."""
    if file.exists():
        read_choices(file)  # one that is malformed is found before hours have gone by
    print(f"{device.name}, driver {device.driver}, {device.num_sms} SMs, Triton {triton_version()}; writing {file}")
    has_failed = False
    for problem in chosen:
        try:
            choices = tried(problem, device.capability)
        except NotImplementedError as error:
            print(f"{name_of(problem):24} left out: {error}")
            continue
        result = tune(problem, choices, cases(problem), device, launches, clock)
        append_json(json, records_of(problem, result, cases(problem)), device.where())
        for name, reason in result.failed.items():
            has_failed = True
            print(f"{name_of(problem):24} {name:32} WRONG or failing, not timed: {reason}")
        if result.best is None:
            print(f"{name_of(problem):24} nothing written: the tiles of choose_tiles do not run")
            continue
        write_choices(file, [result.best])
        first, best = short(choices[0]), short(result.best.tiles)
        gain = 1 / result.relative(best, first)
        print(f"{name_of(problem):24} {best:32} {gain:.2f}x as fast as {first}, of {len(choices)}", flush=True)
    return 1 if has_failed else 0


def print_candidates(chosen: list[TileProblem]) -> int:
    """Says that there is no GPU and what would be tried on some; the status of a run without one."""
    print(f"No GPU: torch {torch.__version__} sees none, so nothing is measured and no file is written.")
    for gpu in GPUS:
        for problem in chosen:
            tried = candidates(problem, gpu.capability)
            print(f"{gpu.name}: {name_of(problem)}: {len(tried)} candidates, the first by choose_tiles")
            for tiles in tried:
                print(f"    {short(tiles)}")
    return NO_GPU_STATUS


def main() -> int:
    args_parser = parser(__doc__ or "")
    args_parser.add_argument("--problems", nargs="+", help="only problems whose name starts with one of these")
    args_parser.add_argument("--full", action="store_true", help="every combination of the axes")
    args_parser.add_argument("--launches", type=int, default=50, help="timed launches per candidate and batch, L2 cold")
    args_parser.add_argument("--tiles", type=Path, default=env.tiles_file()[0], help="the file to write")
    args = args_parser.parse_args()
    if args.launches < 1:
        args_parser.error(f"--launches must be >= 1, got {args.launches}")
    prefixes = tuple(args.problems or ("",))
    chosen = [problem for problem in problems(args.full) if name_of(problem).startswith(prefixes)]
    if not chosen:
        known = ", ".join(name_of(problem) for problem in problems(args.full))
        args_parser.error(f"--problems must be among {known}, got {' '.join(args.problems)}")
    device = find_device()
    if device is None:
        return print_candidates(chosen)
    clock = CudaClock(device.torch_device, device.l2_bytes)
    return run_on(device, chosen, args.launches, clock, args.tiles, args.json)


if __name__ == "__main__":
    sys.exit(main())
