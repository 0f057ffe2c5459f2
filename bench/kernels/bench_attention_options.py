"""What attention's options cost, and what groups of slices that share a prefix win, in turns in one process.

Run ``python -m bench.kernels.bench_attention_options``. Prints the ratio of medians to the plain call on the same
batch; 1.00 is free.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import mixattn
from bench.kernels.attention_cases import Case, flops_and_bytes
from bench.lib.measure import Record, append_json, parser, time_interleaved
from mixattn.env import num_threads

TREE_ROWS = 8
"""Rows of a speculative verification: a chain of 4 drafted tokens with a second choice at each but the last."""
TREE_PARENTS = (None, 0, 0, 1, 1, 3, 3, 5)


@dataclass(frozen=True)
class PrefixCase(Case):
    """Decodes that share their first ``decode_kv`` keys, in the same pages, and have 128 to 512 keys of their own."""

    @property
    def kv_lens(self) -> list[int]:
        last = max(self.num_decodes - 1, 1)
        return [self.decode_kv + 128 + 384 * i // last for i in range(self.num_decodes)]

    @property
    def num_shared_pages(self) -> int:
        return self.decode_kv // self.page_size


def cases() -> list[Case]:
    """Decodes, verifications of a draft tree (each a slice of 8 rows), a chunk, decodes beside a chunk, a prefix."""
    return [
        Case("decode-16x4k-hd128-gqa4", 16, 4096, 0, 0),
        Case("verify-16x2k-hd128-gqa4", 16, 2048, 0, 0, decode_q=TREE_ROWS),
        Case("chunk-512-at-4k-hd128-gqa4", 0, 0, 512, 4096),
        Case("mixed-31x1k-chunk-256-at-1k-hd64-gqa3", 31, 1024, 256, 1024, 9, 3, 64),
        PrefixCase("prefix-32x4k-own-128..512-hd128-gqa4", 32, 4096, 0, 0),
        PrefixCase("prefix-4x4k-own-128..512-hd128-gqa4", 4, 4096, 0, 0),
    ]


def candidates(case: Case, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """The call of each option, by name; "plain" first. A prefix is known to the plan of "groups" alone."""
    q_lens = case.q_lens
    generator = torch.Generator().manual_seed(0)
    pages_each = [-(-kv_len // case.page_size) for kv_len in case.kv_lens]
    shape = (2, sum(pages_each), case.page_size, case.num_kv_heads, case.head_dim)
    caches = torch.randn(shape, generator=generator).to(dtype)
    q = torch.randn(sum(q_lens), case.num_q_heads, case.head_dim, generator=generator).to(dtype)
    block_table = torch.zeros(len(pages_each), max(pages_each), dtype=torch.int32)
    for seq_idx, pages in enumerate(torch.randperm(sum(pages_each), generator=generator).int().split(pages_each)):
        block_table[seq_idx, : len(pages)] = pages
    if isinstance(case, PrefixCase):
        block_table[1:, : case.num_shared_pages] = block_table[0, : case.num_shared_pages]
    cu_seqlens_q = torch.tensor([0, *q_lens]).cumsum(0).int()
    seq_lens = torch.tensor(case.kv_lens, dtype=torch.int32)
    out = torch.empty_like(q)

    def call(*, has_groups: bool = False, **options: Any) -> Callable[[], Tensor]:
        plan = mixattn.plan(
            cu_seqlens_q, seq_lens, num_q_heads=case.num_q_heads, num_kv_heads=case.num_kv_heads,
            head_dim=case.head_dim, dtype=str(dtype).removeprefix("torch."),
            invariant=options.get("invariant", False), block_table=block_table if has_groups else None,
            page_size=case.page_size if has_groups else None,
        )  # fmt: skip
        return lambda: mixattn.attention(
            q, *caches, cu_seqlens_q=cu_seqlens_q, seq_lens=seq_lens, block_table=block_table, plan=plan, out=out,
            **options,
        )  # fmt: skip

    if isinstance(case, PrefixCase):
        return {"plain": call(), "groups": call(has_groups=True)}
    words = [mixattn.tree_mask(TREE_PARENTS) if q_len == TREE_ROWS else -torch.ones(q_len).long() for q_len in q_lens]
    return {
        "plain": call(),
        "alibi": call(alibi_slopes=torch.full((case.num_q_heads,), 0.01)),
        "sinks": call(sinks=torch.zeros(case.num_q_heads)),
        "tree-mask": call(tree_mask=torch.cat(words)),
        "invariant": call(invariant=True),
    }


def main() -> None:
    args_parser = parser(__doc__ or "")
    args_parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    args = args_parser.parse_args()
    records = []
    for dtype_name in args.dtypes:
        for case in cases():
            timings = time_interleaved(candidates(case, getattr(torch, dtype_name)), args.repeats)
            plain_us = timings["plain"].median_us
            ratios = ", ".join(f"{name} {timing.median_us / plain_us:.2f}" for name, timing in timings.items())
            print(f"{case.name:40} {dtype_name:9} {plain_us / 1e3:8.2f} ms: {ratios}", flush=True)
            element_bytes = getattr(torch, dtype_name).itemsize
            per_slice = flops_and_bytes(case, element_bytes, 2 * case.head_dim * element_bytes)
            records += [
                Record(
                    case.name, name, dtype_name, timing, bytes=sum(b for _, b in per_slice),
                    flops=sum(f for f, _ in per_slice), share_of_roof=None, extra={"threads": num_threads()},
                )
                for name, timing in timings.items()
            ]  # fmt: skip
    append_json(args.json, records)


if __name__ == "__main__":
    main()
