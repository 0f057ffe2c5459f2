"""The parts that all decoders are made of: linear maps with fused rows, norm, gated MLP, paged attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WeightSlots = Iterator[tuple[str, Tensor]]
"""Names of a checkpoint's tensors, each with the view of a parameter that it is written to."""


class Linear(nn.Module):
    """y = x W^T + b, where W's rows are those of several of the checkpoint's matrices, one below the other.

    Args:
        in_features: columns of W.
        parts: the rows that each matrix of the checkpoint takes, by its name.
        has_bias: whether each of these matrices has a bias.
    """

    def __init__(
        self,
        in_features: int,
        parts: Mapping[str, int],
        *,
        has_bias: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.parts = dict(parts)
        num_rows = sum(parts.values())
        weight = torch.empty(num_rows, in_features, dtype=dtype, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        bias = torch.empty(num_rows, dtype=dtype, device=device) if has_bias else None
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def weight_slots(self, prefix: str) -> WeightSlots:
        begin = 0
        for name, num_rows in self.parts.items():
            rows = slice(begin, begin + num_rows)
            yield f"{prefix}{name}.weight", self.weight[rows]
            if self.bias is not None:
                yield f"{prefix}{name}.bias", self.bias[rows]
            begin += num_rows


class RmsNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32.

    Source: arXiv:1910.07467, equation 4.
    """

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def weight_slots(self, prefix: str) -> WeightSlots:
        yield f"{prefix}weight", self.weight


class GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one matrix. Source: SwiGLU, arXiv:2002.05202."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.gate_up_proj = Linear(
            hidden_size,
            {"gate_proj": intermediate_size, "up_proj": intermediate_size},
            has_bias=False,
            dtype=dtype,
            device=device,
        )
        self.down_proj = Linear(
            intermediate_size, {"down_proj": hidden_size}, has_bias=False, dtype=dtype, device=device
        )

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)  # type: ignore[no-any-return]

    def weight_slots(self, prefix: str) -> WeightSlots:
        yield from self.gate_up_proj.weight_slots(prefix)
        yield from self.down_proj.weight_slots(prefix)
