"""Drawing tokens in Triton: the tokens of ops/sampling.py, whatever the filters, and only tokens that they keep."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from mixattn import env
from mixattn.ops import sampling
from mixattn.ops.sampling import SamplingRow, sample
from mixattn.triton_kernels import sampling as triton_sampling
from mixattn.types import SamplingParams

FILTERS = [
    {},
    {"top_k": 1},
    {"top_k": 7},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"min_p": 0.1},
    {"top_k": 20, "top_p": 0.8},
    {"top_k": 50, "top_p": 0.9, "min_p": 0.02},
]


def make_rows(num_rows: int) -> list[SamplingRow]:
    settings = itertools.islice(itertools.cycle(itertools.product(FILTERS, (1.0, 0.3, 2.0))), num_rows)
    return [
        SamplingRow(SamplingParams(temperature=temperature, seed=31 * i, **filters), i % 5, (), 0)
        for i, (filters, temperature) in enumerate(settings)
    ]


def draw(logits: Tensor, rows: list[SamplingRow], device: torch.device) -> list[int]:
    ids = torch.arange(len(rows))
    tensors = sampling.draw_arguments(ids.tolist(), rows, logits.max(dim=1).values.tolist(), device)
    drawn: list[int] = triton_sampling.draw(logits.to(device), *tensors).tolist()
    return drawn


@pytest.mark.parametrize("vocab_size", [5, 1000, 20_000])
def test_draw_gives_the_tokens_of_torch(vocab_size: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_sampling, "MAX_BLOCK", 4096)
    num_rows = 24 if vocab_size < 10_000 else 9
    logits = 3 * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(vocab_size))
    logits[::3] = logits[::3].round()  # many ties at every threshold
    logits[1::4, ::2] = -torch.inf
    rows = make_rows(num_rows)
    assert draw(logits, rows, device) == sample(logits.clone(), rows)


@pytest.mark.parametrize("filters", FILTERS[1:], ids=str)
def test_draw_takes_every_token_that_the_filters_keep_and_no_other(
    filters: dict[str, float], device: torch.device
) -> None:
    logits = torch.linspace(0.0, -6.0, 40).round(decimals=1)[
        torch.randperm(40, generator=torch.Generator().manual_seed(0))
    ]
    params = SamplingParams(temperature=1.5, seed=0, **filters)  # type: ignore[arg-type]
    scaled = (logits - logits.max()) / 1.5
    kept = set((scaled >= sampling._filter_floor(scaled, params)).nonzero().flatten().tolist())
    num_draws = 60
    rows = [
        SamplingRow(SamplingParams(temperature=1.5, seed=seed, **filters), 0, (), 0)  # type: ignore[arg-type]
        for seed in range(num_draws)
    ]
    drawn = draw(logits.repeat(num_draws, 1), rows, device)
    assert set(drawn) <= kept
    weights = scaled.exp() / scaled[sorted(kept)].exp().sum()
    likely = {token for token in kept if weights[token] > 0.15}
    assert likely <= set(drawn)  # 60 draws miss a token of 15 % once in 17,000; these do not


def test_sample_draws_in_triton_beside_greedy_rows_and_penalties(monkeypatch: pytest.MonkeyPatch) -> None:
    if not env.triton_interpret():
        pytest.skip("the interpreter's tensors are the CPU's")
    logits = 2 * torch.randn(6, 300, generator=torch.Generator().manual_seed(2))
    rows = make_rows(6)
    rows[1] = SamplingRow(SamplingParams(temperature=0.0), 0, (), 0)
    rows[4] = SamplingRow(
        SamplingParams(temperature=0.8, seed=1, top_k=30, frequency_penalty=0.5, repetition_penalty=1.2), 3, (5, 6), 1
    )
    expected = sample(logits.clone(), rows)
    monkeypatch.setattr(sampling, "has_triton_for", lambda _: True)
    assert sample(logits.clone(), rows) == expected
