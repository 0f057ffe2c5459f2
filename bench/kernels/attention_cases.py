"""The batches of the attention benchmarks: their lengths, their tensors, and the work that is in them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mixattn.executor.kv_pool import kv_dtype
from mixattn.ops.kv_dtypes import QUANTIZED
from mixattn.ops.reference import dequantize_reference, quantize_reference


@dataclass(frozen=True)
class Case:
    """``num_decodes`` decodes at ``decode_kv`` keys each and, if ``chunk`` > 0, one chunk of ``chunk_kv`` keys.

    Args:
        kv_dtype: what K and V are stored as, one of ``KV_CACHE_DTYPES``.
        decode_q: rows of each decode: 1, or more as in speculative verification.
        v_head_dim: None is head_dim.
    """

    name: str
    num_decodes: int
    decode_kv: int
    chunk: int
    chunk_kv: int
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    kv_dtype: str = "auto"
    decode_q: int = 1
    v_head_dim: int | None = None

    @property
    def value_dim(self) -> int:
        return self.head_dim if self.v_head_dim is None else self.v_head_dim

    @property
    def q_lens(self) -> list[int]:
        return [self.decode_q] * self.num_decodes + [self.chunk] * (self.chunk > 0)

    @property
    def kv_lens(self) -> list[int]:
        return [self.decode_kv] * self.num_decodes + [self.chunk_kv] * (self.chunk > 0)

    @property
    def group_size(self) -> int:
        return self.num_q_heads // self.num_kv_heads

    @property
    def num_decode_rows(self) -> int:
        return self.num_decodes * self.decode_q

    @property
    def parts(self) -> list[Case]:
        """The decodes and the chunk, each alone; none of a case that has only one of them."""
        if not self.num_decodes or not self.chunk:
            return []
        return [
            replace(self, name=f"{self.name}/decodes", chunk=0, chunk_kv=0),
            replace(self, name=f"{self.name}/chunk", num_decodes=0, decode_kv=0),
        ]


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


SWEEP_CHUNKS = (128, 256, 512, 1024, 2048, 4096)
SWEEP_DECODES = (1, 4, 16, 32, 64, 128, 256)
SWEEP_CONTEXTS = (1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 17)
SWEEP_HEAD_DIMS = (64, 128, 256)
SWEEP_GROUP_SIZES = (1, 4, 8)
SWEEP_KV_DTYPES = ("auto", "fp8_e4m3")
SWEEP_Q_HEADS = 32
SPLIT_HEADS = Case("mixed-32x4k-chunk-512-hd192-v128-mha", 32, 4096, 512, 4096, 32, 32, 192, v_head_dim=128)
"""Heads as DeepSeek V2 and V3 have them before they are absorbed."""
CENTRE = (512, 32, 1 << 12, 128, 4, "auto")
"""Chunk, decodes, context, head_dim, group size and K and V: where all axes of the short sweep cross."""


def sweep_case(
    chunk: int, num_decodes: int, context: int, head_dim: int, group_size: int, kv_cache_dtype: str
) -> Case | None:
    """A chunk that ends at ``context`` keys beside decodes of as many; None if the chunk is longer than that."""
    if chunk > context:
        return None
    suffix = "" if kv_cache_dtype == "auto" else f"-{kv_cache_dtype}"
    return Case(
        f"mixed-{num_decodes}x{context >> 10}k-chunk-{chunk}-hd{head_dim}-gqa{group_size}{suffix}",
        num_decodes,
        context,
        chunk,
        context,
        SWEEP_Q_HEADS,
        SWEEP_Q_HEADS // group_size,
        head_dim,
        kv_dtype=kv_cache_dtype,
    )


def sweep(is_full: bool) -> list[Case]:
    """The mixed batches of a GPU's sweep: each axis alone through ``CENTRE``, which is first, or all combinations; then
    ``SPLIT_HEADS``."""
    axes = (
        SWEEP_CHUNKS, SWEEP_DECODES, SWEEP_CONTEXTS, SWEEP_HEAD_DIMS, SWEEP_GROUP_SIZES, SWEEP_KV_DTYPES,
    )  # fmt: skip
    if is_full:
        points = list(itertools.product(*axes))
    else:
        points = [CENTRE, *((*CENTRE[:i], value, *CENTRE[i + 1 :]) for i, axis in enumerate(axes) for value in axis)]
    made = (sweep_case(*point) for point in dict.fromkeys(points))
    return [*(case for case in made if case is not None), SPLIT_HEADS]


def kind_cases(case: Case) -> dict[str, Case]:
    """By item kind, a batch of the case's heads whose work items are all of that kind.

    large: its chunk, or one of 512 rows; medium: slices of 64 packed rows; small: its decodes, or 32.
    """
    chunk, chunk_kv = (case.chunk, case.chunk_kv) if case.chunk else (512, max(512, case.decode_kv))
    num_decodes, decode_kv = (case.num_decodes, case.decode_kv) if case.num_decodes else (32, chunk_kv)
    medium_q = max(1, 64 // case.group_size)
    alone = replace(case, num_decodes=0, decode_kv=0, chunk=0, chunk_kv=0)
    return {
        "large": replace(alone, name=f"{case.name}/large", chunk=chunk, chunk_kv=chunk_kv),
        "medium": replace(
            alone, name=f"{case.name}/medium", num_decodes=num_decodes, decode_kv=decode_kv, decode_q=medium_q
        ),
        "small": replace(alone, name=f"{case.name}/small", num_decodes=num_decodes, decode_kv=decode_kv),
    }


def flops_and_bytes(case: Case, element_bytes: int, key_bytes: float) -> list[tuple[int, int]]:
    """Per slice: flops of the visible (row, key) pairs, and bytes of K and V read once plus q and out.

    Args:
        element_bytes: of q and out.
        key_bytes: of a key's K and V in one head, their scales included.
    """
    per_slice = []
    for q_len, kv_len in zip(case.q_lens, case.kv_lens, strict=True):
        pairs = sum(kv_len - q_len + row + 1 for row in range(q_len))
        dims = case.head_dim + case.value_dim
        rows_bytes = q_len * case.num_q_heads * dims * element_bytes
        kv_bytes = int(kv_len * case.num_kv_heads * key_bytes)
        per_slice.append((2 * pairs * case.num_q_heads * dims, kv_bytes + rows_bytes))
    return per_slice


@dataclass(frozen=True)
class Batch:
    """A case's tensors on one device, its pages shuffled; as ``mixattn.attention`` takes them."""

    case: Case
    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None
    cu_seqlens_q: Tensor
    seq_lens: Tensor
    block_table: Tensor

    @property
    def key_bytes(self) -> int:
        """Of a key's K and V in one head, their scales included."""
        scale_bytes = 0 if self.k_scale is None else self.k_scale.element_size()
        return sum(cache.shape[3] * cache.element_size() + scale_bytes for cache in (self.k_cache, self.v_cache))

    def real_caches(self) -> tuple[Tensor, Tensor]:
        """K and V in q's dtype."""
        if self.k_cache.dtype == self.q.dtype:
            return self.k_cache, self.v_cache
        if self.k_scale is None and self.k_cache.dtype in QUANTIZED:  # float8 whose scale is 1
            return self.k_cache.to(self.q.dtype), self.v_cache.to(self.q.dtype)
        pairs = ((self.k_cache, self.k_scale), (self.v_cache, self.v_scale))
        k, v = (dequantize_reference(cache, scale).to(self.q.dtype) for cache, scale in pairs)
        return k, v


def cache_bytes(case: Case, dtype: torch.dtype) -> int:
    """Bytes of K and V of the case, without scales."""
    num_rows = sum(-(-kv // case.page_size) for kv in case.kv_lens) * case.page_size * case.num_kv_heads
    return num_rows * (case.head_dim + case.value_dim) * kv_dtype(case.kv_dtype, dtype).itemsize


def make_batch(case: Case, dtype: torch.dtype, device: torch.device, *, has_row_scales: bool | None = None) -> Batch:
    """The case's tensors, the same on every call on one kind of device.

    Args:
        has_row_scales: whether quantised K and V get a scale per token and head. None: on a CPU; on a GPU they are
            float8 and have none, which is a scale of 1: that is what all kernels compared there can take.
    """
    generator = torch.Generator(device).manual_seed(0)
    is_cpu = device.type == "cpu"
    pages_each = [-(-kv // case.page_size) for kv in case.kv_lens]
    num_pages = sum(pages_each)
    rows = (num_pages, case.page_size, case.num_kv_heads)
    stored = kv_dtype(case.kv_dtype, dtype)

    def draw(*size: int) -> Tensor:
        # A GPU's memory may hold no second cache in float32.
        drawn_dtype = torch.float32 if is_cpu else dtype
        return torch.randn(size, generator=generator, device=device, dtype=drawn_dtype)

    is_scaled = is_cpu if has_row_scales is None else has_row_scales
    (k_cache, k_scale), (v_cache, v_scale) = (
        store(draw(*rows, width), stored, has_row_scales=is_scaled) for width in (case.head_dim, case.value_dim)
    )
    q = draw(sum(case.q_lens), case.num_q_heads, case.head_dim).to(dtype)
    order = torch.randperm(num_pages, generator=generator, device=device).int()
    block_table = torch.zeros(len(pages_each), max(pages_each), dtype=torch.int32, device=device)
    for seq_idx, pages in enumerate(order.split(pages_each)):
        block_table[seq_idx, : len(pages)] = pages
    cu_seqlens_q = torch.tensor([0, *case.q_lens], device=device).cumsum(0).int()
    seq_lens = torch.tensor(case.kv_lens, dtype=torch.int32, device=device)
    return Batch(case, q, k_cache, v_cache, k_scale, v_scale, cu_seqlens_q, seq_lens, block_table)


def store(x: Tensor, stored: torch.dtype, has_row_scales: bool) -> tuple[Tensor, Tensor | None]:
    """Pages of real values as a cache holds them, and their scales [num_pages, page_size, num_kv_heads]."""
    if stored not in QUANTIZED or not has_row_scales:
        return x.to(stored), None
    quantized, scales = quantize_reference(x.flatten(0, 1), stored)
    assert scales is not None
    return quantized.unflatten(0, x.shape[:2]), scales.unflatten(0, x.shape[:2])
