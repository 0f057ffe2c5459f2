"""A batch as FlashInfer plans it: page tables in compressed rows, planned once, run by every layer."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mixattn.ops.attention import attention, device_hardware
from mixattn.ops.plan import WorkPlan, plan

LOG2_E = math.log2(math.e)
"""Natural logarithms times this are FlashInfer's, of base 2."""

PagedKVCache = Tensor | tuple[Tensor, Tensor]
"""[num_pages, 2, page_size, num_kv_heads, head_dim] of keys and values, or a pair without the 2."""

TREE_MASK_BITS = 64


@dataclass(frozen=True)
class PagedBatch:
    """What ``plan`` keeps for ``run``.

    Args:
        cu_seqlens_q, seq_lens, block_table, tree_mask: as ``mixattn.attention`` takes them, on the device of the run.
        host_starts, host_lens: the former two on the CPU, for plans.
        q_dtype, kv_dtype: what the tensors must be held in.
        softmax_scale, soft_cap, causal, window_left: as ``mixattn.attention`` takes them.
    """

    cu_seqlens_q: Tensor
    seq_lens: Tensor
    block_table: Tensor
    tree_mask: Tensor | None
    host_starts: Tensor
    host_lens: Tensor
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    q_dtype: torch.dtype
    kv_dtype: torch.dtype
    softmax_scale: float | None
    soft_cap: float | None
    causal: bool
    window_left: int | None

    @functools.cached_property
    def work_plan(self) -> WorkPlan:
        """The plan of every run."""
        return plan(
            self.host_starts,
            self.host_lens,
            num_q_heads=self.num_q_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            v_head_dim=self.v_head_dim,
            kv_element_bytes=self.kv_dtype.itemsize,
            causal=self.causal,
            window_left=self.window_left,
            hardware=device_hardware(self.block_table.device),
        )

    def check_run(self, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
        """Raises ValueError unless the tensors have the dtypes, rows and values' width that were planned."""
        for name, tensor, dtype in (("q", q, self.q_dtype), ("paged_kv_cache", k_cache, self.kv_dtype)):
            if tensor.dtype != dtype:
                raise ValueError(f"{name} must be {dtype}, as planned, got {tensor.dtype}")
        total_q = int(self.host_starts[-1])
        if q.shape[0] != total_q:
            raise ValueError(f"q must have the {total_q} rows that were planned, got {q.shape[0]}")
        if v_cache.shape[-1] != self.v_head_dim:
            raise ValueError(
                f"paged_kv_cache's values must have head_dim {self.v_head_dim}, as planned, got {v_cache.shape[-1]}"
            )

    def run(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        score_scale: float,
        value_scale: float,
        token_scales: tuple[Tensor, Tensor] | None,
        sinks: Tensor | None,
        out: Tensor | None,
        lse: Tensor | None,
        backend: str | None,
    ) -> tuple[Tensor, Tensor]:
        """out [total_q, num_q_heads, v_head_dim], times ``value_scale``, and lse [total_q, num_q_heads], base 2.

        Args:
            score_scale: multiplies the softmax scale.
            token_scales: of K and V, [num_pages, page_size, num_kv_heads] float32; for float8 caches.
            out, lse: written and returned if given.
        """
        self.check_run(q, k_cache, v_cache)
        softmax_scale = q.shape[-1] ** -0.5 if self.softmax_scale is None else self.softmax_scale
        out, natural_lse = attention(
            q,
            k_cache,
            v_cache,
            cu_seqlens_q=self.cu_seqlens_q,
            seq_lens=self.seq_lens,
            block_table=self.block_table,
            softmax_scale=softmax_scale * score_scale,
            causal=self.causal,
            window_left=self.window_left,
            soft_cap=self.soft_cap,
            sinks=sinks,
            tree_mask=self.tree_mask,
            k_scale=None if token_scales is None else token_scales[0],
            v_scale=None if token_scales is None else token_scales[1],
            plan=self.work_plan,
            out=out,
            return_lse=True,
            backend=backend,
        )
        if value_scale != 1:
            out.mul_(value_scale)
        natural_lse.mul_(LOG2_E)
        return out, natural_lse if lse is None else lse.copy_(natural_lse)


def padded_table(indptr: Tensor, indices: Tensor) -> Tensor:
    """``block_table`` [num_seqs, max_pages] int32 of compressed rows; entries past a row's end are some page's.

    Args:
        indptr: [num_seqs + 1] integers on the CPU.
        indices: [indptr[-1]] page ids, on the device of the result.
    """
    max_pages = max(int(indptr.diff().max()), 1) if len(indptr) > 1 else 1
    if len(indices) == 0:
        return torch.zeros((len(indptr) - 1, max_pages), dtype=torch.int32, device=indices.device)
    places = indptr[:-1].long().unsqueeze(1) + torch.arange(max_pages)
    return indices[places.clamp(max=len(indices) - 1).to(indices.device)].to(torch.int32)


_CACHE_DIMS = ("num_pages", "2", "page_size", "num_kv_heads", "head_dim")


def split_cache(paged_kv_cache: PagedKVCache, kv_layout: str) -> tuple[Tensor, Tensor]:
    """k_cache and v_cache [num_pages, page_size, num_kv_heads, head_dim], views of a cache of either form and layout.

    Args:
        kv_layout: ``NHD``, or ``HND`` where heads come before a page's tokens.
    """
    return _split("paged_kv_cache", paged_kv_cache, _CACHE_DIMS, kv_layout)


def split_scales(kv_cache_sf: PagedKVCache, kv_layout: str) -> tuple[Tensor, Tensor]:
    """The scales [num_pages, page_size, num_kv_heads] of K and V, views of ``split_cache``'s argument less head_dim."""
    return _split("kv_cache_sf", kv_cache_sf, _CACHE_DIMS[:-1], kv_layout)


def _split(argument: str, pages: PagedKVCache, dims: tuple[str, ...], kv_layout: str) -> tuple[Tensor, Tensor]:
    if isinstance(pages, Tensor):
        if pages.dim() != len(dims) or pages.shape[1] != 2:
            raise ValueError(f"{argument} must be a pair or [{', '.join(dims)}], got shape {list(pages.shape)}")
        keys, values = pages.unbind(1)
    else:
        keys, values = pages
    return (keys.transpose(1, 2), values.transpose(1, 2)) if kv_layout == "HND" else (keys, values)


def tree_words(mask: Tensor, q_lens: Sequence[int], kv_lens: Sequence[int]) -> Tensor:
    """``tree_mask`` words [total_q] int64 of a mask that only hides, in each slice, some of the last 64 keys.

    Args:
        mask: [sum(q_len * kv_len)] bool on the CPU, each slice's [q_len, kv_len] one after another.
    Raises:
        ValueError: the mask has another size.
        NotImplementedError: the mask is none that ``mixattn.attention`` takes.
    """
    areas = [q_len * kv_len for q_len, kv_len in zip(q_lens, kv_lens, strict=True)]
    if mask.numel() != sum(areas):
        raise ValueError(f"custom_mask must have sum(q_len * kv_len) = {sum(areas)} elements, got {mask.numel()}")
    words = []
    slices = zip(torch.split(mask, areas), q_lens, kv_lens, strict=True)
    for seq_idx, (flat, q_len, kv_len) in enumerate(slices):
        visible = flat.view(q_len, kv_len)
        row, key = torch.arange(q_len).unsqueeze(1), torch.arange(kv_len).unsqueeze(0)
        distance = kv_len - q_len + row - key
        must_see = (distance >= TREE_MASK_BITS) | ((key < kv_len - q_len) & (distance >= 0))
        if q_len > kv_len or not torch.equal(visible | must_see, visible) or bool((visible & (distance < 0)).any()):
            raise NotImplementedError(
                f"custom_mask of sequence {seq_idx} is not supported; the nearest is a tree: rows see all keys before "
                f"the slice, all keys {TREE_MASK_BITS} or more before themselves, and none behind themselves"
            )
        bits = torch.where((distance >= 0) & (distance < TREE_MASK_BITS), visible.long(), 0)
        words.append((bits << distance.clamp(0, TREE_MASK_BITS - 1)).sum(dim=1))
    return torch.cat(words) if words else torch.empty(0, dtype=torch.int64)


def unpack_bits(packed: Tensor, areas: Sequence[int]) -> Tensor:
    """[sum(areas)] bool from bits that lie lowest first in bytes, each slice's in bytes of its own.

    Args:
        packed: [sum(ceil(area / 8))] uint8 on the CPU.
    """
    num_bytes = [-(-area // 8) for area in areas]
    if packed.dtype != torch.uint8 or packed.numel() != sum(num_bytes):
        raise ValueError(
            f"packed_custom_mask must be {sum(num_bytes)} bytes (uint8), got {packed.numel()} of {packed.dtype}"
        )
    bits = (packed.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8)) & 1
    parts = torch.split(bits.bool(), num_bytes)
    return torch.cat(
        [part.flatten()[:area] for part, area in zip(parts, areas, strict=True)] or [bits.bool().flatten()]
    )
