"""attention(invariant=True): a row's bits are those of its own q and keys, whatever happens around it."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import mixattn
from mixattn import env
from mixattn.ops.plan import cpu_hardware
from tests.cases import CASES, SCORE_CASES, AttentionCase, assert_attention_close, make_inputs

NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM = 6, 2, 64
NUM_TOKENS = 600
SPLIT_TOKENS = 256
"""Of the plans here: the request has three splits, and its chunks' rows see one, two or all of them."""

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window_left": 130},
    "alibi-sinks": {"alibi_slopes": 0.5 ** torch.arange(1, 7), "sinks": torch.linspace(-1, 4, 6)},
    "soft-cap-window-alibi-sinks": {
        "soft_cap": 3.0, "window_left": 300, "alibi_slopes": 0.1 ** torch.arange(1, 7), "sinks": torch.zeros(6),
    },
}  # fmt: skip
WHOLE = (NUM_TOKENS,)
CHUNKINGS = [
    (1, NUM_TOKENS - 1),
    (NUM_TOKENS - 12, *(1,) * 12),  # a prompt, then decodes
    (256, 256, 88),
    (100, 5, 37, 16, 17, 300, 125),
    tuple([43] * 13 + [41]),
]
MATES = [(1, 40), (7, 900), (130, 131), (0, 64), (1, 2000)]
"""(q_len, kv_len) of other sequences: 15 batches are made of them."""


@dataclass(frozen=True)
class Sequence:
    """q, k and v of a whole sequence: [num_tokens, heads, HEAD_DIM]."""

    q: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def random(cls, num_tokens: int, dtype: torch.dtype, seed: int) -> Sequence:
        generator = torch.Generator().manual_seed(seed)
        shapes = [(num_tokens, heads, HEAD_DIM) for heads in (NUM_Q_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)]
        return cls(*(torch.randn(shape, generator=generator).to(dtype) for shape in shapes))


def attend(
    slices: list[tuple[Sequence, int, int]],
    *,
    page_size: int = 16,
    num_workers: int = 2,
    invariant: bool = True,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """out and lse of one step: of each slice the rows [begin, end) of its sequence, over the keys [0, end)."""
    starts = [0, *itertools.accumulate(end - begin for _, begin, end in slices)]
    lens = [end for _, _, end in slices]
    num_pages = [-(-kv_len // page_size) for kv_len in lens]
    page_ids = torch.randperm(sum(num_pages), generator=torch.Generator().manual_seed(page_size)).int()
    caches = torch.full((2, len(page_ids), page_size, NUM_KV_HEADS, HEAD_DIM), torch.nan, dtype=slices[0][0].q.dtype)
    block_table = torch.full((len(slices), max(num_pages)), -1, dtype=torch.int32)
    for seq_idx, ((sequence, _, end), pages) in enumerate(zip(slices, page_ids.split(num_pages), strict=True)):
        block_table[seq_idx, : len(pages)] = pages
        token = torch.arange(end)
        slot = pages[token // page_size].long(), token % page_size
        for cache, rows in zip(caches, (sequence.k, sequence.v), strict=True):
            cache[slot] = rows[:end]
    plan = mixattn.plan(
        starts, lens, num_q_heads=NUM_Q_HEADS, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM,
        kv_element_bytes=caches.element_size(), window_left=options.get("window_left"), invariant=invariant,
        hardware=dataclasses.replace(
            cpu_hardware(num_workers), item_overhead_s=0.0, invariant_split_tokens=SPLIT_TOKENS
        ),
    )  # fmt: skip
    return mixattn.attention(
        torch.cat([sequence.q[begin:end] for sequence, begin, end in slices]), *caches,
        cu_seqlens_q=torch.tensor(starts, dtype=torch.int32), seq_lens=torch.tensor(lens, dtype=torch.int32),
        block_table=block_table, plan=plan, invariant=invariant, return_lse=True, **options,
    )  # fmt: skip


def in_chunks(sequence: Sequence, chunks: tuple[int, ...], **options: Any) -> tuple[Tensor, Tensor]:
    """out and lse of all rows of a sequence, a step per chunk."""
    ends = list(itertools.accumulate(chunks))
    steps = [attend([(sequence, end - size, end)], **options) for size, end in zip(chunks, ends, strict=True)]
    return torch.cat([out for out, _ in steps]), torch.cat([lse for _, lse in steps])


def assert_same_bits(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for name, a, b in zip(("out", "lse"), got, expected, strict=True):
        assert not bool(b.isnan().any())
        assert torch.equal(a, b), f"{name} differs in {int((a != b).any(-1).sum())} of {len(b)} rows"


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_invariant_rows_of_every_chunking_have_the_bits_of_the_whole(
    dtype: torch.dtype, options: dict[str, Any], isa: str
) -> None:
    sequence = Sequence.random(NUM_TOKENS, dtype, seed=1)
    expected = in_chunks(sequence, WHOLE, **options)
    for chunks in CHUNKINGS:
        assert_same_bits(in_chunks(sequence, chunks, **options), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_invariant_rows_do_not_show_what_a_tree_mask_hides_from_their_company(dtype: torch.dtype, isa: str) -> None:
    """The last rows see a whole tile of 128 keys, of which row 5 does not see one."""
    sequence = Sequence.random(384, dtype, seed=1)
    masks = torch.full((2, 20), -1)
    masks[1, 5] = ~(1 << 3)
    results = [attend([(sequence, 364, 384)], tree_mask=mask) for mask in masks]
    others = torch.arange(20) != 5
    assert_same_bits(*((out[others], lse[others]) for out, lse in results))
    assert not torch.equal(results[0][0][5], results[1][0][5])


def test_default_rows_of_another_chunking_have_other_bits() -> None:
    """What the tests here look for is there to be found."""
    sequence = Sequence.random(NUM_TOKENS, torch.float32, seed=1)
    expected = in_chunks(sequence, WHOLE, invariant=False)
    for chunks in CHUNKINGS:
        out, _ = in_chunks(sequence, chunks, invariant=False)
        assert not torch.equal(out, expected[0])
        torch.testing.assert_close(out, expected[0])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("num_batch_mates", range(15))
def test_invariant_rows_beside_others_have_the_bits_of_the_rows_alone(
    num_batch_mates: int, options: dict[str, Any]
) -> None:
    request = Sequence.random(NUM_TOKENS, torch.float32, seed=1)
    begin = NUM_TOKENS - [1, 3, 40][num_batch_mates % 3]
    expected = attend([(request, begin, NUM_TOKENS)], **options)
    mates = []
    for n in range(num_batch_mates + 1):
        q_len, kv_len = MATES[(n + num_batch_mates) % len(MATES)]
        mates.append((Sequence.random(kv_len, torch.float32, seed=2 + n), kv_len - q_len, kv_len))
    before, after = mates[::2], mates[1::2]
    out, lse = attend([*before, (request, begin, NUM_TOKENS), *after], **options)
    first_row = sum(end - start for _, start, end in before)
    rows = slice(first_row, first_row + NUM_TOKENS - begin)
    assert_same_bits((out[rows], lse[rows]), expected)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_invariant_rows_have_the_same_bits_for_every_page_size_and_number_of_workers(
    dtype: torch.dtype, options: dict[str, Any], isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequence = Sequence.random(NUM_TOKENS, dtype, seed=1)
    slices = [(sequence, NUM_TOKENS - 30, NUM_TOKENS), (sequence, NUM_TOKENS - 1, NUM_TOKENS)]
    expected = attend(slices, **options)
    for page_size, num_workers, num_threads in itertools.product((1, 16, 64), (1, 2, 64), (1, 2)):
        monkeypatch.setattr(env, "num_threads", lambda n=num_threads: n)
        assert_same_bits(attend(slices, page_size=page_size, num_workers=num_workers, **options), expected)


def test_invariant_call_without_plan_makes_an_invariant_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a split of the default hardware's, 1024 tokens, a decode has the bits of the same row in a chunk."""
    case = AttentionCase("decode", (1,), (1500,))
    inputs = make_inputs(case, torch.float32)
    chunk_q = torch.randn(50, 4, 64, generator=torch.Generator().manual_seed(0))
    chunk_q[-1:] = inputs.q
    results = []
    for q, num_threads in ((inputs.q, 1), (inputs.q, 2), (chunk_q, 2)):
        monkeypatch.setattr(env, "num_threads", lambda n=num_threads: n)
        tensors = {**inputs.index_tensors, "cu_seqlens_q": torch.tensor([0, len(q)], dtype=torch.int32)}
        results.append(mixattn.attention(q, inputs.k_cache, inputs.v_cache, **tensors, invariant=True)[-1])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("case", CASES + SCORE_CASES, ids=lambda case: case.id)
def test_invariant_attention_of_named_case_is_within_twice_eager(case: AttentionCase, isa: str) -> None:
    inputs = make_inputs(case, torch.bfloat16)
    plan = mixattn.plan(
        inputs.cu_seqlens_q, inputs.seq_lens, **case.plan_options, invariant=True,
        hardware=dataclasses.replace(cpu_hardware(), invariant_split_tokens=128),
    )  # fmt: skip
    out, lse = mixattn.attention(
        inputs.q, inputs.k_cache, inputs.v_cache, **inputs.index_tensors, **inputs.score_tensors, **case.options,
        invariant=True, plan=plan, return_lse=True,
    )  # fmt: skip
    assert_attention_close(case, inputs, out, lse)


@pytest.mark.parametrize(
    ("invariant", "plan_options", "message"),
    [
        (True, {}, "plan was made for invariant False, this call has True"),
        (False, {"invariant": True}, "plan was made for invariant True, this call has False"),
        (
            True,
            {"invariant": True, "hardware": dataclasses.replace(cpu_hardware(), invariant_split_tokens=192)},
            "plan's invariant_split_tokens must be a multiple of 128, got 192",
        ),
    ],
)
def test_attention_with_plan_of_the_other_mode_is_refused(
    invariant: bool, plan_options: dict[str, Any], message: str
) -> None:
    case = AttentionCase("mode", (1,), (40,))
    inputs = make_inputs(case, torch.float32)
    plan = mixattn.plan(inputs.cu_seqlens_q, inputs.seq_lens, **case.plan_options, **plan_options)
    with pytest.raises(ValueError, match=message):
        mixattn.attention(
            inputs.q, inputs.k_cache, inputs.v_cache, **inputs.index_tensors, plan=plan, invariant=invariant
        )


def test_attention_with_plan_that_passes_a_multiple_is_refused() -> None:
    case = AttentionCase("forged", (1,), (400,))
    inputs = make_inputs(case, torch.float32)
    made = mixattn.plan(inputs.cu_seqlens_q, inputs.seq_lens, **case.plan_options, hardware=cpu_hardware(1))
    words = torch.from_numpy(made.buffer)
    words[14] = 128  # fixed_split_tokens
    with pytest.raises(ValueError, match="an item passes a multiple of its invariant_split_tokens, 128"):
        mixattn.attention(inputs.q, inputs.k_cache, inputs.v_cache, **inputs.index_tensors, plan=words, invariant=True)


def test_invariant_attention_by_the_reference_names_the_backend_that_has_it() -> None:
    inputs = make_inputs(AttentionCase("mode", (1,), (40,)), torch.float32)
    with pytest.raises(NotImplementedError, match=r"invariant is not supported by backend 'reference'; .*: cpu"):
        mixattn.attention(
            inputs.q, inputs.k_cache, inputs.v_cache, **inputs.index_tensors, invariant=True, backend="reference"
        )
