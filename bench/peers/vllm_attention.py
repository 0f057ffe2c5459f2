"""vLLM's paged attention for CPUs, called as its backend calls it, in the environment ``vllm``.

Query, keys and values are drawn as in ``bench.kernels.bench_mixed_attention``: same generator, order and shuffled
pages. Keys and values go into vLLM's cache through its own operator, for its layout is its own. The output is compared
with torch's attention before anything is timed. Pages of 16 tokens are those of the other candidates; 128 is vLLM's
default on CPUs and has its faster kernels.
"""

from __future__ import annotations

import argparse
import os
import time

os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0-1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"

import torch
import torch.nn.functional as F
import vllm._custom_ops as ops
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from bench.peers import drive, workloads

_REFERENCE_PAGE = 16
_TOLERANCE = 2e-2


def rows_of(cache: torch.Tensor, block_table: torch.Tensor, kv_lens: tuple[int, ...]) -> list[torch.Tensor]:
    """[kv_len, num_kv_heads, head_dim] of each sequence, in order, out of shuffled pages."""
    return [cache[pages.long()].flatten(0, 1)[:kv_len] for pages, kv_len in zip(block_table, kv_lens, strict=True)]


def expected(
    q: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor], q_lens: tuple[int, ...]
) -> torch.Tensor:
    """torch's attention, sequence by sequence."""
    outs = []
    for rows, k, v in zip(q.split(list(q_lens)), keys, values, strict=True):
        mask = torch.ones(len(rows), len(k), dtype=torch.bool).tril(len(k) - len(rows))
        out = F.scaled_dot_product_attention(
            rows.transpose(0, 1)[None],
            k.transpose(0, 1)[None],
            v.transpose(0, 1)[None],
            attn_mask=mask,
            enable_gqa=True,
        )
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


def run(
    case: workloads.AttentionCase, dtype: torch.dtype, page_sizes: list[int], repeats: int
) -> list[dict[str, object]]:
    """A row for each page size: the median of ``repeats`` calls."""
    num_q_heads, num_kv_heads, head_dim = workloads.ATTENTION_HEADS
    generator = torch.Generator().manual_seed(0)
    pages_each = [-(-kv_len // _REFERENCE_PAGE) for kv_len in case.kv_lens]
    shape = (sum(pages_each), _REFERENCE_PAGE, num_kv_heads, head_dim)
    k_cache, v_cache = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    q = torch.randn(sum(case.q_lens), num_q_heads, head_dim, generator=generator).to(dtype)
    order = torch.randperm(shape[0], generator=generator).int()
    block_table = torch.zeros(len(pages_each), max(pages_each), dtype=torch.int32)
    for idx, pages in enumerate(order.split(pages_each)):
        block_table[idx, : len(pages)] = pages
    keys, values = (rows_of(cache, block_table, case.kv_lens) for cache in (k_cache, v_cache))
    del k_cache, v_cache
    wanted = expected(q, keys, values, case.q_lens)
    cu_seqlens_q = torch.tensor([0, *case.q_lens]).cumsum(0).int()
    seq_lens = torch.tensor(case.kv_lens, dtype=torch.int32)
    found = []
    for page_size in page_sizes:
        isa = _get_attn_isa(dtype, page_size, head_dim)
        pages_each = [-(-kv_len // page_size) for kv_len in case.kv_lens]
        cache = torch.zeros(sum(pages_each), num_kv_heads, 2 * page_size, head_dim, dtype=dtype)
        k_pages, v_pages = cache.chunk(2, dim=2)
        table = torch.zeros(len(pages_each), max(pages_each), dtype=torch.int32)
        for idx, pages in enumerate(torch.randperm(sum(pages_each), generator=generator).int().split(pages_each)):
            table[idx, : len(pages)] = pages
            positions = torch.arange(case.kv_lens[idx])
            slots = pages.long()[positions // page_size] * page_size + positions % page_size
            ops.cpu_attn_reshape_and_cache(keys[idx], values[idx], k_pages, v_pages, slots, isa)
        # Made once per step and shared by its layers, as mixattn's plan is: not timed.
        metadata = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(case.q_lens), num_heads=num_q_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
            seq_lens=seq_lens, dtype=dtype, query_start_loc=cu_seqlens_q, causal=True, sliding_window_size=-1, isa=isa,
            enable_kv_split=True,
        )  # fmt: skip
        out = torch.empty_like(q)
        times_s = []
        for _ in range(repeats + 1):
            start_s = time.perf_counter()
            ops.cpu_attention_with_kv_cache(
                q, k_pages, v_pages, out, cu_seqlens_q, seq_lens, head_dim**-0.5, True, None, -1, table, 0.0, metadata,
                None,
            )  # fmt: skip
            times_s.append(time.perf_counter() - start_s)
        torch.testing.assert_close(out.float(), wanted.float(), atol=_TOLERANCE, rtol=_TOLERANCE)
        median_s = sorted(times_s[1:])[repeats // 2]
        name = str(dtype).removeprefix("torch.")
        found.append(drive.row(case.name, median_s, backend=f"vllm-page{page_size}", dtype=name, isa=isa))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--page-sizes", type=int, nargs="+", default=[16, 128])
    args = parser.parse_args()
    torch.set_num_threads(workloads.NUM_THREADS)
    current_platform.import_kernels()
    for dtype in workloads.ATTENTION_DTYPES:
        for case in workloads.attention_cases():
            for fields in run(case, getattr(torch, dtype), args.page_sizes, args.repeats):
                drive.emit(fields)


if __name__ == "__main__":
    main()
