"""Invariant attention in CUDA, emulated: a row's bits are those of its own q and keys, whatever happens around it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import mixattn
from mixattn.ops.reference import quantize_reference
from tests.cases import CASES, SCORE_CASES, AttentionCase, assert_attention_close, make_inputs
from tests.cuda.attention_run import hardware
from tests.cuda.conftest import forget
from tests.cuda.emulation import Emulation
from tests.cuda.test_mixed_attention import HEADS

NUM_Q_HEADS, NUM_KV_HEADS = 6, 2
NUM_TOKENS = 150
SPLIT_TOKENS = 64
"""Of the plans here: the request has three splits, and its chunks' rows see one, two or all of them."""

OPTIONS: dict[str, dict[str, Any]] = {
    "window": {"window_left": 70},
    "sinks": {"sinks": torch.linspace(-1, 4, NUM_Q_HEADS)},
    "soft-cap-window-alibi-sinks": {
        "soft_cap": 3.0, "window_left": 90, "alibi_slopes": 0.1 ** torch.arange(1, 7),
        "sinks": torch.linspace(-1, 2, NUM_Q_HEADS),
    },
}  # fmt: skip
CHUNKINGS = [
    (1, NUM_TOKENS - 1),
    (NUM_TOKENS - 3, 1, 1, 1),
    (64, 64, 22),
    (100, 5, 37, 8),
]
"""With 3 query heads per kv head they make items of every kind."""
COMPANIES: list[list[tuple[int, int]]] = [[], [(1, 40), (7, 190)], [(50, 51), (0, 64), (1, 128)]]
"""(q_len, kv_len) of other sequences in the batch; half of them before the request."""
PAGE_SIZES = (1, 7, 16)
CAPABILITIES = (80, 90)


@dataclass(frozen=True)
class Sequence:
    """q of a whole sequence [num_tokens, heads, head_dim], and its k, v and their scales as they are stored."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None

    @classmethod
    def random(
        cls,
        num_tokens: int,
        heads: int | tuple[int, int],
        dtype: torch.dtype,
        seed: int,
        stored: torch.dtype | None = None,
    ) -> Sequence:
        """K and V of random values.

        Args:
            heads: head_dim and v_head_dim, or one for both.
            stored: what K and V are quantised to, magnitudes and scales differing from token to token.
        """
        generator = torch.Generator().manual_seed(seed)
        head_dim, v_head_dim = (heads, heads) if isinstance(heads, int) else heads
        shapes = [
            (num_tokens, num_heads, width)
            for num_heads, width in ((NUM_Q_HEADS, head_dim), (NUM_KV_HEADS, head_dim), (NUM_KV_HEADS, v_head_dim))
        ]
        q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
        if stored is None:
            return cls(q.to(dtype), k.to(dtype), v.to(dtype), None, None)
        k, v = (rows * 2.0 ** torch.randint(-3, 4, (num_tokens, 1, 1), generator=generator) for rows in (k, v))
        (k, k_scale), (v, v_scale) = (quantize_reference(rows, stored) for rows in (k, v))
        return cls(q.to(dtype), k, v, k_scale, v_scale)


def attend(
    slices: list[tuple[Sequence, int, int]],
    *,
    page_size: int = 16,
    num_workers: int = 8,
    invariant: bool = True,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """out and lse of one step: of each slice the rows [begin, end) of its sequence, over the keys [0, end)."""
    starts = [0, *itertools.accumulate(end - begin for _, begin, end in slices)]
    lens = [end for _, _, end in slices]
    num_pages = [-(-kv_len // page_size) for kv_len in lens]
    page_ids = torch.randperm(sum(num_pages), generator=torch.Generator().manual_seed(page_size)).int()
    block_table = torch.full((len(slices), max(num_pages)), 2**31 - 1, dtype=torch.int32)
    of_first = slices[0][0]
    pools: dict[str, Tensor] = {}
    for name in ("k", "v", "k_scale", "v_scale"):
        rows = getattr(of_first, name)
        if rows is not None:
            poison = torch.nan if rows.dtype.is_floating_point else 77
            pools[name] = torch.full((len(page_ids), page_size, *rows.shape[1:]), poison, dtype=rows.dtype)
    for seq_idx, ((sequence, _, end), pages) in enumerate(zip(slices, page_ids.split(num_pages), strict=True)):
        block_table[seq_idx, : len(pages)] = pages
        token = torch.arange(end)
        slot = pages[token // page_size].long(), token % page_size
        for name, pool in pools.items():
            pool[slot] = getattr(sequence, name)[:end]
    plan = mixattn.plan(
        starts, lens, num_q_heads=NUM_Q_HEADS, num_kv_heads=NUM_KV_HEADS, head_dim=of_first.q.shape[2],
        v_head_dim=of_first.v.shape[2] * (2 if of_first.v.dtype == torch.uint8 else 1),
        kv_element_bytes=pools["k"].element_size(), window_left=options.get("window_left"), invariant=invariant,
        hardware=dataclasses.replace(hardware(num_workers, SPLIT_TOKENS), invariant_split_tokens=SPLIT_TOKENS),
    )  # fmt: skip
    return mixattn.attention(
        torch.cat([sequence.q[begin:end] for sequence, begin, end in slices]), pools["k"], pools["v"],
        k_scale=pools.get("k_scale"), v_scale=pools.get("v_scale"),
        cu_seqlens_q=torch.tensor(starts, dtype=torch.int32), seq_lens=torch.tensor(lens, dtype=torch.int32),
        block_table=block_table, plan=plan, invariant=invariant, return_lse=True, backend="cuda", **options,
    )  # fmt: skip


def in_chunks(
    sequence: Sequence, chunks: tuple[int, ...], mates: list[tuple[Sequence, int, int]], **how: Any
) -> tuple[Tensor, Tensor]:
    """out and lse of all rows of a sequence, a step per chunk, each step with these mates."""
    before, after = mates[: len(mates) // 2], mates[len(mates) // 2 :]
    first_row = sum(end - begin for _, begin, end in before)
    outs, lses = [], []
    for size, end in zip(chunks, itertools.accumulate(chunks), strict=True):
        out, lse = attend([*before, (sequence, end - size, end), *after], **how)
        outs.append(out[first_row : first_row + size])
        lses.append(lse[first_row : first_row + size])
    return torch.cat(outs), torch.cat(lses)


def assert_same_bits(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for name, a, b in zip(("out", "lse"), got, expected, strict=True):
        assert not bool(b.isnan().any())
        assert torch.equal(a, b), f"{name} differs in {int((a != b).any(-1).sum())} of {len(b)} rows"


def make_mates(company: list[tuple[int, int]], make: Callable[[int, int], Sequence]) -> list[tuple[Sequence, int, int]]:
    """``make``: a random sequence of so many tokens, by a seed."""
    return [(make(kv_len, 2 + n), kv_len - q_len, kv_len) for n, (q_len, kv_len) in enumerate(company)]


@pytest.fixture(params=CAPABILITIES, ids=lambda capability: f"sm_{capability}")
def gpu(request: pytest.FixtureRequest, driver: Emulation) -> Emulation:
    """The emulated driver with a GPU of either generation; the schedule is a random one."""
    driver.configure(capability=request.param, seed=1)
    forget()
    return driver


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("company", COMPANIES, ids=lambda company: f"{len(company)}-mates")
@pytest.mark.parametrize(
    ("head_dim", "dtype", "stored"),
    [
        (64, torch.bfloat16, None),
        (128, torch.float16, None),
        (64, torch.bfloat16, torch.int8),
        (128, torch.float16, torch.float8_e4m3fn),
    ],
    ids=str,
)
def test_invariant_rows_of_every_chunking_company_and_page_size_have_the_bits_of_the_whole(
    head_dim: int,
    dtype: torch.dtype,
    stored: torch.dtype | None,
    company: list[tuple[int, int]],
    page_size: int,
    driver: Emulation,
) -> None:
    sequence = Sequence.random(NUM_TOKENS, head_dim, dtype, 1, stored)
    mates = make_mates(company, lambda num_tokens, seed: Sequence.random(num_tokens, head_dim, dtype, seed, stored))
    expected = in_chunks(sequence, (NUM_TOKENS,), [])
    for chunks in CHUNKINGS:
        assert_same_bits(in_chunks(sequence, chunks, mates, page_size=page_size, num_workers=3), expected)


@pytest.mark.parametrize("heads", sorted(HEADS), ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_invariant_rows_with_score_options_have_the_bits_of_the_whole(
    options: dict[str, Any], heads: tuple[int, int], gpu: Emulation
) -> None:
    dtype = torch.bfloat16
    sequence = Sequence.random(NUM_TOKENS, heads, dtype, seed=1)
    expected = in_chunks(sequence, (NUM_TOKENS,), [], **options)
    for chunks, company, page_size in zip(CHUNKINGS[:3], COMPANIES, PAGE_SIZES, strict=True):
        mates = make_mates(company, lambda num_tokens, seed: Sequence.random(num_tokens, heads, dtype, seed))
        assert_same_bits(in_chunks(sequence, chunks, mates, page_size=page_size, **options), expected)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("heads", [64, 128, (192, 128)], ids=str)
def test_invariant_rows_over_quantised_keys_with_score_options_have_the_bits_of_the_whole(
    heads: int | tuple[int, int], options: dict[str, Any], gpu: Emulation
) -> None:
    dtype, stored = torch.bfloat16, torch.uint8
    sequence = Sequence.random(NUM_TOKENS, heads, dtype, 1, stored)
    expected = in_chunks(sequence, (NUM_TOKENS,), [], **options)
    for chunks, company, page_size in zip(CHUNKINGS[:3], COMPANIES, PAGE_SIZES, strict=True):
        mates = make_mates(company, lambda num_tokens, seed: Sequence.random(num_tokens, heads, dtype, seed, stored))
        assert_same_bits(in_chunks(sequence, chunks, mates, page_size=page_size, **options), expected)


def test_default_rows_of_another_chunking_have_other_bits(driver: Emulation) -> None:
    """What the tests here look for is there to be found."""
    sequence = Sequence.random(NUM_TOKENS, 64, torch.float16, seed=1)
    expected = in_chunks(sequence, (NUM_TOKENS,), [], invariant=False)
    for chunks in CHUNKINGS:
        _, lse = in_chunks(sequence, chunks, [], invariant=False)
        assert not torch.equal(lse, expected[1])
        torch.testing.assert_close(lse, expected[1])


NAMED = (
    "q1-kv100-page16-gqa3", "chunk-beside-decodes", "q-without-keys", "q129-kv130-page7-mha",
    "splits-chunk-beside-decodes", "non-causal-window", "sinks-rows-without-keys", "tree-splits", "head-dim-256",
)  # fmt: skip


@pytest.mark.parametrize("case_id", NAMED)
def test_invariant_attention_of_named_case_is_within_twice_eager(case_id: str, gpu: Emulation) -> None:
    case = next(case for case in CASES + SCORE_CASES if case.id == case_id)
    inputs = make_inputs(case, torch.bfloat16)
    plan = mixattn.plan(
        inputs.cu_seqlens_q, inputs.seq_lens, **case.plan_options, kv_element_bytes=2, invariant=True,
        hardware=dataclasses.replace(hardware(4, 64), invariant_split_tokens=128),
    )  # fmt: skip
    out, lse = mixattn.attention(
        inputs.q, inputs.k_cache, inputs.v_cache, **inputs.index_tensors, **inputs.score_tensors, **case.options,
        invariant=True, plan=plan, return_lse=True, backend="cuda",
    )  # fmt: skip
    assert_attention_close(case, inputs, out, lse)


def test_invariant_attention_without_a_plan_makes_one_for_the_kernel_of_one_queue(gpu: Emulation) -> None:
    case = AttentionCase("no-plan", (1, 40), (300, 90), head_dim=128)
    inputs = make_inputs(case, torch.bfloat16)
    out, lse = mixattn.attention(
        inputs.q, inputs.k_cache, inputs.v_cache, **inputs.index_tensors, invariant=True, return_lse=True,
        backend="cuda",
    )  # fmt: skip
    assert_attention_close(case, inputs, out, lse)
    assert gpu.counts()["num_threads"] == 128 * 3


@pytest.mark.parametrize(
    ("granule", "forged", "message"),
    [
        (96, None, "plan's invariant_split_tokens must be a multiple of 64, got 96"),
        (1024, 64, "plan is not invariant: an item passes a multiple of its invariant_split_tokens, 64"),
    ],
)
def test_attention_with_plan_whose_splits_do_not_fit_the_tiles_is_refused(
    granule: int, forged: int | None, message: str, driver: Emulation
) -> None:
    case = AttentionCase("mode", (1,), (400,))
    inputs = make_inputs(case, torch.bfloat16)
    made = mixattn.plan(
        inputs.cu_seqlens_q, inputs.seq_lens, **case.plan_options, invariant=True,
        hardware=dataclasses.replace(hardware(1, 64), invariant_split_tokens=granule),
    )  # fmt: skip
    words = torch.from_numpy(made.buffer)
    if forged is not None:
        words[14] = forged
    with pytest.raises(ValueError, match=message):
        mixattn.attention(
            inputs.q, inputs.k_cache, inputs.v_cache, **inputs.index_tensors, plan=words, invariant=True,
            backend="cuda",
        )  # fmt: skip
