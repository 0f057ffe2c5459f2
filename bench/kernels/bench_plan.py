"""Planning a step on the host: the door ``mixattn.plan`` and the compiled planner inside it.

Run ``python -m bench.kernels.bench_plan``. A batch is one prefill chunk beside decodes of random lengths. Input
is int32 numpy, as the executor has it; caches are hot, because a step plans what it has just scheduled.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bench.lib.measure import Record, append_json, parser, time_interleaved
from mixattn import _C
from mixattn.ops.plan import H100, Hardware, WorkPlan, cpu_hardware, plan


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


def main() -> None:
    args = parser(__doc__ or "").parse_args()
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
