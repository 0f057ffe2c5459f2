"""FlashInfer's batched paged attention, its cascade merges and its append; docs/compat.md accounts for each argument.

``backend`` may name one of mixattn's own; FlashInfer's names are taken for "auto". Workspace buffers are not used.

Source: flashinfer/prefill.py, decode.py, attention/_core.py, cascade.py and page.py of flashinfer-python 0.7.4.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from mixattn.compat.arguments import Rows, accept_only, slots_of, soft_cap_of
from mixattn.compat.paged_batch import (
    LOG2_E,
    PagedBatch,
    PagedKVCache,
    padded_table,
    split_cache,
    split_scales,
    tree_words,
    unpack_bits,
)
from mixattn.ops.backends import BACKEND_NAMES
from mixattn.ops.kv_cache import append_kv
from mixattn.ops.merge import merge_states as merge_natural_states

DType = str | torch.dtype
Scale = float | Tensor


class _PagedWrapper:
    """What the wrappers have in common: a layout, a backend, and the batch that was planned."""

    def __init__(self, kv_layout: str, backend: str) -> None:
        if kv_layout not in ("NHD", "HND"):
            raise ValueError(f"kv_layout must be NHD or HND, got {kv_layout!r}")
        self._kv_layout = kv_layout
        self._backend = backend if backend in BACKEND_NAMES else None
        self._batch: PagedBatch | None = None
        self._has_token_scales = False

    @property
    def is_cuda_graph_enabled(self) -> bool:
        return False

    def reset_workspace_buffer(self, float_workspace_buffer: Tensor, int_workspace_buffer: Tensor) -> None:
        """Has no effect: there is no workspace."""

    def end_forward(self) -> None:
        """Has no effect, as in FlashInfer."""

    def _planned(self) -> PagedBatch:
        if self._batch is None:
            raise RuntimeError("plan() must be called before run()")
        return self._batch

    def _run(
        self,
        batch: PagedBatch,
        q: Tensor,
        paged_kv_cache: PagedKVCache,
        *,
        q_scale: Scale | None = None,
        k_scale: Scale | None = None,
        v_scale: Scale | None = None,
        token_scales: PagedKVCache | None = None,
        sinks: Tensor | None = None,
        out: Tensor | None,
        lse: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        k_cache, v_cache = split_cache(paged_kv_cache, self._kv_layout)
        return batch.run(
            q,
            k_cache,
            v_cache,
            token_scales=None if token_scales is None else split_scales(token_scales, self._kv_layout),
            score_scale=_scalar("q_scale", q_scale) * _scalar("k_scale", k_scale),
            value_scale=_scalar("v_scale", v_scale),
            sinks=None if sinks is None else sinks.float(),
            out=out,
            lse=lse,
            backend=self._backend,
        )


class BatchPrefillWithPagedKVCacheWrapper(_PagedWrapper):
    """Attention of slices of any length over pages; ``plan`` once per step, ``run`` in every layer."""

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Tensor | None = None,
        paged_kv_indptr_buf: Tensor | None = None,
        paged_kv_indices_buf: Tensor | None = None,
        paged_kv_last_page_len_buf: Tensor | None = None,
        custom_mask_buf: Tensor | None = None,
        mask_indptr_buf: Tensor | None = None,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
        jit_kwargs: dict[str, Any] | None = None,
        variant_owns_mask: bool = False,
        max_total_num_rows: int | None = None,
    ) -> None:
        function = type(self).__name__
        _no_graph(function, use_cuda_graph)
        accept_only(function, None, "the nearest is no variant", jit_args=jit_args, jit_kwargs=jit_kwargs)
        accept_only(function, False, "the nearest is a tree in custom_mask", variant_owns_mask=variant_owns_mask)
        accept_only(function, None, "it is for CUDA graphs; the nearest is None", max_total_num_rows=max_total_num_rows)
        super().__init__(kv_layout, backend)

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: Tensor | None = None,
        packed_custom_mask: Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: DType = "float16",
        kv_data_type: DType | None = None,
        o_data_type: DType | None = None,
        non_blocking: bool = True,
        prefix_len_ptr: Tensor | None = None,
        token_pos_in_items_ptr: Tensor | None = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: Tensor | None = None,
        seq_lens: Tensor | None = None,
        seq_lens_q: Tensor | None = None,
        block_tables: Tensor | None = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        uniform_q_len: int | None = None,
        use_token_head_sf: bool = False,
    ) -> None:
        """Keeps the batch and its work plan for ``run``.

        Args:
            qo_indptr, paged_kv_indptr: [num_seqs + 1] int32; paged_kv_indices: [paged_kv_indptr[-1]] page ids.
            paged_kv_last_page_len: [num_seqs], 1 to page_size.
            custom_mask: [sum(q_len * kv_len)] bool, in place of ``causal``; a tree (``paged_batch.tree_words``).
            packed_custom_mask: the same in bits.
            use_token_head_sf: whether ``run`` gets a scale per token and head in ``kv_cache_sf``; float8 caches only.
        Raises:
            NotImplementedError: naming an argument that mixattn cannot honour.
        """
        function = "BatchPrefillWithPagedKVCacheWrapper.plan"
        accept_only(function, "NONE", "rotate with append_kv before storing", pos_encoding_mode=pos_encoding_mode)
        accept_only(
            function,
            None,
            "the nearest is a tree in custom_mask",
            prefix_len_ptr=prefix_len_ptr,
            token_pos_in_items_ptr=token_pos_in_items_ptr,
            max_item_len_ptr=max_item_len_ptr,
        )
        accept_only(function, 0, "the nearest is 0", token_pos_in_items_len=token_pos_in_items_len)
        self._has_token_scales = use_token_head_sf
        host_indptr, host_starts = paged_kv_indptr.cpu(), qo_indptr.cpu()
        host_lens = (
            get_seq_lens(host_indptr, paged_kv_last_page_len.cpu(), page_size)
            if seq_lens is None
            else seq_lens.cpu().flatten().int()
        )
        words = None
        if custom_mask is not None or packed_custom_mask is not None:
            q_lens, kv_lens = host_starts.diff().tolist(), host_lens.tolist()
            if packed_custom_mask is not None:
                areas = [q_len * kv_len for q_len, kv_len in zip(q_lens, kv_lens, strict=True)]
                custom_mask = unpack_bits(packed_custom_mask.cpu(), areas)
            assert custom_mask is not None
            words = tree_words(custom_mask.cpu().bool().flatten(), q_lens, kv_lens)
        self._batch = _make_batch(
            function,
            host_starts=host_starts,
            host_lens=host_lens,
            host_indptr=host_indptr,
            indices=paged_kv_indices,
            num_q_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            head_dim_qk=head_dim_qk,
            head_dim_vo=head_dim_vo,
            q_data_type=q_data_type,
            kv_data_type=kv_data_type,
            o_data_type=o_data_type,
            sm_scale=sm_scale,
            logits_soft_cap=logits_soft_cap,
            causal=causal or words is not None,
            window_left=window_left,
            tree_mask=words,
        )

    begin_forward = plan

    def run(
        self,
        q: Tensor,
        paged_kv_cache: PagedKVCache,
        *args: Any,
        q_scale: Scale | None = None,
        k_scale: Scale | None = None,
        v_scale: Scale | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        lse_base: str = "log2",
        lse_layout: str = "NH",
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: Tensor | None = None,
        kv_cache_sf: PagedKVCache | None = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        use_fp16_softmax: bool | None = None,
        uses_spcompress: bool | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """out [total_q, num_qo_heads, head_dim_vo]; with ``return_lse`` also lse [total_q, num_qo_heads] float32.

        Args:
            paged_kv_cache: [num_pages, 2, page_size, num_kv_heads, head_dim], or a pair (heads first in HND).
            q_scale, k_scale, v_scale: of whole tensors: they multiply the scores and the result.
            lse: written and returned; in ``lse_layout``.
            lse_base: ``log2`` or ``ln``. lse_layout: ``NH``, or ``HN`` for [num_qo_heads, total_q].
            sinks: [num_qo_heads]; lse includes them.
            kv_cache_sf: the scales of a plan with ``use_token_head_sf``: as ``paged_kv_cache`` without head_dim.
        Raises:
            RuntimeError: nothing was planned.
            ValueError: ``kv_cache_sf`` is missing, or was not planned; ``lse_base`` or ``lse_layout`` is another.
            NotImplementedError: naming an argument that mixattn cannot honour.
        """
        batch = self._planned()
        function = "BatchPrefillWithPagedKVCacheWrapper.run"
        accept_only(function, (), "the nearest is none", args=args)
        if (kv_cache_sf is not None) != self._has_token_scales:
            raise ValueError("kv_cache_sf must be given if, and only if, plan got use_token_head_sf")
        for name, value, known in (("lse_base", lse_base, ("log2", "ln")), ("lse_layout", lse_layout, ("NH", "HN"))):
            if value not in known:
                raise ValueError(f"{name} must be {' or '.join(known)}, got {value!r}")
        _check_window(batch, window_left)
        out, new_lse = self._run(
            batch,
            q,
            paged_kv_cache,
            q_scale=q_scale,
            k_scale=k_scale,
            v_scale=v_scale,
            token_scales=kv_cache_sf,
            sinks=sinks,
            out=out,
            lse=None,
        )
        if not return_lse:
            return out
        if lse_base == "ln":
            new_lse.mul_(math.log(2))
        if lse_layout == "HN":
            new_lse = new_lse.t().contiguous()
        return out, new_lse if lse is None else lse.copy_(new_lse)

    def run_return_lse(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As ``run`` with ``return_lse``."""
        out, lse = self.run(*args, **{**kwargs, "return_lse": True})
        return out, lse

    def forward(
        self,
        q: Tensor,
        paged_kv_cache: PagedKVCache,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        k_scale: Scale | None = None,
        v_scale: Scale | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> Tensor:
        """out; deprecated in FlashInfer: these arguments replace those of ``plan`` from now on."""
        return self.forward_return_lse(
            q,
            paged_kv_cache,
            causal,
            pos_encoding_mode,
            use_fp16_qk_reduction,
            k_scale,
            v_scale,
            window_left,
            logits_soft_cap,
            sm_scale,
            rope_scale,
            rope_theta,
        )[0]

    def forward_return_lse(
        self,
        q: Tensor,
        paged_kv_cache: PagedKVCache,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        k_scale: Scale | None = None,
        v_scale: Scale | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As ``forward``, and lse."""
        batch = self._planned()
        accept_only("forward", "NONE", "rotate with append_kv before storing", pos_encoding_mode=pos_encoding_mode)
        self._batch = _with_options(
            batch,
            causal=causal or batch.tree_mask is not None,
            window_left=window_left,
            logits_soft_cap=logits_soft_cap,
            sm_scale=sm_scale,
        )
        return self.run_return_lse(q, paged_kv_cache, k_scale=k_scale, v_scale=v_scale)


class BatchDecodeWithPagedKVCacheWrapper(_PagedWrapper):
    """Attention of a few rows per sequence over pages; ``plan`` once per step, ``run`` in every layer."""

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Tensor | None = None,
        paged_kv_indices_buffer: Tensor | None = None,
        paged_kv_last_page_len_buffer: Tensor | None = None,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
        jit_kwargs: dict[str, Any] | None = None,
    ) -> None:
        _no_graph("BatchDecodeWithPagedKVCacheWrapper", use_cuda_graph)
        accept_only(type(self).__name__, None, "the nearest is no variant", jit_args=jit_args, jit_kwargs=jit_kwargs)
        super().__init__(kv_layout, backend)
        self.use_tensor_cores = use_tensor_cores

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: DType | None = "float16",
        kv_data_type: DType | None = None,
        o_data_type: DType | None = None,
        data_type: DType | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
        block_tables: Tensor | None = None,
        seq_lens: Tensor | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        q_len_per_req: int = 1,
        *,
        window_right: int = 0,
    ) -> None:
        """Keeps the batch and its work plan for ``run``.

        Args:
            indptr: [num_seqs + 1] int32; indices: [indptr[-1]] page ids; last_page_len: [num_seqs], 1 to page_size.
            q_len_per_req: rows of each sequence, the last of its keys; they see keys causally.
        Raises:
            NotImplementedError: naming an argument that mixattn cannot honour.
        """
        function = "BatchDecodeWithPagedKVCacheWrapper.plan"
        accept_only(function, "NONE", "rotate with append_kv before storing", pos_encoding_mode=pos_encoding_mode)
        accept_only(function, 0, "the nearest is 0", window_right=window_right)
        if q_len_per_req < 1:
            raise ValueError(f"q_len_per_req must be >= 1, got {q_len_per_req}")
        host_indptr = indptr.cpu()
        host_lens = (
            get_seq_lens(host_indptr, last_page_len.cpu(), page_size)
            if seq_lens is None
            else seq_lens.cpu().flatten().int()
        )
        if q_len_per_req > 1 and bool((host_lens < q_len_per_req).any()):
            raise ValueError(
                f"q_len_per_req must be at most every sequence's keys, got {q_len_per_req} for {host_lens.tolist()}"
            )
        self._batch = _make_batch(
            function,
            host_starts=torch.arange(len(host_lens) + 1, dtype=torch.int32) * q_len_per_req,
            host_lens=host_lens,
            host_indptr=host_indptr,
            indices=indices,
            num_q_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            head_dim_qk=head_dim,
            head_dim_vo=None,
            q_data_type=q_data_type or data_type or "float16",
            kv_data_type=kv_data_type or data_type,
            o_data_type=o_data_type,
            sm_scale=sm_scale,
            logits_soft_cap=logits_soft_cap,
            causal=True,
            window_left=window_left,
            tree_mask=None,
        )

    begin_forward = plan

    def run(
        self,
        q: Tensor,
        paged_kv_cache: PagedKVCache,
        *args: Any,
        q_scale: Scale | None = None,
        k_scale: Scale | None = None,
        v_scale: Scale | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: Tensor | None = None,
        q_len_per_req: int | None = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        kv_cache_sf: PagedKVCache | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """out [total_q, num_qo_heads, head_dim]; with ``return_lse`` also lse [total_q, num_qo_heads], base 2.

        Args: as ``BatchPrefillWithPagedKVCacheWrapper.run``.
            q: [total_q, num_qo_heads, head_dim], total_q being num_seqs * q_len_per_req.
            q_len_per_req: what was planned, or None.
        Raises:
            RuntimeError: nothing was planned.
            NotImplementedError: naming an argument that mixattn cannot honour.
        """
        batch = self._planned()
        function = "BatchDecodeWithPagedKVCacheWrapper.run"
        accept_only(function, (), "the nearest is none", args=args)
        accept_only(function, None, "the nearest is K and V in q's dtype", kv_cache_sf=kv_cache_sf)
        _check_window(batch, window_left)
        if q_len_per_req is not None and q_len_per_req * len(batch.host_lens) != int(batch.host_starts[-1]):
            raise ValueError(f"q_len_per_req must be as planned, got {q_len_per_req}")
        result = self._run(
            batch,
            q,
            paged_kv_cache,
            q_scale=q_scale,
            k_scale=k_scale,
            v_scale=v_scale,
            sinks=sinks,
            out=out,
            lse=lse,
        )
        return result if return_lse else result[0]

    def run_return_lse(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As ``run`` with ``return_lse``."""
        out, lse = self.run(*args, **{**kwargs, "return_lse": True})
        return out, lse

    def forward(
        self,
        q: Tensor,
        paged_kv_cache: PagedKVCache,
        pos_encoding_mode: str = "NONE",
        q_scale: Scale | None = None,
        k_scale: Scale | None = None,
        v_scale: Scale | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> Tensor:
        """out; deprecated in FlashInfer: these arguments replace those of ``plan`` from now on."""
        return self.forward_return_lse(
            q,
            paged_kv_cache,
            pos_encoding_mode,
            q_scale,
            k_scale,
            v_scale,
            window_left,
            logits_soft_cap,
            sm_scale,
            rope_scale,
            rope_theta,
        )[0]

    def forward_return_lse(
        self,
        q: Tensor,
        paged_kv_cache: PagedKVCache,
        pos_encoding_mode: str = "NONE",
        q_scale: Scale | None = None,
        k_scale: Scale | None = None,
        v_scale: Scale | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As ``forward``, and lse."""
        batch = self._planned()
        accept_only("forward", "NONE", "rotate with append_kv before storing", pos_encoding_mode=pos_encoding_mode)
        self._batch = _with_options(
            batch, causal=True, window_left=window_left, logits_soft_cap=logits_soft_cap, sm_scale=sm_scale
        )
        return self.run_return_lse(q, paged_kv_cache, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale)


class BatchAttention(_PagedWrapper):
    """Attention of prompt chunks and decodes alike; ``plan`` once per step, ``run`` in every layer."""

    def __init__(self, kv_layout: str = "NHD", device: str = "cuda") -> None:
        super().__init__(kv_layout, "auto")

    def plan(
        self,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        kv_indices: Tensor,
        kv_len_arr: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int,
        page_size: int,
        causal: bool = False,
        sm_scale: float | None = None,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype = torch.bfloat16,
        kv_data_type: torch.dtype = torch.bfloat16,
        use_profiler: bool = False,
    ) -> None:
        """Keeps the batch and its work plan for ``run``.

        Args:
            qo_indptr, kv_indptr: [num_seqs + 1] int32; kv_indices: [kv_indptr[-1]] page ids.
            kv_len_arr: [num_seqs] int32, the keys of each sequence.
        Raises:
            NotImplementedError: naming an argument that mixattn cannot honour.
        """
        function = "BatchAttention.plan"
        accept_only(function, False, "profile the process instead", use_profiler=use_profiler)
        self._batch = _make_batch(
            function,
            host_starts=qo_indptr.cpu(),
            host_lens=kv_len_arr.cpu(),
            host_indptr=kv_indptr.cpu(),
            indices=kv_indices,
            num_q_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            head_dim_qk=head_dim_qk,
            head_dim_vo=head_dim_vo,
            q_data_type=q_data_type,
            kv_data_type=kv_data_type,
            o_data_type=None,
            sm_scale=sm_scale,
            logits_soft_cap=logits_soft_cap,
            causal=causal,
            window_left=-1,
            tree_mask=None,
        )

    def run(
        self,
        q: Tensor,
        kv_cache: PagedKVCache,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        k_scale: Scale | None = None,
        v_scale: Scale | None = None,
        logits_soft_cap: float = 0.0,
        profiler_buffer: Tensor | None = None,
        kv_cache_sf: PagedKVCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """out [total_q, num_qo_heads, head_dim] and lse [total_q, num_qo_heads] float32, base 2.

        Args:
            logits_soft_cap: the planned one, or 0 for it.
        Raises:
            RuntimeError: nothing was planned.
            NotImplementedError: naming an argument that mixattn cannot honour.
        """
        batch = self._planned()
        function = "BatchAttention.run"
        accept_only(function, None, "profile the process instead", profiler_buffer=profiler_buffer)
        accept_only(function, None, "the nearest is K and V in q's dtype", kv_cache_sf=kv_cache_sf)
        if logits_soft_cap and logits_soft_cap != batch.soft_cap:
            raise ValueError(f"logits_soft_cap must be as planned, {batch.soft_cap or 0.0}, got {logits_soft_cap}")
        return self._run(batch, q, kv_cache, k_scale=k_scale, v_scale=v_scale, out=out, lse=lse)


def merge_state(v_a: Tensor, s_a: Tensor, v_b: Tensor, s_b: Tensor) -> tuple[Tensor, Tensor]:
    """v [total_q, num_heads, head_dim] and s [total_q, num_heads] float32, base 2, over the keys of both states."""
    return merge_states(torch.stack((v_a, v_b), dim=1), torch.stack((s_a, s_b), dim=1))


def merge_state_in_place(v: Tensor, s: Tensor, v_other: Tensor, s_other: Tensor, mask: Tensor | None = None) -> None:
    """Writes the merger of both states over the first, in the rows where ``mask`` [total_q] is true (None: all)."""
    merged_v, merged_s = merge_state(v, s, v_other, s_other)
    if mask is not None:
        merged_v = torch.where(mask.bool()[:, None, None], merged_v, v)
        merged_s = torch.where(mask.bool()[:, None], merged_s, s)
    v.copy_(merged_v)
    s.copy_(merged_s)


def merge_states(v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """v [total_q, num_heads, head_dim] and s [total_q, num_heads] float32, base 2, over the keys of all states.

    Args:
        v: [total_q, num_states, num_heads, head_dim]; s: [total_q, num_states, num_heads], base 2.
    """
    merged, lse = merge_natural_states(v.transpose(0, 1), s.float().transpose(0, 1) / LOG2_E)
    return merged, lse * LOG2_E


def append_paged_kv_cache(
    append_key: Tensor,
    append_value: Tensor,
    batch_indices: Tensor,
    positions: Tensor,
    paged_kv_cache: PagedKVCache,
    kv_indices: Tensor,
    kv_indptr: Tensor,
    kv_last_page_len: Tensor,
    kv_layout: str = "NHD",
) -> None:
    """Stores the new rows in the pages of their sequences.

    Args:
        append_key, append_value: [num_tokens, num_kv_heads, head_dim].
        batch_indices, positions: [num_tokens], each row's sequence and its position there.
        paged_kv_cache: written; [num_pages, 2, page_size, num_kv_heads, head_dim], or a pair (heads first in HND).
        kv_indptr: [num_seqs + 1]; kv_indices: [kv_indptr[-1]] page ids, those of the new rows included.
        kv_last_page_len: [num_seqs]; not read, the positions tell as much.
    """
    k_cache, v_cache = split_cache(paged_kv_cache, kv_layout)
    rows = Rows(batch_indices.long(), positions.long())
    slots = slots_of(rows, padded_table(kv_indptr.cpu(), kv_indices), k_cache.shape[1])
    append_kv(append_key, append_value, k_cache, v_cache, slots)


def get_batch_indices_positions(
    append_indptr: Tensor,
    seq_lens: Tensor,
    nnz: int,
    batch_indices: Tensor | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The sequence and the position there [nnz] int32 of new rows that end their sequences.

    Args:
        append_indptr: [num_seqs + 1]; seq_lens: [num_seqs], the new rows included; nnz: append_indptr[-1].
        batch_indices, positions: written and returned if given.
    """
    seq_idx = torch.repeat_interleave(append_indptr.diff().long(), output_size=nnz)
    seq_positions = torch.arange(nnz, device=append_indptr.device) + (seq_lens - append_indptr[1:])[seq_idx]
    return (
        seq_idx.int() if batch_indices is None else batch_indices.copy_(seq_idx),
        seq_positions.int() if positions is None else positions.copy_(seq_positions),
    )


def get_seq_lens(kv_indptr: Tensor, kv_last_page_len: Tensor, page_size: int) -> Tensor:
    """The keys of each sequence [num_seqs], of its pages and what the last of them holds."""
    return (kv_indptr.diff() - 1).clamp(min=0) * page_size + kv_last_page_len


def _no_graph(function: str, use_cuda_graph: bool) -> None:
    """Raises NotImplementedError for a wrapper whose runs are to be captured."""
    accept_only(
        function,
        False,
        "run copies the plan's words from the host, and a captured graph would keep those of its capture; the nearest "
        "is False",
        use_cuda_graph=use_cuda_graph,
    )


def _scalar(name: str, scale: Scale | None) -> float:
    """The one value of a scale; 1 for None."""
    if scale is None:
        return 1.0
    if isinstance(scale, Tensor) and scale.numel() != 1:
        raise NotImplementedError(
            f"{name} {list(scale.shape)} is not supported; the nearest is one scale for all heads"
        )
    value = float(scale)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be finite and > 0, got {value}")
    return value


def _check_window(batch: PagedBatch, window_left: int | None) -> None:
    """Raises ValueError if ``run`` asks for another window than ``plan``; None asks for none."""
    planned = -1 if batch.window_left is None else batch.window_left
    if window_left is not None and max(window_left, -1) != planned:
        raise ValueError(f"window_left must be as planned, {planned}, got {window_left}")


def _dtype(name: str, value: DType) -> torch.dtype:
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name} must be a torch.dtype or its name, got {value!r}")
    return dtype


def _make_batch(
    function: str,
    *,
    host_starts: Tensor,
    host_lens: Tensor,
    host_indptr: Tensor,
    indices: Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim_qk: int,
    head_dim_vo: int | None,
    q_data_type: DType,
    kv_data_type: DType | None,
    o_data_type: DType | None,
    sm_scale: float | None,
    logits_soft_cap: float | None,
    causal: bool,
    window_left: int,
    tree_mask: Tensor | None,
) -> PagedBatch:
    """The batch of these arguments of ``plan``; index tensors go to the device of ``indices``."""
    q_dtype = _dtype("q_data_type", q_data_type)
    kv_dtype = q_dtype if kv_data_type is None else _dtype("kv_data_type", kv_data_type)
    if kv_dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        accept_only(function, q_dtype, f"the nearest is q_data_type, {q_dtype}", kv_data_type=kv_dtype)
    if o_data_type is not None:
        o_dtype = _dtype("o_data_type", o_data_type)
        accept_only(function, q_dtype, f"the nearest is q_data_type, {q_dtype}", o_data_type=o_dtype)
    device = indices.device
    batch = PagedBatch(
        cu_seqlens_q=host_starts.int().to(device),
        seq_lens=host_lens.int().to(device),
        block_table=padded_table(host_indptr, indices),
        tree_mask=None if tree_mask is None else tree_mask.to(device),
        host_starts=host_starts,
        host_lens=host_lens,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim_qk,
        v_head_dim=head_dim_qk if head_dim_vo is None else head_dim_vo,
        q_dtype=q_dtype,
        kv_dtype=kv_dtype,
        softmax_scale=None,
        soft_cap=None,
        causal=causal,
        window_left=None,
    )
    batch = _with_options(
        batch, causal=causal, window_left=window_left, logits_soft_cap=logits_soft_cap, sm_scale=sm_scale
    )
    _ = batch.work_plan  # bad lengths are plan's errors, not run's
    return batch


def _with_options(
    batch: PagedBatch, *, causal: bool, window_left: int, logits_soft_cap: float | None, sm_scale: float | None
) -> PagedBatch:
    """The batch under other options."""
    return dataclasses.replace(
        batch,
        causal=causal,
        window_left=None if window_left < 0 else window_left,
        soft_cap=soft_cap_of(logits_soft_cap),
        softmax_scale=sm_scale,
    )
