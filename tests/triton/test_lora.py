"""add_lora in Triton against float64: slices of every length beside each other, with and without adapters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixattn.ops.reference import lora_reference
from mixattn.triton_kernels.lora import add_lora
from tests.triton.test_mixed_attention import strided

NUM_ADAPTERS = 3
BATCHES = {
    "decodes": ([1] * 5, [0, 1, 2, 0, -1]),
    "chunk-beside-decodes": ([1, 40, 0, 1, 17, 16, 1], [2, 0, 1, -1, 1, 2, 0]),
    "tiles-that-begin-at-no-multiple": ([15, 33, 2], [1, 2, 0]),
    "no-adapter": ([3, 20], [-1, -1]),
    "no-rows": ([0, 0], [0, 1]),
}


def make(dtype: torch.dtype, q_lens: list[int], in_size: int, out_size: int, rank: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    total_q = sum(q_lens)
    shapes = {
        "y": (total_q, out_size), "x": (total_q, in_size), "a": (NUM_ADAPTERS, rank, in_size),
        "b": (NUM_ADAPTERS, out_size, rank),
    }  # fmt: skip
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    tensors["scalings"] = torch.tensor([0.5, 2.0, 0.1])
    tensors["cu_seqlens_q"] = torch.tensor([0, *q_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return tensors


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    ("dtype", "in_size", "out_size", "rank"),
    [(torch.float32, 40, 70, 8), (torch.bfloat16, 130, 64, 16), (torch.float16, 64, 200, 80)],
    ids=str,
)
def test_add_lora_is_within_a_rounding_of_float64(
    dtype: torch.dtype, in_size: int, out_size: int, rank: int, batch: str, device: torch.device
) -> None:
    q_lens, adapters = BATCHES[batch]
    tensors = make(dtype, q_lens, in_size, out_size, rank)
    tensors["adapter_ids"] = torch.tensor(adapters, dtype=torch.int32)
    truth = lora_reference(**tensors, compute_dtype=torch.float64)
    on_device = {name: tensor.to(device) for name, tensor in tensors.items()}
    y = strided(on_device["y"])
    add_lora(**{**on_device, "y": y, "x": strided(on_device["x"])})
    # Sums in float32 of in_size and rank products, and one rounding of the result.
    largest = float(truth.abs().max()) if truth.numel() else 0.0
    error = (y.cpu().double() - truth).abs()
    half_ulp = torch.finfo(dtype).eps / 2
    assert bool((error <= half_ulp * truth.abs() + (in_size + rank) * 2.0**-24 * largest).all())
    without = torch.tensor(adapters).repeat_interleave(torch.tensor(q_lens)) < 0
    assert torch.equal(y.cpu()[without], tensors["y"][without])
