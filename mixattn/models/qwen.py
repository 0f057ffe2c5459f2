"""Qwen2 and Qwen3: the Llama decoder with a bias on q, k and v, or with a norm of each head of q and k.

Source: arXiv:2407.10671, arXiv:2505.09388.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixattn.config import ModelConfig
from mixattn.models.layers import RmsNorm, WeightSlots
from mixattn.models.llama import LlamaAttention, LlamaModel


class Qwen3Attention(LlamaAttention):
    """Normalises every head of q and k before they are rotated."""

    def __init__(
        self, config: ModelConfig, layer_idx: int, *, backend: str | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(config, layer_idx, backend=backend, dtype=dtype, device=device)
        self.q_norm = RmsNorm(config.head_dim, config.rms_norm_eps, dtype=dtype, device=device)
        self.k_norm = RmsNorm(config.head_dim, config.rms_norm_eps, dtype=dtype, device=device)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x)
        return self.q_norm(q), self.k_norm(k), v

    def weight_slots(self, prefix: str) -> WeightSlots:
        yield from super().weight_slots(prefix)
        yield from self.q_norm.weight_slots(f"{prefix}q_norm.")
        yield from self.k_norm.weight_slots(f"{prefix}k_norm.")


class Qwen2Model(LlamaModel):
    """Llama's decoder; its bias on q, k and v is ``ModelConfig.has_qkv_bias``."""


class Qwen3Model(LlamaModel):
    """Qwen2's without the bias, with q and k normalised."""

    attention_class = Qwen3Attention
