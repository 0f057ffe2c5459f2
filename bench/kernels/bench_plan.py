"""Planning a step on the host: how long it takes, and, over traces, how good the plans are.

``python -m bench.kernels.bench_plan`` times the door ``mixattn.plan`` and the compiled planner inside it. A batch is
one prefill chunk beside decodes of random lengths. Input is int32 numpy, as the executor has it; caches are hot, for
a step plans what it has just scheduled.

``python -m bench.kernels.bench_plan --traces FILE...`` times nothing: it runs each trace's requests through the
scheduler, cuts every step up as mixattn and as others do (schedules.py), and prints, per trace and schedule, the
medians over the steps of the bound on an H100, the most loaded SM over the mean, empty CTAs, bytes of partial results
and rows merged from them. A bound is a roofline of the work as it was cut, no measurement.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bench.kernels import schedules, trace_batches
from bench.lib.measure import Record, append_json, parser, time_interleaved
from mixattn import _C
from mixattn.ops.plan import H100, Hardware, WorkPlan, cpu_hardware, plan

BUDGET_TOKENS, MAX_NUM_SEQS, MAX_MODEL_LEN = 512, 64, 131_072
"""Of the scheduler that traces run through."""
WARMUP_STEPS = 300
"""Until the batch is full of decodes of mixed ages."""


@dataclass(frozen=True)
class Case:
    """``num_slices`` slices: a chunk of 512 rows and decodes, at 512 to 8191 keys; 32 query and 8 kv heads of 128."""

    num_slices: int
    hardware: Hardware

    @property
    def name(self) -> str:
        return f"plan-{self.num_slices}-slices-{self.hardware.name}"

    def lengths(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """cu_seqlens_q and seq_lens; the same on every call."""
        q_lens = np.array([512] + [1] * (self.num_slices - 1))
        seq_lens = np.random.default_rng(0).integers(512, 8192, self.num_slices, dtype=np.int32)
        return np.concatenate([[0], q_lens.cumsum()]).astype(np.int32), seq_lens


def cases() -> list[Case]:
    return [Case(num_slices, hardware) for hardware in (cpu_hardware(), H100) for num_slices in (64, 256, 1024)]


def run(case: Case, repeats: int) -> list[Record]:
    """The records of one case: through the door, and the compiled planner alone."""
    cu_seqlens_q, seq_lens = case.lengths()

    def door() -> WorkPlan:
        return plan(
            cu_seqlens_q, seq_lens, num_q_heads=32, num_kv_heads=8, head_dim=128, dtype="bfloat16",
            hardware=case.hardware,
        )  # fmt: skip

    made = door()
    capacities = made.buffer[6:8].tolist()
    words = made.buffer.copy()
    addresses = cu_seqlens_q.ctypes.data, seq_lens.ctypes.data, case.num_slices, words.ctypes.data

    def native() -> None:
        _C.plan(made.spec, *addresses, *capacities)

    native()
    assert (words == made.buffer)[: _C.PLAN_HEADER_WORDS + made.num_items * _C.WORK_ITEM_WORDS].all()
    timings = time_interleaved({"door": door, "native": native}, repeats)
    return [
        Record(
            case.name, name, "int32", timing, bytes=words.nbytes, flops=0, share_of_roof=None,
            extra={"num_items": made.num_items, "num_merges": made.num_merges},
        )
        for name, timing in timings.items()
    ]  # fmt: skip


def compare_schedules(path: Path, num_steps: int) -> dict[str, dict[str, float]]:
    """By schedule: medians over the steps of a trace, and of each step's bound over that of mixattn."""
    shape = schedules.Shape()
    columns: dict[str, dict[str, list[float]]] = {}
    steps = trace_batches.batches(
        path, num_steps=num_steps, warmup_steps=WARMUP_STEPS, budget_tokens=BUDGET_TOKENS, max_num_seqs=MAX_NUM_SEQS,
        max_model_len=MAX_MODEL_LEN,
    )  # fmt: skip
    for slices in steps:
        starts = np.concatenate([[0], np.cumsum([q_len for q_len, _ in slices])]).astype(np.int32)
        made = plan(
            starts, [kv_len for _, kv_len in slices], num_q_heads=shape.num_q_heads, num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim, dtype="bfloat16", hardware=H100,
        )  # fmt: skip
        cuts = {
            "mixattn": schedules.ours(made),
            "FA3": schedules.flash_attention_3(slices, shape),
            "FlashInfer": schedules.flashinfer_prefill(slices, shape),
            "vLLM": schedules.vllm_unified(slices, shape),
        }
        ours_us = schedules.bound_of(cuts["mixattn"], slices, shape).bound_us
        for name, cut in cuts.items():
            bound = schedules.bound_of(cut, slices, shape)
            values = {
                "bound_us": bound.bound_us,
                "over_mixattn": bound.bound_us / ours_us,
                "max_over_mean": bound.imbalance,
                "num_empty": cut.num_empty,
                "partial_bytes": cut.num_partial_rows * schedules.partial_row_bytes(shape),
                "merge_rows": cut.num_merge_rows,
            }
            for column, value in values.items():
                columns.setdefault(name, {}).setdefault(column, []).append(value)
    return {name: {column: float(np.median(values)) for column, values in of.items()} for name, of in columns.items()}


def print_schedules(paths: list[Path], num_steps: int) -> None:
    print(f"{'trace':44} {'schedule':10} {'bound us':>9} {'/ours':>6} {'max/mean':>8} {'empty':>7} {'partial MB':>10} "
          f"{'merge rows':>10}")  # fmt: skip
    for path in paths:
        for name, of in compare_schedules(path, num_steps).items():
            print(
                f"{path.name[:44]:44} {name:10} {of['bound_us']:9.1f} {of['over_mixattn']:6.2f} "
                f"{of['max_over_mean']:8.2f} {of['num_empty']:7.0f} {of['partial_bytes'] / 1e6:10.2f} "
                f"{of['merge_rows']:10.0f}"
            )


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--traces", nargs="+", type=Path, help="files of requests; compares schedules over them")
    arguments.add_argument("--steps", type=int, default=200, help="steps of each trace")
    args = arguments.parse_args()
    if args.traces:
        print_schedules(args.traces, args.steps)
        return
    print(f"{'case':28} {'items':>6} {'merges':>6} {'door us':>9} {'p10..p90':>15} {'native us':>9}")
    records = []
    for case in cases():
        door, native = run(case, args.repeats)
        records += [door, native]
        t = door.timing
        print(
            f"{case.name:28} {door.extra['num_items']:6} {door.extra['num_merges']:6} {t.median_us:9.1f} "
            f"{t.p10_us:7.1f}..{t.p90_us:<6.1f} {native.timing.median_us:9.1f}"
        )
    append_json(args.json, records)


if __name__ == "__main__":
    main()
