"""The parts that all decoders are made of: linear maps with fused rows, norm, gated MLP, paged attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import gguf
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixattn.ops.elementwise import rms_norm, silu_mul
from mixattn.ops.linear import (
    PLAIN_FORMS,
    QUANTISED_FORMS,
    PackedWeight,
    gated_linear,
    linear,
    pack_weight,
    row_bytes,
    weight_rows,
)

WeightSlots = Iterator[tuple[str, Tensor]]
"""Names of a checkpoint's tensors, each with the view of a parameter that it is written to; of a packed matrix, which
is not written any more, with its values."""


class Linear(nn.Module):
    """y = x W^T + b, where W's rows are those of several of the checkpoint's matrices, one below the other.

    ``weight`` is W in the model's dtype, for torch's product. A model that computes in float32 on the CPU keeps W as
    the checkpoint has it: between ``store_as`` and ``pack`` its rows are loaded, then ``packed`` takes their place.

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
        self.in_features = in_features
        self.form: str | None = None
        self.packed: PackedWeight | None = None
        num_rows = sum(parts.values())
        weight = torch.empty(num_rows, in_features, dtype=dtype, device=device)
        self.weight: nn.Parameter | None = nn.Parameter(weight, requires_grad=False)
        bias = torch.empty(num_rows, dtype=dtype, device=device) if has_bias else None
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[num_rows, rows of W], plus ``residual`` of that shape, from x [num_rows, in_features]."""
        if self.packed is not None:
            return linear(x, self.packed, self.bias, residual)
        assert self.weight is not None
        y = F.linear(x, self.weight, self.bias)
        return y if residual is None else residual + y

    def gated(self, x: Tensor) -> Tensor:
        """``silu_mul`` of ``forward``'s rows."""
        return silu_mul(self(x)) if self.packed is None else gated_linear(x, self.packed, self.bias)

    def rows(self, ids: Tensor) -> Tensor:
        """[num_ids, in_features], these rows of W: an embedding."""
        if self.packed is not None:
            return weight_rows(self.packed, ids)
        assert self.weight is not None
        return F.embedding(ids, self.weight)

    def store_as(self, form: str) -> None:
        """Makes ``weight`` the rows of a checkpoint of this form (``ops.linear.WEIGHT_FORMS``), still to be loaded."""
        self.form = form
        num_rows = sum(self.parts.values())
        if form in PLAIN_FORMS:
            stored = torch.empty(num_rows, self.in_features, dtype=PLAIN_FORMS[form])
        else:
            stored = torch.empty(num_rows, row_bytes(form, self.in_features), dtype=torch.uint8)
        self.weight = nn.Parameter(stored, requires_grad=False)

    def quantise(self, form: str) -> None:
        """Rounds the loaded rows, which are float32, to blocks of a quantised form."""
        assert self.form == "float32" and self.weight is not None, "store_as('float32') comes first"
        rows = gguf.quantize(self.weight.data.numpy(), gguf.GGMLQuantizationType[form.upper()])
        self.weight = nn.Parameter(torch.from_numpy(rows), requires_grad=False)
        self.form = form

    @property
    def rounds_x(self) -> bool:
        """Whether it multiplies inputs that are rounded to int8."""
        return self.packed is not None and self.packed.rounds_x

    @property
    def num_bytes(self) -> int:
        """What W takes."""
        held = self.weight if self.packed is None else self.packed.panels
        assert held is not None
        return held.nbytes

    def pack(self, *, rounds_x: bool) -> None:
        """Packs the loaded rows and drops them; quantised ones multiply inputs rounded to int8 on request."""
        assert self.form is not None and self.weight is not None, "store_as comes first"
        rounds_x = rounds_x and self.form in QUANTISED_FORMS
        self.packed = pack_weight(self.weight.data, self.form, self.in_features, rounds_x=rounds_x)
        self.weight = None

    def weight_slots(self, prefix: str) -> WeightSlots:
        begin = 0
        for name, num_rows in self.parts.items():
            rows = slice(begin, begin + num_rows)
            if self.packed is not None:
                yield f"{prefix}{name}.weight", weight_rows(self.packed, torch.arange(begin, begin + num_rows))
            else:
                assert self.weight is not None
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
        return rms_norm(x, self.weight, self.eps)

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

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + down(...), both [num_rows, hidden_size]."""
        return self.down_proj(self.gate_up_proj.gated(x), residual)  # type: ignore[no-any-return]

    def weight_slots(self, prefix: str) -> WeightSlots:
        yield from self.gate_up_proj.weight_slots(prefix)
        yield from self.down_proj.weight_slots(prefix)
