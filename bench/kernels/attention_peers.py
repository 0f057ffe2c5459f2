"""Other libraries' attention over the same batches: each function makes what a library needs, untimed, and returns the
call that is timed.

A library that is not installed raises ImportError, one that does not take the batch NotImplementedError; the message
says why. Their work plans are made once, as ours is. Signatures as of flash-attn 2.8 and its hopper/ folder
(flash_attn_interface), FlashInfer 0.6 and torch 2.13.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels.attention_cases import Batch, Case

Call = Callable[[], Tensor]
"""Attention of the batch, [total_q, num_q_heads, head_dim]."""

FLASH_ATTENTION_2_PAGE = 256
"""The page sizes that FlashAttention-2 takes are the multiples of this (csrc/flash_attn/flash_api.cpp)."""
FLASHINFER_WORKSPACE_BYTES = 512 << 20
"""For the partial results of split keys; its examples have 128 MiB, which its planner can ask more than."""


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


def sdpa(case: Case, q: Tensor, k: list[Tensor], v: list[Tensor]) -> Tensor:
    """torch's attention over the same batch; equal decodes go in one call, the chunk in another.

    Args:
        q: [total_q, num_q_heads, head_dim].
        k, v: [decodes stacked: [num_decodes, num_kv_heads, kv_len, head_dim]] and the chunk's, if there is one.
    """
    outs = []
    if case.num_decodes:
        rows = q[: case.num_decode_rows].unflatten(0, (case.num_decodes, case.decode_q)).transpose(1, 2)
        mask = None if case.decode_q == 1 else _causal_mask(q, case.decode_q, case.decode_kv)
        out = F.scaled_dot_product_attention(rows, k[0], v[0], attn_mask=mask, enable_gqa=True)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    if case.chunk:
        rows = q[case.num_decode_rows :].transpose(0, 1).unsqueeze(0)  # [1, num_q_heads, chunk, head_dim]
        mask = _causal_mask(q, case.chunk, case.chunk_kv)
        out = F.scaled_dot_product_attention(rows, k[-1], v[-1], attn_mask=mask, enable_gqa=True)
        outs.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(outs)


def _causal_mask(q: Tensor, q_len: int, kv_len: int) -> Tensor:
    if q.is_cuda:
        from torch.nn.attention.bias import causal_lower_right

        # Its own type, which torch hands to a flash kernel; a tensor of bools would bar it from that.
        return causal_lower_right(q_len, kv_len)
    return torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)


def torch_sdpa(batch: Batch) -> Call:
    k, v = (gather(batch.case, cache, batch.block_table) for cache in batch.real_caches())
    return lambda: sdpa(batch.case, batch.q, k, v)


def torch_flex(batch: Batch) -> Call:
    """Flex attention over all sequences one after another, with the batch's structure in a block mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    case, device = batch.case, batch.q.device
    k, v = (_concatenated(batch, cache) for cache in batch.real_caches())
    q_lens, kv_lens = (torch.tensor(lens, device=device) for lens in (case.q_lens, case.kv_lens))
    seq_of_row, seq_of_key = (torch.arange(len(q_lens), device=device).repeat_interleave(n) for n in (q_lens, kv_lens))
    row, key = (torch.arange(int(lens.sum()), device=device) for lens in (q_lens, kv_lens))
    position_of_row = row + (kv_lens - q_lens.cumsum(0))[seq_of_row]
    position_of_key = key - (kv_lens.cumsum(0) - kv_lens)[seq_of_key]

    def is_visible(_batch: Tensor, _head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (seq_of_row[i] == seq_of_key[j]) & (position_of_key[j] <= position_of_row[i])

    is_gpu = device.type == "cuda"
    if is_gpu:
        torch.compiler.reset()  # a compiled call per batch; without this the ninth would silently run uncompiled
    mask = create_block_mask(is_visible, None, None, len(row), len(key), device=device, _compile=is_gpu)
    call = torch.compile(flex_attention, dynamic=False) if is_gpu else flex_attention
    rows = batch.q.transpose(0, 1)[None]
    return lambda: call(rows, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)


def _concatenated(batch: Batch, cache: Tensor) -> Tensor:
    """[1, num_kv_heads, keys of all sequences, head_dim]."""
    parts = gather(batch.case, cache, batch.block_table)
    return torch.cat([part.transpose(0, 1).flatten(1, 2) for part in parts], dim=1)[None]


def repaged(batch: Batch, cache: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """The cache copied into pages of another size, and their block table; a sequence's pages lie in order."""
    parts = gather(batch.case, cache, batch.block_table)
    pages, tables, num_pages = [], [], 0
    for part in parts:
        num_seqs, _, kv_len, _ = part.shape
        pages_each = -(-kv_len // page_size)
        padded = F.pad(part.transpose(1, 2), (0, 0, 0, 0, 0, pages_each * page_size - kv_len))
        pages.append(padded.reshape(num_seqs * pages_each, page_size, *padded.shape[2:]))
        ids = torch.arange(num_pages, num_pages + num_seqs * pages_each, dtype=torch.int32, device=cache.device)
        tables.append(ids.view(num_seqs, pages_each))
        num_pages += num_seqs * pages_each
    width = max(table.shape[1] for table in tables)
    return torch.cat(pages), torch.cat([F.pad(table, (0, width - table.shape[1])) for table in tables])


def flash_attention_2_arguments(batch: Batch) -> dict[str, Any]:
    """Of ``flash_attn.flash_attn_varlen_func``."""
    _refuse_quantized(batch, "K and V must be of q's dtype")
    _refuse_v_head_dim(batch)
    (k, block_table), (v, _) = (repaged(batch, cache, FLASH_ATTENTION_2_PAGE) for cache in batch.real_caches())
    starts = torch.tensor([0, *batch.case.kv_lens], device=k.device).cumsum(0).int()
    return {
        "q": batch.q,
        "k": k,
        "v": v,
        "cu_seqlens_q": batch.cu_seqlens_q,
        "cu_seqlens_k": starts,
        "max_seqlen_q": max(batch.case.q_lens),
        "max_seqlen_k": max(batch.case.kv_lens),
        "causal": True,
        "block_table": block_table,
    }


def flash_attention_2(batch: Batch, module: str = "flash_attn") -> Call:
    """FlashAttention-2, in pages of 256 tokens, the smallest that it takes."""
    function = importlib.import_module(module).flash_attn_varlen_func
    arguments = flash_attention_2_arguments(batch)
    return lambda: function(**arguments)


def flash_attention_3_arguments(batch: Batch) -> dict[str, Any]:
    """Of ``flash_attn_interface.flash_attn_with_kvcache``, which is where FlashAttention-3 reads pages."""
    _refuse_quantized(batch, "with K and V in float8 q must be too, which is other work")
    return {
        "q": batch.q,
        "k_cache": batch.k_cache,
        "v_cache": batch.v_cache,
        "cache_seqlens": batch.seq_lens,
        "page_table": batch.block_table,
        "cu_seqlens_q": batch.cu_seqlens_q,
        "max_seqlen_q": max(batch.case.q_lens),
        "causal": True,
    }


def flash_attention_3(batch: Batch, module: str = "flash_attn_interface") -> Call:
    """FlashAttention-3; its own scheduling kernel runs in the timed call, as it does without graphs."""
    function = importlib.import_module(module).flash_attn_with_kvcache
    arguments = flash_attention_3_arguments(batch)
    return lambda: function(**arguments)


def flashinfer_pages(kv_lens: list[int], page_size: int, block_table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """kv_indptr [num_seqs + 1], kv_indices [kv_indptr[-1]] and the keys in each last page, 1 to page_size."""
    device = block_table.device
    pages_each = [-(-kv_len // page_size) for kv_len in kv_lens]
    indptr = torch.tensor([0, *pages_each], device=device).cumsum(0).int()
    indices = torch.cat([row[:count] for row, count in zip(block_table, pages_each, strict=True)])
    last_page_len = torch.tensor([(kv_len - 1) % page_size + 1 for kv_len in kv_lens], device=device)
    return indptr, indices, last_page_len.int()


def _heads(batch: Batch) -> tuple[int, int, int]:
    return batch.case.num_q_heads, batch.case.num_kv_heads, batch.case.head_dim


def _dtypes(batch: Batch) -> dict[str, torch.dtype]:
    return {"q_data_type": batch.q.dtype, "kv_data_type": batch.k_cache.dtype}


def flashinfer_prefill(batch: Batch, module: str = "flashinfer") -> Call:
    """FlashInfer's BatchPrefill, which serves mixed batches in one launch."""
    workspace = torch.empty(FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device=batch.q.device)
    wrapper = importlib.import_module(module).BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
    case = batch.case
    pages = flashinfer_pages(case.kv_lens, case.page_size, batch.block_table)
    wrapper.plan(
        batch.cu_seqlens_q, *pages, *_heads(batch), case.page_size, case.value_dim, causal=True, **_dtypes(batch)
    )
    return lambda: wrapper.run(batch.q, (batch.k_cache, batch.v_cache))


def flashinfer_attention(batch: Batch, module: str = "flashinfer") -> Call:
    """FlashInfer's BatchAttention: persistent CTAs, two tile sizes, one launch."""
    case = batch.case
    wrapper = importlib.import_module(module).BatchAttention("NHD", str(batch.q.device))
    indptr, indices, _ = flashinfer_pages(case.kv_lens, case.page_size, batch.block_table)
    num_q_heads, num_kv_heads, head_dim = _heads(batch)
    wrapper.plan(
        batch.cu_seqlens_q, indptr, indices, batch.seq_lens, num_q_heads, num_kv_heads, head_dim,
        case.value_dim, case.page_size, causal=True, **_dtypes(batch),
    )  # fmt: skip
    return lambda: wrapper.run(batch.q, (batch.k_cache, batch.v_cache))[0]


def pod_plan_arguments(batch: Batch) -> list[Any]:
    """Of BatchPOD's ``plan``: the chunk's four index tensors, the decodes' four, and the shape."""
    case = batch.case
    _refuse_v_head_dim(batch)
    if not case.chunk or not case.num_decodes:
        raise NotImplementedError("it takes a chunk beside decodes only")
    arguments: list[Any] = []
    for q_lens, kv_lens, rows in (
        ([case.chunk], [case.chunk_kv], slice(case.num_decodes, None)),
        ([case.decode_q] * case.num_decodes, [case.decode_kv] * case.num_decodes, slice(0, case.num_decodes)),
    ):
        starts = torch.tensor([0, *q_lens], device=batch.q.device).cumsum(0).int()
        arguments += [starts, *flashinfer_pages(kv_lens, case.page_size, batch.block_table[rows])]
    return [*arguments, *_heads(batch), case.page_size]


def flashinfer_pod(batch: Batch, module: str = "flashinfer") -> Call:
    """FlashInfer's BatchPOD: the chunk's and the decodes' CTAs share SMs; the caller splits the batch."""
    workspace = torch.empty(FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device=batch.q.device)
    arguments = pod_plan_arguments(batch)
    wrapper = importlib.import_module(module).BatchPODWithPagedKVCacheWrapper(workspace, "NHD")
    wrapper.plan(*arguments, **_dtypes(batch))
    caches, num_rows = (batch.k_cache, batch.v_cache), batch.case.num_decode_rows
    decode_rows, chunk_rows = batch.q[:num_rows], batch.q[num_rows:]

    def call() -> Tensor:
        chunk_out, decode_out = wrapper.run(chunk_rows, caches, decode_rows, caches, causal_p=True)
        return torch.cat([decode_out, chunk_out])

    return call


def _refuse_quantized(batch: Batch, reason: str) -> None:
    if batch.k_cache.dtype != batch.q.dtype:
        raise NotImplementedError(reason)


def _refuse_v_head_dim(batch: Batch) -> None:
    if batch.case.value_dim != batch.case.head_dim:
        raise NotImplementedError("it takes heads of V of K's size only")


PEERS: dict[str, Callable[[Batch], Call]] = {
    "torch-sdpa": torch_sdpa,
    "torch-flex": torch_flex,
    "flash-attn-2": flash_attention_2,
    "flash-attn-3": flash_attention_3,
    "flashinfer-prefill": flashinfer_prefill,
    "flashinfer-attention": flashinfer_attention,
    "flashinfer-pod": flashinfer_pod,
}
DEFAULT_PEERS = tuple(name for name in PEERS if name != "torch-flex")
"""torch-flex is asked for by name: it compiles anew for each batch, which takes longer than all the rest."""
