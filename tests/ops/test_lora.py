"""The door of add_lora: rows get what their slice's adapter gives a row alone, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mixattn.ops.lora import add_lora


def arguments() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"y": (6, 12), "x": (6, 20), "a": (2, 4, 20), "b": (2, 12, 4)}
    tensors: dict[str, Any] = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return tensors | {
        "scalings": torch.tensor([0.5, 2.0]),
        "cu_seqlens_q": torch.tensor([0, 1, 5, 6], dtype=torch.int32),
        "adapter_ids": torch.tensor([1, -1, 0], dtype=torch.int32),
    }


def test_add_lora_adds_each_slices_own_product() -> None:
    given = arguments()
    y = given["y"].clone()
    add_lora(**given)
    x, a, b = given["x"], given["a"], given["b"]
    torch.testing.assert_close(given["y"][0], y[0] + 2.0 * (b[1] @ (a[1] @ x[0])))
    torch.testing.assert_close(given["y"][5], y[5] + 0.5 * (b[0] @ (a[0] @ x[5])))
    assert torch.equal(given["y"][1:5], y[1:5])
    torch.library.opcheck(torch.ops.mixattn.add_lora, tuple(given.values()))


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("a", torch.zeros(2, 4, 21), ValueError, r"a is \[num_adapters, rank, in_size\] with in_size 21, but x has"),
        ("b", torch.zeros(2, 12, 4).double(), NotImplementedError, "b is torch.float64 and x is torch.float32"),
        ("b", torch.zeros(2, 4, 12).transpose(1, 2), ValueError, "the last dimension of b must be contiguous"),
        ("a", torch.zeros(2, 8, 20)[:, ::2], ValueError, "a must be contiguous, got strides"),
        ("scalings", torch.zeros(2).half(), ValueError, "scalings must be torch.float32, got torch.float16"),
        ("adapter_ids", torch.zeros(3), ValueError, "adapter_ids must be torch.int32"),
        ("cu_seqlens_q", torch.zeros(3, dtype=torch.int32), ValueError, r"cu_seqlens_q must be \[4\], got shape \[3\]"),
        ("y", torch.zeros(6, 1).expand(6, 12), ValueError, "y .* contiguous|y is written and must not have stride 0"),
    ],
)
def test_add_lora_of_bad_argument_names_it(name: str, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        add_lora(**{**arguments(), name: value})
