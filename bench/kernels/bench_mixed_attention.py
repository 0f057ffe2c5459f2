"""Attention over decode-only, chunk-only and mixed batches, against this machine's measured roof and torch SDPA.

Run ``python -m bench.kernels.bench_mixed_attention``. All candidates take turns in one process. The roof is what this
machine reached, right before the case, at reading memory and at fused multiply-adds in float32; the roof's time of a
batch is, slice by slice, the longer of its bytes at the one and its flops at the other (nothing overlapped). torch's
``scaled_dot_product_attention`` reads no pages: it gets K and V gathered into contiguous tensors beforehand, untimed,
so the ratio leaves the gather out (``--time-gather`` puts it in). Its output is compared with ours before timing.
With ``--kv-dtypes`` K and V are stored as these, quantised ones with a scale per token and head; torch gets them in q's
dtype. Bytes are those that are stored.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import mixattn
from bench.lib.measure import Record, append_json, parser, time_interleaved
from mixattn import _C
from mixattn.config import KV_CACHE_DTYPES
from mixattn.env import num_threads
from mixattn.executor.kv_pool import kv_dtype as stored_dtype
from mixattn.ops.kv_dtypes import QUANTIZED, kv_dtype_name
from mixattn.ops.reference import dequantize_reference, quantize_reference


@dataclass(frozen=True)
class Case:
    """``num_decodes`` decodes at ``decode_kv`` keys each and, if ``chunk`` > 0, one chunk of ``chunk_kv`` keys."""

    name: str
    num_decodes: int
    decode_kv: int
    chunk: int
    chunk_kv: int
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16

    @property
    def q_lens(self) -> list[int]:
        return [1] * self.num_decodes + [self.chunk] * (self.chunk > 0)

    @property
    def kv_lens(self) -> list[int]:
        return [self.decode_kv] * self.num_decodes + [self.chunk_kv] * (self.chunk > 0)


def cases() -> list[Case]:
    """The batches that the README and the records name."""
    return [
        Case("decode-32x4k-hd128-gqa4", 32, 4096, 0, 0),
        Case("decode-1x32k-hd128-gqa4", 1, 32768, 0, 0),
        Case("chunk-512-at-4k-hd128-gqa4", 0, 0, 512, 4096),
        Case("mixed-31x4k-chunk-512-at-4k-hd128-gqa4", 31, 4096, 512, 4096),
        Case("decode-32x1k-hd64-gqa3", 32, 1024, 0, 0, 9, 3, 64),
        Case("mixed-31x1k-chunk-256-at-1k-hd64-gqa3", 31, 1024, 256, 1024, 9, 3, 64),
    ]


def scaling_cases() -> list[Case]:
    """Decodes of 1k to 128k keys, and 1 to 256 of 1k keys: bytes per second should stay what they are."""
    contexts = [Case(f"scaling-1x{kv >> 10}k", 1, kv, 0, 0) for kv in (1 << shift for shift in range(10, 18))]
    sequences = [Case(f"scaling-{count}x1k", count, 1024, 0, 0) for count in (2, 4, 8, 16, 32, 64, 128, 256)]
    return contexts + sequences


def flops_and_bytes(case: Case, element_bytes: int, kv_row_bytes: float) -> list[tuple[int, int]]:
    """Per slice: flops of the visible (row, key) pairs, and bytes of K and V read once plus q and out.

    Args:
        element_bytes: of q and out.
        kv_row_bytes: of one head's row of K or V, its scale included.
    """
    per_slice = []
    for q_len, kv_len in zip(case.q_lens, case.kv_lens, strict=True):
        pairs = sum(kv_len - q_len + row + 1 for row in range(q_len))
        rows_bytes = 2 * q_len * case.num_q_heads * case.head_dim * element_bytes
        kv_bytes = int(2 * kv_len * case.num_kv_heads * kv_row_bytes)
        per_slice.append((4 * pairs * case.num_q_heads * case.head_dim, kv_bytes + rows_bytes))
    return per_slice


def sdpa(case: Case, q: Tensor, k: list[Tensor], v: list[Tensor]) -> Tensor:
    """torch's attention over the same batch; equal decodes go in one call, the chunk in another.

    Args:
        q: [total_q, num_q_heads, head_dim].
        k, v: [decodes stacked: [num_decodes, num_kv_heads, kv_len, head_dim]] and the chunk's, if there is one.
    """
    outs = []
    if case.num_decodes:
        rows = q[: case.num_decodes].unsqueeze(2)  # [num_decodes, num_q_heads, 1, head_dim]
        outs.append(F.scaled_dot_product_attention(rows, k[0], v[0], enable_gqa=True).squeeze(2))
    if case.chunk:
        rows = q[case.num_decodes :].transpose(0, 1).unsqueeze(0)  # [1, num_q_heads, chunk, head_dim]
        mask = torch.ones(case.chunk, case.chunk_kv, dtype=torch.bool).tril(case.chunk_kv - case.chunk)
        out = F.scaled_dot_product_attention(rows, k[-1], v[-1], attn_mask=mask, enable_gqa=True)
        outs.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(outs)


def gather(case: Case, cache: Tensor, block_table: Tensor) -> list[Tensor]:
    """K or V of the batch as torch's operator wants them, copied out of the pages (see ``sdpa``)."""

    def rows(start: int, stop: int, kv_len: int) -> Tensor:
        pages = block_table[start:stop, : -(-kv_len // case.page_size)].long()
        flat = cache[pages].flatten(1, 2)[:, :kv_len]  # [num_seqs, kv_len, num_kv_heads, head_dim]
        return flat.transpose(1, 2).contiguous()

    gathered = [rows(0, case.num_decodes, case.decode_kv)] if case.num_decodes else []
    if case.chunk:
        gathered.append(rows(case.num_decodes, case.num_decodes + 1, case.chunk_kv))
    return gathered


def store(x: Tensor, kv_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Pages of real values as a cache holds them, and their scales [num_pages, page_size, num_kv_heads]."""
    if kv_dtype not in QUANTIZED:
        return x.to(kv_dtype), None
    stored, scales = quantize_reference(x.flatten(0, 1), kv_dtype)
    assert scales is not None
    return stored.unflatten(0, x.shape[:2]), scales.unflatten(0, x.shape[:2])


def run(
    case: Case,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    repeats: int,
    roofs: dict[str, float],
    is_gather_timed: bool,
) -> list[Record]:
    """The records of one case: ours and torch's."""
    generator = torch.Generator().manual_seed(0)
    pages_each = [-(-kv // case.page_size) for kv in case.kv_lens]
    num_pages = sum(pages_each)
    shape = (num_pages, case.page_size, case.num_kv_heads, case.head_dim)
    (k_cache, k_scale), (v_cache, v_scale) = (
        store(torch.randn(shape, generator=generator), kv_dtype) for _ in range(2)
    )
    q = torch.randn(sum(case.q_lens), case.num_q_heads, case.head_dim, generator=generator).to(dtype)
    order = torch.randperm(num_pages, generator=generator).int()
    block_table = torch.zeros(len(pages_each), max(pages_each), dtype=torch.int32)
    for seq_idx, pages in enumerate(order.split(pages_each)):
        block_table[seq_idx, : len(pages)] = pages
    cu_seqlens_q = torch.tensor([0, *case.q_lens]).cumsum(0).int()
    seq_lens = torch.tensor(case.kv_lens, dtype=torch.int32)
    work_plan = mixattn.plan(
        cu_seqlens_q, seq_lens, num_q_heads=case.num_q_heads, num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim, kv_element_bytes=k_cache.element_size(),
    )  # fmt: skip
    out = torch.empty_like(q)

    def ours() -> Tensor:
        return mixattn.attention(
            q, k_cache, v_cache, cu_seqlens_q=cu_seqlens_q, seq_lens=seq_lens, block_table=block_table,
            k_scale=k_scale, v_scale=v_scale, plan=work_plan, out=out,
        )  # fmt: skip

    real_k, real_v = dequantize_reference(k_cache, k_scale).to(dtype), dequantize_reference(v_cache, v_scale).to(dtype)
    k, v = gather(case, real_k, block_table), gather(case, real_v, block_table)

    def torchs() -> Tensor:
        if is_gather_timed:
            return sdpa(case, q, gather(case, real_k, block_table), gather(case, real_v, block_table))
        return sdpa(case, q, k, v)

    torch.testing.assert_close(ours().float(), torchs().float(), atol=2e-2, rtol=2e-2)
    candidates: dict[str, Callable[[], object]] = {"mixattn": ours, "torch-sdpa": torchs}
    timings = time_interleaved(candidates, repeats)
    kv_row_bytes = k_cache.shape[3] * k_cache.element_size() + (0 if k_scale is None else k_scale.element_size())
    per_slice = flops_and_bytes(case, q.element_size(), kv_row_bytes)
    roof_us = sum(max(f / roofs["fma_gflop_s"], b / roofs["read_gb_s"]) for f, b in per_slice) / 1e3
    return [
        Record(
            case.name, name, str(dtype).removeprefix("torch."), timing,
            bytes=sum(b for _, b in per_slice), flops=sum(f for f, _ in per_slice),
            share_of_roof=roof_us / timing.median_us,
            extra={
                "kv_dtype": kv_dtype_name(kv_dtype), "roofs": roofs, "threads": num_threads(),
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


def main() -> None:
    args_parser = parser(__doc__ or "")
    args_parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    args_parser.add_argument(
        "--kv-dtypes",
        nargs="+",
        metavar="NAME",
        default=["auto"],
        choices=KV_CACHE_DTYPES,
        help=f"what K and V are stored as, auto being q's dtype: {', '.join(KV_CACHE_DTYPES)}",
    )
    args_parser.add_argument("--cases", nargs="+", help="only cases whose name starts with one of these")
    args_parser.add_argument("--scaling", action="store_true", help="decodes of 1k to 128k keys, and 1 to 256 of them")
    args_parser.add_argument("--time-gather", action="store_true", help="count torch's gather of the pages as well")
    args = args_parser.parse_args()
    torch.set_num_threads(num_threads())
    print(f"{num_threads()} threads")
    print(
        f"{'case':42} {'dtype':9} {'K and V':13} {'ms':>8} {'p10..p90':>15} {'GB/s':>6} {'GFLOP/s':>8} "
        f"{'of roof':>8} {'vs torch':>9} {'roof: GB/s':>11} {'GFLOP/s':>8}"
    )
    records = []
    chosen = scaling_cases() if args.scaling else cases()
    for dtype_name, kv_name, case in itertools.product(args.dtypes, args.kv_dtypes, chosen):
        if args.cases and not case.name.startswith(tuple(args.cases)):
            continue
        dtype = getattr(torch, dtype_name)
        roofs = _C.measure_roofs(num_threads())
        ours, torchs = run(case, dtype, stored_dtype(kv_name, dtype), args.repeats, roofs, args.time_gather)
        records += [ours, torchs]
        print(table_row(ours, torchs), flush=True)
    append_json(args.json, records)


if __name__ == "__main__":
    main()
