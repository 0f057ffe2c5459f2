"""What the work plans predict for GPUs that need not be there, beside the schedules of other kernels.

Nothing here is measured. ``predicted_us`` is the plan's own cost (csrc/common/cost.h: peak rates of the data sheet and
an assumed overhead per item); ``bound_us`` is schedules.py's roofline, by which all schedules are priced alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from bench.kernels import schedules
from bench.kernels.attention_cases import Case, kind_cases
from mixattn.executor.kv_pool import kv_dtype
from mixattn.ops.kv_dtypes import kv_format
from mixattn.ops.plan import A100, H100, Hardware, WorkPlan, plan, with_workers
from mixattn.triton_kernels.mixed_attention import product_elements
from mixattn.triton_kernels.tiles import TileProblem

Q_DTYPE = torch.bfloat16
KIND_NAMES = ("large", "medium", "small")
"""Of the tile kinds, in the order of work_item.h."""
SCHEDULED_HEAD_DIM = 128
"""What the other kernels' schedules are known for (schedules.py)."""


@dataclass(frozen=True)
class PredictedGpu:
    """A GPU by its data sheet. Args: base: its ``Hardware``, whatever its workers; capability: for the tiles."""

    name: str
    base: Hardware
    num_sms: int
    capability: tuple[int, int]


GPUS = (
    PredictedGpu("H100", H100, schedules.H100_GPU.num_sms, (9, 0)),
    PredictedGpu("A100", A100, schedules.A100_GPU.num_sms, (8, 0)),
)


@dataclass(frozen=True)
class Prediction:
    """Of one batch on one GPU, cut up by one kernel.

    Args:
        predicted_us: ``plan.cost.predicted_s``; None of kernels that have no plan of ours.
        bound_us, imbalance, headroom: of plans, imbalance and headroom are those of ``plan.cost``.
    """

    schedule: str
    predicted_us: float | None
    bound_us: float
    imbalance: float
    headroom: float


@dataclass(frozen=True)
class KindCost:
    """The items of one kind in a plan: their work, and its time at the peak rates of all workers together.

    Args:
        flops, bytes: as in ``PlanCost``; those of all kinds add up to it.
    """

    kind: str
    num_items: int
    flops: int
    bytes: int
    compute_us: float
    memory_us: float

    @property
    def bound(self) -> str:
        return "compute" if self.compute_us > self.memory_us else "memory"


def problem_of(case: Case) -> TileProblem:
    """What the tiles of a case in bfloat16 depend on."""
    stored = kv_dtype(case.kv_dtype, Q_DTYPE)
    element_bytes, stored_bits = product_elements(Q_DTYPE, stored, kv_format(stored))
    return TileProblem(case.head_dim, case.value_dim, element_bytes, stored_bits, kv_format(stored))


def hardware_of(case: Case, base: Hardware, num_sms: int, capability: tuple[int, int]) -> Hardware:
    """The workers of a GPU for a case in bfloat16: as many programs per SM as its tiles let share one."""
    return with_workers(base, num_sms, problem_of(case).choose(capability).programs_per_sm)


def plan_of(case: Case, hardware: Hardware) -> WorkPlan:
    """The plan of a case in bfloat16, K and V as it says."""
    return plan(
        np.concatenate([[0], np.cumsum(case.q_lens)]).astype(np.int32), case.kv_lens, num_q_heads=case.num_q_heads,
        num_kv_heads=case.num_kv_heads, head_dim=case.head_dim, v_head_dim=case.value_dim,
        kv_element_bytes=kv_dtype(case.kv_dtype, Q_DTYPE).itemsize, hardware=hardware,
    )  # fmt: skip


def predict(case: Case, gpu: PredictedGpu) -> list[Prediction]:
    """Ours first; then those of schedules.py that are known for the GPU and the case's head_dim and K and V."""
    slices = list(zip(case.q_lens, case.kv_lens, strict=True))
    element_bytes = kv_dtype(case.kv_dtype, Q_DTYPE).itemsize
    shape = schedules.Shape(case.num_q_heads, case.num_kv_heads, case.head_dim, element_bytes, case.value_dim)
    made = plan_of(case, hardware_of(case, gpu.base, gpu.num_sms, gpu.capability))
    data_sheet = schedules.gpu_of(made.hardware)
    cost = made.cost
    bound = schedules.bound_of(schedules.ours(made), slices, shape, data_sheet)
    found = [Prediction("mixattn", cost.predicted_s * 1e6, bound.bound_us, cost.imbalance, cost.headroom)]
    others: dict[str, schedules.Schedule] = {}
    if case.head_dim == SCHEDULED_HEAD_DIM and case.kv_dtype == "auto":
        if gpu.base is H100:
            others["FA3"] = schedules.flash_attention_3(slices, shape)
            others["vLLM"] = schedules.vllm_unified(slices, shape)
        others["FlashInfer"] = schedules.flashinfer_prefill(slices, shape, data_sheet)
    for name, schedule in others.items():
        bound = schedules.bound_of(schedule, slices, shape, data_sheet)
        found.append(Prediction(name, None, bound.bound_us, bound.imbalance, bound.headroom))
    return found


def kind_costs(made: WorkPlan, case: Case) -> list[KindCost]:
    """The plan's work by item kind, kinds without items left out.

    Source: csrc/common/cost.h, whose integers these are.
    """
    items, hardware = made.items(), made.hardware
    keys = (items["kv_end"] - items["kv_begin"]).astype(np.int64)
    # Row tiles of a slice share its keys, which come from memory once: cost.h's distinct and read.
    distinct, read = (np.zeros(len(case.kv_lens), np.int64) for _ in range(2))
    for seq_idx in range(len(distinct)):
        of_head = (items["seq_idx"] == seq_idx) & (items["kv_head"] == 0) & (keys > 0)
        if of_head.any():
            distinct[seq_idx] = items["kv_end"][of_head].max() - items["kv_begin"][of_head].min()
            read[seq_idx] = keys[of_head].sum()
    shared = distinct[items["seq_idx"]], np.maximum(read, 1)[items["seq_idx"]]
    fetched = np.where(shared[0] == shared[1], keys, keys * shared[0] // shared[1])
    num_rows = items["num_rows"].astype(np.int64)
    granules = np.array(hardware.block_rows, np.int64)[items["kind"]]
    if hardware.row_granule is not None:
        granules = np.full_like(granules, hardware.row_granule)
    dims = case.head_dim + case.value_dim
    flops = 2 * dims * (-(-num_rows // granules) * granules) * keys
    element_bytes = kv_dtype(case.kv_dtype, Q_DTYPE).itemsize
    num_bytes = dims * element_bytes * (fetched + num_rows)
    found = []
    for kind, name in enumerate(KIND_NAMES):
        is_kind = items["kind"] == kind
        if is_kind.any():
            kind_flops, kind_bytes = int(flops[is_kind].sum()), int(num_bytes[is_kind].sum())
            found.append(
                KindCost(
                    name, int(is_kind.sum()), kind_flops, kind_bytes,
                    kind_flops / (hardware.flops_per_s * hardware.num_workers) * 1e6,
                    kind_bytes / (hardware.bytes_per_s * hardware.num_workers) * 1e6,
                )
            )  # fmt: skip
    return found


def table_lines(cases: list[Case]) -> list[str]:
    """The predictions of the cases on every GPU of ``GPUS``, as printed."""
    lines = [
        "PREDICTED, not measured: peak rates of the data sheets and an assumed overhead per item.",
        "predicted us: the plan's own cost; bound us: a roofline of the schedule, all priced alike.",
        f"{'case':46} {'GPU':5} {'schedule':10} {'predicted us':>12} {'bound us':>9} {'/ours':>6} {'headroom':>8} "
        f"{'max/mean':>8}",
    ]
    for gpu in GPUS:
        for case in cases:
            found = predict(case, gpu)
            for one in found:
                predicted = "-" if one.predicted_us is None else f"{one.predicted_us:.1f}"
                lines.append(
                    f"{case.name:46} {gpu.name:5} {one.schedule:10} {predicted:>12} {one.bound_us:9.1f} "
                    f"{one.bound_us / found[0].bound_us:6.2f} {one.headroom:8.2f} {one.imbalance:8.2f}"
                )
    return lines


def kind_lines(case: Case, hardware: Hardware, measured_us: dict[str, float] | None = None) -> list[str]:
    """The roofline of each item kind, from batches that hold that kind alone.

    Args:
        measured_us: by kind, what its batch took; None where nothing was measured.
    """
    lines = [
        f"item kinds, {hardware.name}'s peak rates"
        + ("" if measured_us is None else "; measured on this GPU")
        + (": PREDICTED, not measured" if measured_us is None else ""),
        f"{'batch':52} {'items':>6} {'GFLOP':>8} {'MB':>8} {'bound':>8} {'compute us':>10} {'memory us':>10} "
        f"{'predicted us':>12} {'measured us':>11}",
    ]
    for kind, kind_case in kind_cases(case).items():
        made = plan_of(kind_case, hardware)
        (cost,) = kind_costs(made, kind_case)
        measured = "-" if measured_us is None or kind not in measured_us else f"{measured_us[kind]:.1f}"
        lines.append(
            f"{kind_case.name:52} {cost.num_items:6} {cost.flops / 1e9:8.2f} {cost.bytes / 1e6:8.2f} {cost.bound:>8} "
            f"{cost.compute_us:10.1f} {cost.memory_us:10.1f} {made.cost.predicted_s * 1e6:12.1f} {measured:>11}"
        )
    return lines
