"""Attention over decode-only, chunk-only and mixed batches, against this machine's measured roof and torch SDPA.

Run ``python -m bench.kernels.bench_mixed_attention``. All candidates take turns in one process. The roof is what this
machine reached, right before the case, at reading memory and at fused multiply-adds in float32; the roof's time of a
batch is, slice by slice, the longer of its bytes at the one and its flops at the other (nothing overlapped). torch's
``scaled_dot_product_attention`` reads no pages: it gets K and V gathered into contiguous tensors beforehand, untimed,
so the ratio leaves the gather out (``--time-gather`` puts it in). Its output is compared with ours before timing.
With ``--kv-dtypes`` K and V are stored as these, quantised ones with a scale per token and head; torch gets them in q's
dtype. Bytes are those that are stored.

``--backend triton`` or ``cuda`` (or both) times a GPU instead, with other batches and beside other libraries: see
gpu_attention.py. The default is the CPU on every machine, so that one command makes one kind of record.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import mixattn
from bench.kernels import gpu_attention
from bench.kernels.attention_cases import Case, cases, flops_and_bytes, make_batch, scaling_cases, sweep
from bench.kernels.attention_peers import DEFAULT_PEERS, PEERS, gather, sdpa
from bench.lib.measure import Record, append_json, parser, time_interleaved
from mixattn import _C
from mixattn.config import KV_CACHE_DTYPES
from mixattn.env import num_threads
from mixattn.ops.kv_dtypes import kv_dtype_name


def run(
    case: Case,
    dtype: torch.dtype,
    repeats: int,
    roofs: dict[str, float],
    is_gather_timed: bool,
) -> list[Record]:
    """The records of one case: ours and torch's."""
    batch = make_batch(case, dtype, torch.device("cpu"))
    work_plan = mixattn.plan(
        batch.cu_seqlens_q, batch.seq_lens, num_q_heads=case.num_q_heads, num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim, v_head_dim=case.value_dim, kv_element_bytes=batch.k_cache.element_size(),
    )  # fmt: skip
    out = batch.q.new_empty((*batch.q.shape[:2], case.value_dim))

    def ours() -> Tensor:
        return mixattn.attention(
            batch.q, batch.k_cache, batch.v_cache, cu_seqlens_q=batch.cu_seqlens_q, seq_lens=batch.seq_lens,
            block_table=batch.block_table, k_scale=batch.k_scale, v_scale=batch.v_scale, plan=work_plan, out=out,
        )  # fmt: skip

    caches = batch.real_caches()
    k, v = (gather(case, cache, batch.block_table) for cache in caches)

    def torchs() -> Tensor:
        if is_gather_timed:
            return sdpa(case, batch.q, *(gather(case, cache, batch.block_table) for cache in caches))
        return sdpa(case, batch.q, k, v)

    torch.testing.assert_close(ours().float(), torchs().float(), atol=2e-2, rtol=2e-2)
    candidates: dict[str, Callable[[], object]] = {"mixattn": ours, "torch-sdpa": torchs}
    timings = time_interleaved(candidates, repeats)
    per_slice = flops_and_bytes(case, batch.q.element_size(), batch.key_bytes)
    roof_us = sum(max(f / roofs["fma_gflop_s"], b / roofs["read_gb_s"]) for f, b in per_slice) / 1e3
    return [
        Record(
            case.name, name, str(dtype).removeprefix("torch."), timing,
            bytes=sum(b for _, b in per_slice), flops=sum(f for f, _ in per_slice),
            share_of_roof=roof_us / timing.median_us,
            extra={
                "kv_dtype": kv_dtype_name(batch.k_cache.dtype), "roofs": roofs, "threads": num_threads(),
                "is_gather_timed": is_gather_timed,
            },
        )
        for name, timing in timings.items()
    ]  # fmt: skip


def table_row(ours: Record, torchs: Record) -> str:
    """One line of the printed table."""
    t = ours.timing
    return (
        f"{ours.case:42} {ours.dtype:9} {ours.extra['kv_dtype']:13} "
        f"{t.median_us / 1e3:8.2f} {t.p10_us / 1e3:6.2f}..{t.p90_us / 1e3:<7.2f} "
        f"{ours.bytes / t.median_us / 1e3:6.1f} {ours.flops / t.median_us / 1e3:8.0f} "
        f"{ours.share_of_roof or 0.0:8.2f} {torchs.timing.median_us / t.median_us:8.2f}x "
        f"{ours.extra['roofs']['read_gb_s']:11.1f} {ours.extra['roofs']['fma_gflop_s']:8.0f}"
    )


def main() -> int:
    args_parser = parser(__doc__ or "")
    args_parser.add_argument("--backend", nargs="+", choices=("cpu", "triton", "cuda"), default=["cpu"])
    args_parser.add_argument("--cases", nargs="+", help="only cases whose name starts with one of these")
    cpu = args_parser.add_argument_group("with --backend cpu")
    cpu.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    cpu.add_argument(
        "--kv-dtypes",
        nargs="+",
        metavar="NAME",
        default=["auto"],
        choices=KV_CACHE_DTYPES,
        help=f"what K and V are stored as, auto being q's dtype: {', '.join(KV_CACHE_DTYPES)}",
    )
    cpu.add_argument("--scaling", action="store_true", help="decodes of 1k to 128k keys, and 1 to 256 of them")
    cpu.add_argument("--time-gather", action="store_true", help="count torch's gather of the pages as well")
    gpu = args_parser.add_argument_group("with --backend triton or cuda")
    gpu.add_argument("--full", action="store_true", help="every combination of the axes, hours instead of minutes")
    gpu.add_argument("--peers", nargs="*", choices=PEERS, default=DEFAULT_PEERS, help="to compare with, if installed")
    gpu.add_argument("--launches", type=int, default=50, help="timed launches per candidate, L2 cold")
    gpu.add_argument("--profile", metavar="CASE", help="launch one case in NVTX ranges named as the candidates are")
    args = args_parser.parse_args()
    if args.backend == ["cpu"]:
        run_cpu(
            _chosen(scaling_cases() if args.scaling else cases(), args.cases), args.dtypes, args.kv_dtypes,
            args.repeats, args.time_gather, args.json,
        )  # fmt: skip
        return 0
    if "cpu" in args.backend:
        args_parser.error("--backend must be cpu alone or of triton and cuda: a CPU's batches are others")
    if args.launches < 1:
        args_parser.error(f"--launches must be >= 1, got {args.launches}")
    options = gpu_attention.Options(tuple(args.backend), tuple(args.peers), args.launches, args.json)
    return gpu_attention.main(options, _chosen(sweep(args.full), args.cases), args.profile)


def _chosen(of: list[Case], prefixes: list[str] | None) -> list[Case]:
    return [case for case in of if not prefixes or case.name.startswith(tuple(prefixes))]


def run_cpu(
    chosen: list[Case],
    dtypes: list[str],
    kv_dtypes: list[str],
    repeats: int,
    is_gather_timed: bool,
    json: Path | None,
) -> None:
    """Times the cases in every dtype and prints a line for each."""
    torch.set_num_threads(num_threads())
    print(f"{num_threads()} threads")
    print(
        f"{'case':42} {'dtype':9} {'K and V':13} {'ms':>8} {'p10..p90':>15} {'GB/s':>6} {'GFLOP/s':>8} "
        f"{'of roof':>8} {'vs torch':>9} {'roof: GB/s':>11} {'GFLOP/s':>8}"
    )
    records = []
    for dtype_name, kv_name, case in itertools.product(dtypes, kv_dtypes, chosen):
        roofs = _C.measure_roofs(num_threads())
        dtype = getattr(torch, dtype_name)
        ours, torchs = run(replace(case, kv_dtype=kv_name), dtype, repeats, roofs, is_gather_timed)
        records += [ours, torchs]
        print(table_row(ours, torchs), flush=True)
    append_json(json, records)


if __name__ == "__main__":
    sys.exit(main())
