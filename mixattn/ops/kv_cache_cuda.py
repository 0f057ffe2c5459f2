"""``append_kv`` by the CUDA kernels: which calls they take, and their launch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mixattn import _C
from mixattn.ops import cuda_images
from mixattn.ops.attention_call import address

_ADDRESSES = (
    "k", "v", "k_cache", "v_cache", "k_scale", "v_scale", "slot_mapping", "q", "q_out", "positions", "rope_cos_sin",
)  # fmt: skip


def kernel_for(tensors: Mapping[str, Tensor | None], sizes: Mapping[str, Any], interleaved: bool) -> _C.CudaInstance:
    """The kernel that takes the call.

    Args:
        tensors: the arguments of ``append_kv`` that are tensors, by name; scales that are one value are None.
        sizes: what follows from their layout.
    Raises:
        NotImplementedError: there is none; the message names the nearest call that has one.
    """
    k = tensors["k"]
    assert k is not None
    reason = cuda_images.why_device_lacks(k.device.index or 0)
    if reason is not None:
        raise NotImplementedError(reason)
    return _C.cuda_append_kv_kernel(**sizes, **_addresses(tensors), interleaved=interleaved)


def run(tensors: Mapping[str, Tensor | None], sizes: Mapping[str, Any], interleaved: bool) -> None:
    """Puts the call's kernel on torch's current stream, to write the caches, scales of tokens, and ``q_out``.

    Raises:
        NotImplementedError: no kernel takes the call. Nothing has been written.
        RuntimeError: the driver refuses the image or the launch.
    """
    kernel = kernel_for(tensors, sizes, interleaved)
    k = tensors["k"]
    assert k is not None
    _C.cuda_append_kv(
        **sizes,
        **_addresses(tensors),
        interleaved=interleaved,
        image=cuda_images.image(k.device.index or 0, kernel["image"]),
        stream=torch.cuda.current_stream(k.device).cuda_stream if k.device.type == "cuda" else 0,
    )


def _addresses(tensors: Mapping[str, Tensor | None]) -> dict[str, int]:
    return {name: address(tensors[name]) for name in _ADDRESSES}
