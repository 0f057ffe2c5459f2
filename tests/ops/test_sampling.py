"""The token drawn: filters against a written-out truth, distribution against softmax, streams against their company."""

from __future__ import annotations

import math

import pytest
import torch

from mixattn.ops.sampling import SamplingRow, _exponential, _filter_floor, _token_hashes, sample
from mixattn.types import SamplingParams

VOCAB = 512


def row(seed: int = 0, output_idx: int = 0, history: tuple = (), prompt_len: int = 0, **params) -> SamplingRow:
    return SamplingRow(SamplingParams(**{"max_tokens": None, "seed": seed, **params}), output_idx, history, prompt_len)


def make_logits(num_rows: int, vocab_size: int = VOCAB, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def kept_tokens(logits: torch.Tensor, params: SamplingParams) -> set[int]:
    scaled = (logits - logits.max()) / params.temperature
    return set(torch.nonzero(scaled >= _filter_floor(scaled, params)).flatten().tolist())


def kept_by_definition(logits: torch.Tensor, params: SamplingParams) -> set[int]:
    """min_p, top_k, top_p as their papers say, one after the other on a sorted list of Python floats."""
    weights = {i: math.exp(v) for i, v in enumerate(((logits - logits.max()) / params.temperature).tolist())}
    ranked = sorted(weights, key=lambda i: -weights[i])
    ranked = [i for i in ranked if weights[i] >= params.min_p * weights[ranked[0]]]
    if params.top_k > 0:
        ranked = ranked[: params.top_k]
    total, kept = sum(weights[i] for i in ranked), []
    for i in ranked:
        kept.append(i)
        if sum(weights[j] for j in kept) >= params.top_p * total:
            break
    return set(kept)


@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": VOCAB},
        {"top_p": 0.9},
        {"top_p": 1e-6},
        {"top_p": 0.9999},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"top_k": 20, "top_p": 0.8},
        {"top_k": 50, "top_p": 0.95, "min_p": 0.02, "temperature": 0.7},
        {"temperature": 5.0, "top_p": 0.99},
    ],
    ids=str,
)
def test_filters_random_logits_keep_what_the_definitions_keep(params: dict) -> None:
    sampling = SamplingParams(**params)
    for logits in make_logits(8):
        assert kept_tokens(logits, sampling) == kept_by_definition(logits, sampling)


@pytest.mark.parametrize(("tail", "top_p"), [(-9.0, 0.9), (-17.0, 0.9996)])
def test_top_p_takes_what_it_needs_from_below_a_cut(tail: float, top_p: float) -> None:
    """One token and a tail that together have more than the token, none of which lies above the first or second cut."""
    vocab_size = 10_000
    logits = tail + torch.linspace(0, 0.3, vocab_size)
    logits[17] = 0.0
    weights = logits.double().exp()
    needed = top_p * weights.sum()
    expected = 1 + int((weights[torch.arange(vocab_size) != 17].flip(0).cumsum(0) + 1 < needed).sum()) + 1
    assert 2 < expected < vocab_size
    assert len(kept_tokens(logits, SamplingParams(top_p=top_p))) == pytest.approx(expected, abs=2)


def test_top_p_of_a_flat_row_keeps_that_share_of_it() -> None:
    vocab_size = 10_000
    logits = torch.linspace(0, 1e-3, vocab_size)
    assert len(kept_tokens(logits, SamplingParams(top_p=0.9))) in range(8993, 9001)  # nearly equal weights
    assert len(kept_tokens(logits, SamplingParams(top_p=1 - 1e-9))) == vocab_size


def test_top_k_ties_at_the_border_all_stay() -> None:
    assert kept_tokens(torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0]), SamplingParams(top_k=2)) == {1, 2, 3, 4}


def test_sample_greedy_rows_take_the_argmax_beside_drawn_rows() -> None:
    logits = make_logits(3)
    expected = logits.argmax(-1).tolist()
    tokens = sample(logits.clone(), [row(temperature=0), row(seed=5), row(temperature=0)])
    assert tokens[0] == expected[0]
    assert tokens[2] == expected[2]


@pytest.mark.parametrize("params", [{}, {"top_p": 0.9}, {"temperature": 1.7}], ids=str)
def test_sample_many_seeds_follow_the_softmax(params: dict) -> None:
    """Chi-square over the tokens expected at least 8 times; its mean is k - 1 and its deviation sqrt(2 (k - 1))."""
    num_draws, logits = 2000, make_logits(1, vocab_size=64, scale=1.5)[0]
    sampling = SamplingParams(**params)
    scaled = logits / sampling.temperature
    kept = kept_by_definition(logits, sampling)
    mask = torch.tensor([0.0 if i in kept else -math.inf for i in range(64)])
    expected = torch.softmax((scaled + mask).double(), -1) * num_draws
    for by in ("seed", "output_idx"):
        rows = [row(**{by: i}, **params) for i in range(num_draws)]
        counts = torch.bincount(torch.tensor(sample(logits.repeat(num_draws, 1), rows)), minlength=64).double()
        assert set(torch.nonzero(counts).flatten().tolist()) <= kept
        common = expected >= 8
        chi2 = float(((counts - expected)[common] ** 2 / expected[common]).sum())
        freedom = int(common.sum()) - 1
        assert abs(chi2 - freedom) < 4.5 * math.sqrt(2 * freedom), (by, chi2, freedom)


def test_exponential_whole_vocabulary_is_exponential_and_uncorrelated() -> None:
    hashes = _token_hashes(49152, torch.device("cpu"))
    seeds = (0, 1, -7, 2**63 - 1)
    waits = torch.stack([_exponential(seed, idx, hashes) for seed in seeds for idx in range(4)]).double()
    assert abs(float(waits.mean()) - 1) < 0.005
    assert abs(float(waits.var()) - 1) < 0.02
    assert float(waits.min()) > 0
    correlation = torch.corrcoef(waits) - torch.eye(16, dtype=torch.float64)
    assert float(correlation.abs().max()) < 0.025  # 5.5 deviations of 1 / sqrt(49152)
    neighbours = torch.corrcoef(torch.stack([waits[0, :-1], waits[0, 1:]]))[0, 1]
    assert abs(float(neighbours)) < 0.025


@pytest.mark.parametrize("params", [{}, {"top_k": 40}, {"top_p": 0.95}, {"min_p": 0.01}], ids=str)
def test_sample_same_seed_same_token_whatever_the_batch(params: dict) -> None:
    logits = make_logits(16)
    rows = [row(seed=i, output_idx=3 * i, **params) for i in range(16)]
    together = sample(logits.clone(), rows)
    order = list(reversed(range(16)))
    backwards = sample(logits[order].clone(), [rows[i] for i in order])
    alone = [sample(logits[i : i + 1].clone(), [rows[i]])[0] for i in range(16)]
    assert together == alone == backwards[::-1]
    assert len(set(together)) > 1


def test_sample_logits_off_by_rounding_keep_their_tokens() -> None:
    """A product with more rows rounds differently; the tokens must survive that."""
    logits = make_logits(1000, vocab_size=2048, scale=2.0)
    noise = make_logits(1000, vocab_size=2048, seed=1, scale=1e-5)
    rows = [row(seed=i) for i in range(1000)]
    one, other = sample(logits.clone(), rows), sample(logits + noise, rows)
    assert one == other


def test_sample_output_idx_and_seed_change_the_stream() -> None:
    logits = torch.zeros(64, VOCAB)
    by_idx = sample(logits.clone(), [row(seed=9, output_idx=i) for i in range(64)])
    by_seed = sample(logits.clone(), [row(seed=i, output_idx=9) for i in range(64)])
    assert len(set(by_idx)) > 50
    assert len(set(by_seed)) > 50


def test_penalties_follow_their_formulas() -> None:
    logits = torch.tensor([[2.0, -1.0, 1.0, 0.5]])
    history = (3, 0, 0, 1)  # prompt: 3; output: 0, 0, 1
    arguments = {"history": history, "prompt_len": 1, "temperature": 0.0}
    # repetition 2: [1, -2, 1, 0.25]; frequency 0.5: [0, -2.5, ...]; presence 0.2: [-0.2, -2.7, 1, 0.25]
    work = logits.clone()
    token = sample(work, [row(repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.2, **arguments)])
    assert token == [2]
    assert work[0].tolist() == pytest.approx([-0.2, -2.7, 1.0, 0.25])


def test_penalties_before_any_output_touch_only_the_repetition() -> None:
    work = torch.tensor([[2.0, 1.0]])
    arguments = {"history": (0,), "prompt_len": 1, "temperature": 0}
    assert sample(work, [row(frequency_penalty=2.0, presence_penalty=2.0, **arguments)]) == [0]
    assert sample(work, [row(repetition_penalty=4.0, **arguments)]) == [1]


def test_logit_bias_moves_the_choice() -> None:
    assert sample(torch.tensor([[2.0, 1.0, 0.0]]), [row(temperature=0, logit_bias={2: 5.0, 0: -1.0})]) == [2]


def test_min_tokens_holds_back_eos_and_stop_tokens_until_reached() -> None:
    logits = torch.tensor([[5.0, 4.0, 3.0]])
    arguments = {"temperature": 0, "min_tokens": 2, "stop_token_ids": [1], "max_tokens": 4}
    tokens = [sample(logits.clone(), [row(output_idx=i, **arguments)], frozenset({0}))[0] for i in range(4)]
    assert tokens == [2, 2, 0, 0]


def test_smallest_temperature_is_as_good_as_greedy() -> None:
    logits = make_logits(4)
    assert sample(logits.clone(), [row(seed=i, temperature=1e-9) for i in range(4)]) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_sample_broken_logits_raise_naming_the_row(bad: float) -> None:
    logits = make_logits(3)
    logits[1] = bad
    with pytest.raises(RuntimeError, match=r"rows \[1\]"):
        sample(logits, [row(), row(), row()])


def test_sample_wrong_number_of_rows_raises() -> None:
    with pytest.raises(ValueError, match="2 rows for 1 requests"):
        sample(make_logits(2), [row()])


def test_sample_without_a_seed_raises() -> None:
    with pytest.raises(ValueError, match="seed"):
        sample(make_logits(1), [SamplingRow(SamplingParams(), 0, (), 0)])
