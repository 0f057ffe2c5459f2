"""Attention by the CUDA kernels: which calls they take, and their launch."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mixattn import _C
from mixattn.ops import cuda_images
from mixattn.ops.attention_call import (
    AttentionCall,
    AttentionLayout,
    PlanHeader,
    address,
    free_sms,
    native_sizes,
    place_plan,
)
from mixattn.ops.plan import Hardware, base_hardware, with_workers

BLOCK_ROWS = (128, 64, 16)
"""Of the kernels' tiles: csrc/cuda/sm80/tile.cuh, csrc/cuda/sm90/tile.cuh."""
INVARIANT_TILE_KEYS = 64
"""Of the tile that every item of an invariant call is computed in; head_dim 192 and 256 have half of it."""
WORKERS_PER_SM = 2
"""Of every kernel: two blocks, or the two sides of one."""
ALIGNMENT = 16
"""What any kernel asks of an address is a divisor of this."""


def kernel_for(
    call: AttentionCall, layout: AttentionLayout, out: Tensor, has_small_apart: bool = True
) -> _C.CudaInstance:
    """The kernel that takes the call, with a plan whose small items are apart (``Hardware.separates_small``) or not.

    Raises:
        NotImplementedError: there is none; the message names the nearest call that has one.
    """
    device_idx = _device_idx(out)
    reason = cuda_images.why_device_lacks(device_idx)
    if reason is not None:
        raise NotImplementedError(reason)
    misalignments = tuple(tensor.data_ptr() % ALIGNMENT for tensor in (call.q, call.k_cache, call.v_cache, out))
    return _kernel_for(layout, misalignments, cuda_images.devices()[device_idx]["capability"], has_small_apart)


@functools.lru_cache(maxsize=256)
def _kernel_for(
    layout: AttentionLayout, misalignments: tuple[int, ...], capability: tuple[int, int], has_small_apart: bool
) -> _C.CudaInstance:
    """Remembered: the layers of a step share a layout."""
    present = 2 * ALIGNMENT  # stands for the address of a tensor that the call has
    optional = ("lse", "alibi_slopes", "sinks", "tree_mask")
    written = zip(("q", "k_cache", "v_cache", "out"), misalignments, strict=True)
    return _C.cuda_instance(
        **native_sizes(layout),
        **{name: present + misalignment for name, misalignment in written},
        **{name: 0 if getattr(layout, name) is None else present for name in optional},
        **dict.fromkeys(("cu_seqlens_q", "seq_lens", "block_table", "plan", "k_scale", "v_scale"), 0),
        **dict.fromkeys(("partial_out", "partial_lse", "tickets", "plan_words", "num_partial_rows", "num_tickets"), 0),
        capability=capability,
        has_small_apart=has_small_apart,
    )


def plan_hardware(call: AttentionCall, layout: AttentionLayout, out: Tensor) -> Hardware:
    """The workers that a plan for this call's kernel is to be balanced over; NotImplementedError as ``kernel_for``."""
    kernel = kernel_for(call, layout, out)
    device = cuda_images.devices()[_device_idx(out)]
    hardware = with_workers(
        base_hardware(device["capability"]), free_sms(device["num_sms"], call.sm_margin), kernel["workers_per_sm"]
    )
    return replace(hardware, separates_small=kernel["separates_small"])


def run(
    call: AttentionCall,
    layout: AttentionLayout,
    header: PlanHeader | None,
    sizes: Mapping[str, Any],
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """Puts the call's kernel on torch's current stream, to write ``out`` and, unless None, ``lse``.

    Args:
        header: of the call's plan; None if that is on the device, where it stays unread.
        sizes: of the call's layout.
    Raises:
        NotImplementedError: no kernel takes the call. Nothing has been written.
        ValueError: the plan was made for larger tiles, or has invariant splits that cut them; or ``sm_margin`` leaves
            no SM.
        RuntimeError: the driver refuses the image or the launch.
    """
    if header is not None:
        has_small_apart = header.first_small >= 0
    else:
        assert call.device_plan is not None
        has_small_apart = bool(call.device_plan.separates_small)
    kernel = kernel_for(call, layout, out, has_small_apart)
    num_sms = free_sms(cuda_images.devices()[_device_idx(out)]["num_sms"], call.sm_margin)
    words, workspace = place_plan(call, header, BLOCK_ROWS, INVARIANT_TILE_KEYS)
    device = out.device
    _C.cuda_attention(
        **sizes,
        q=call.q.data_ptr(),
        k_cache=call.k_cache.data_ptr(),
        v_cache=call.v_cache.data_ptr(),
        k_scale=address(call.k_scale),
        v_scale=address(call.v_scale),
        out=out.data_ptr(),
        lse=address(lse),
        cu_seqlens_q=call.cu_seqlens_q.data_ptr(),
        seq_lens=call.seq_lens.data_ptr(),
        block_table=call.block_table.data_ptr(),
        plan=0 if header is None else address(call.plan),
        alibi_slopes=address(call.alibi_slopes),
        sinks=address(call.sinks),
        tree_mask=address(call.tree_mask),
        plan_words=words.shape[0],
        partial_out=workspace.partial_out.data_ptr(),
        partial_lse=workspace.partial_lse.data_ptr(),
        num_partial_rows=workspace.partial_lse.shape[0],
        tickets=workspace.tickets.data_ptr(),
        num_tickets=workspace.tickets.shape[0],
        image=cuda_images.image(_device_idx(out), kernel["image"]),
        device_plan=words.data_ptr(),
        has_small_apart=has_small_apart,
        num_sms=num_sms,
        stream=torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0,
    )


def _device_idx(tensor: Tensor) -> int:
    """Of the driver's devices; the only one of an emulated driver."""
    return tensor.device.index or 0
