"""The table of rotary embeddings: cosines and sines by position."""

from __future__ import annotations

import torch
from torch import Tensor

from mixattn.config import RopeConfig


def rope_cos_sin(config: RopeConfig, max_positions: int, *, device: torch.device | str = "cpu") -> Tensor:
    """The ``rope_cos_sin`` argument of ``append_kv``: [max_positions, rotary_dim] float32.

    Row p holds the rotary_dim / 2 cosines, then as many sines, of p * theta^(-2i / rotary_dim) / frequency_factor_i.
    Frequencies and angles are computed in float32, in the order that the models' authors trained with: at position
    8000 the rounding of a frequency moves an angle by up to 4e-4, so a more exact table is another model.

    Raises:
        ValueError: rotary_dim 0, or frequency_factors that are not one per rotated pair.
    Source: arXiv:2104.09864, section 3.4.2.
    """
    if config.rotary_dim == 0:
        raise ValueError("rotary_dim must be > 0 for a rope table, got 0")
    if max_positions < 1:
        raise ValueError(f"max_positions must be >= 1, got {max_positions}")
    exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.int64).float() / config.rotary_dim
    frequencies = 1.0 / config.theta**exponents
    if config.frequency_factors is not None:
        if len(config.frequency_factors) != len(frequencies):
            raise ValueError(
                f"frequency_factors must hold one divisor per rotated pair ({len(frequencies)}), "
                f"got {len(config.frequency_factors)}"
            )
        frequencies = frequencies / torch.tensor(config.frequency_factors, dtype=torch.float32)
    angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), frequencies)
    table = torch.cat((angles.cos(), angles.sin()), dim=-1) * config.attention_factor
    return table.to(device)
