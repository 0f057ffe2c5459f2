"""Invariant attention in Triton: a row's bits are those of its own q and keys, whatever happens around it."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

import mixattn
from mixattn import env
from mixattn.ops.kv_dtypes import kv_format
from mixattn.ops.plan import plan
from mixattn.ops.reference import quantize_reference
from mixattn.triton_kernels.mixed_attention import mixed_attention
from mixattn.triton_kernels.tiles import MAX_BLOCK_N
from tests.cases import (
    CASES,
    SCORE_CASES,
    V_HEAD_DIM_CASES,
    AttentionCase,
    KvFormat,
    assert_attention_close,
    make_inputs,
)
from tests.triton.attention_run import hardware, prepare

NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM, V_HEAD_DIM = 3, 1, 16, 24
NUM_TOKENS = 150
SPLIT_TOKENS = 64
"""Of the plans here: the request has three splits, and its chunks' rows see one, two or all of them."""

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window_left": 70},
    "soft-cap-window-alibi-sinks": {
        "soft_cap": 3.0, "window_left": 90, "alibi_slopes": 0.1 ** torch.arange(1, 4),
        "sinks": torch.linspace(-1, 2, 3),
    },
}  # fmt: skip
CHUNKINGS = [
    (1, NUM_TOKENS - 1),
    (NUM_TOKENS - 5, *(1,) * 5),
    (64, 64, 22),
    (43, 43, 43, 21),
    (100, 5, 37, 8),
]
COMPANIES: list[list[tuple[int, int]]] = [[], [(1, 40), (7, 190)], [(50, 51), (0, 64), (1, 128)]]
"""(q_len, kv_len) of other sequences in the batch; half of them before the request."""
PAGE_SIZES = (1, 7, 16)
FORMATS = [
    (torch.float32, KvFormat(torch.float32)),
    (torch.bfloat16, KvFormat(torch.bfloat16)),
    (torch.float16, KvFormat(torch.int8, "token")),
    (torch.bfloat16, KvFormat(torch.uint8, "token")),
]


@pytest.fixture(autouse=True)
def sum_products_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the interpreter sum every row of a matrix product in the order of k, as hardware does (in some order).

    numpy's BLAS sums rows at the edge of its own tiles in another order than the others.
    """
    if not env.triton_interpret():
        return

    def create_dot(builder: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        total = np.zeros_like(d.data)
        for k in range(a.data.shape[1]):
            total += a.data[:, k, None].astype(total.dtype) * b.data[None, k, :]
        return interpreter.TensorHandle(total + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@dataclass(frozen=True)
class Sequence:
    """q of a whole sequence [num_tokens, heads, HEAD_DIM], and its k, v and their scales as they are stored.

    k is [num_tokens, kv heads, HEAD_DIM] of real values, v with V_HEAD_DIM.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None

    @classmethod
    def random(cls, num_tokens: int, dtype: torch.dtype, kv: KvFormat, seed: int) -> Sequence:
        generator = torch.Generator().manual_seed(seed)
        q = torch.randn(num_tokens, NUM_Q_HEADS, HEAD_DIM, generator=generator).to(dtype)
        # Magnitudes that differ from token to token, and so do the scales.
        kv_rows = [
            torch.randn(num_tokens, NUM_KV_HEADS, size, generator=generator)
            * 2.0 ** torch.randint(-3, 4, (num_tokens, 1, 1), generator=generator)
            for size in (HEAD_DIM, V_HEAD_DIM)
        ]
        if kv_format(kv.dtype) is None:
            return cls(q, *(rows.to(kv.dtype) for rows in kv_rows), None, None)
        (k, k_scale), (v, v_scale) = (quantize_reference(rows, kv.dtype) for rows in kv_rows)
        return cls(q, k, v, k_scale, v_scale)


def attend(
    slices: list[tuple[Sequence, int, int]],
    device: torch.device,
    *,
    page_size: int = 16,
    invariant: bool = True,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """out and lse of one step: of each slice the rows [begin, end) of its sequence, over the keys [0, end)."""
    starts = [0, *itertools.accumulate(end - begin for _, begin, end in slices)]
    lens = [end for _, _, end in slices]
    num_pages = [-(-kv_len // page_size) for kv_len in lens]
    page_ids = torch.randperm(sum(num_pages), generator=torch.Generator().manual_seed(page_size)).int()
    block_table = torch.full((len(slices), max(num_pages)), 2**31 - 1, dtype=torch.int32)
    pools: dict[str, Tensor | None] = {}
    for name in ("k", "v", "k_scale", "v_scale"):
        of_first = getattr(slices[0][0], name)
        pools[name] = None
        if of_first is not None:
            poison = torch.nan if of_first.dtype.is_floating_point else 77
            pools[name] = torch.full((len(page_ids), page_size, *of_first.shape[1:]), poison, dtype=of_first.dtype)
    for seq_idx, ((sequence, _, end), pages) in enumerate(zip(slices, page_ids.split(num_pages), strict=True)):
        block_table[seq_idx, : len(pages)] = pages
        token = torch.arange(end)
        slot = pages[token // page_size].long(), token % page_size
        for name, pool in pools.items():
            if pool is not None:
                pool[slot] = getattr(sequence, name)[:end]
    q = torch.cat([sequence.q[begin:end] for sequence, begin, end in slices]).to(device)
    work_plan = plan(
        starts, lens, num_q_heads=NUM_Q_HEADS, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM, v_head_dim=V_HEAD_DIM,
        kv_element_bytes=2, window_left=options.get("window_left"), invariant=invariant,
        hardware=dataclasses.replace(hardware(8, SPLIT_TOKENS), invariant_split_tokens=SPLIT_TOKENS),
    )  # fmt: skip
    out = q.new_full((*q.shape[:2], V_HEAD_DIM), torch.nan)
    lse = torch.full(q.shape[:2], torch.nan, device=device)
    k_cache, v_cache, k_scale, v_scale = (None if pool is None else pool.to(device) for pool in pools.values())
    assert k_cache is not None and v_cache is not None
    mixed_attention(
        q, k_cache, v_cache, torch.tensor(starts, dtype=torch.int32, device=device),
        torch.tensor(lens, dtype=torch.int32, device=device), block_table.to(device),
        torch.from_numpy(work_plan.buffer).to(device), out, lse,
        torch.full((work_plan.num_partial_rows, V_HEAD_DIM), torch.nan, device=device),
        torch.full((work_plan.num_partial_rows,), torch.nan, device=device),
        torch.zeros(1 + work_plan.num_merges, dtype=torch.int32, device=device),
        softmax_scale=HEAD_DIM**-0.5, causal=True, kv_format=kv_format(k_cache.dtype), k_scale=k_scale,
        v_scale=v_scale, invariant=invariant,
        **{
            "window_left": None, "soft_cap": None,
            **{name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()},
        },
    )  # fmt: skip
    return out.cpu(), lse.cpu()


def in_chunks(
    sequence: Sequence,
    chunks: tuple[int, ...],
    mates: list[tuple[Sequence, int, int]],
    device: torch.device,
    **how: Any,
) -> tuple[Tensor, Tensor]:
    """out and lse of all rows of a sequence, a step per chunk, each step with these mates."""
    before, after = mates[: len(mates) // 2], mates[len(mates) // 2 :]
    first_row = sum(end - begin for _, begin, end in before)
    outs, lses = [], []
    for size, end in zip(chunks, itertools.accumulate(chunks), strict=True):
        out, lse = attend([*before, (sequence, end - size, end), *after], device, **how)
        outs.append(out[first_row : first_row + size])
        lses.append(lse[first_row : first_row + size])
    return torch.cat(outs), torch.cat(lses)


def assert_same_bits(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for name, a, b in zip(("out", "lse"), got, expected, strict=True):
        assert not bool(b.isnan().any())
        assert torch.equal(a, b), f"{name} differs in {int((a != b).any(-1).sum())} of {len(b)} rows"


def make_mates(company: list[tuple[int, int]], dtype: torch.dtype, kv: KvFormat) -> list[tuple[Sequence, int, int]]:
    return [
        (Sequence.random(kv_len, dtype, kv, seed=2 + n), kv_len - q_len, kv_len)
        for n, (q_len, kv_len) in enumerate(company)
    ]


@pytest.mark.parametrize(
    ("dtype", "kv", "company", "page_size"),
    [
        pytest.param(
            dtype, kv, company, page_size, id=f"{dtype}-{kv.id}-{len(company)}-mates-page{page_size}",
            marks=[] if f == 0 or c == p == f - 1 else pytest.mark.slow,
        )
        for f, (dtype, kv) in enumerate(FORMATS)
        for c, company in enumerate(COMPANIES)
        for p, page_size in enumerate(PAGE_SIZES)
    ],
)  # fmt: skip
def test_invariant_rows_of_every_chunking_company_and_page_size_have_the_bits_of_the_whole(
    dtype: torch.dtype, kv: KvFormat, company: list[tuple[int, int]], page_size: int, device: torch.device
) -> None:
    sequence = Sequence.random(NUM_TOKENS, dtype, kv, seed=1)
    mates = make_mates(company, dtype, kv)
    expected = in_chunks(sequence, (NUM_TOKENS,), [], device, page_size=16)
    for chunks in CHUNKINGS:
        assert_same_bits(in_chunks(sequence, chunks, mates, device, page_size=page_size), expected)


@pytest.mark.parametrize("options", [*OPTIONS.values()][1:], ids=[*OPTIONS][1:])
def test_invariant_rows_with_score_options_have_the_bits_of_the_whole(
    options: dict[str, Any], device: torch.device
) -> None:
    dtype, kv = FORMATS[2]
    sequence = Sequence.random(NUM_TOKENS, dtype, kv, seed=1)
    expected = in_chunks(sequence, (NUM_TOKENS,), [], device, **options)
    for chunks, company, page_size in zip(CHUNKINGS, COMPANIES * 2, PAGE_SIZES * 2, strict=False):
        mates = make_mates(company, dtype, kv)
        assert_same_bits(in_chunks(sequence, chunks, mates, device, page_size=page_size, **options), expected)


def test_default_rows_of_another_chunking_have_other_bits(device: torch.device) -> None:
    """What the tests here look for is there to be found."""
    sequence = Sequence.random(NUM_TOKENS, *FORMATS[0], seed=1)
    expected = in_chunks(sequence, (NUM_TOKENS,), [], device, invariant=False)
    outs = [in_chunks(sequence, chunks, [], device, invariant=False)[0] for chunks in CHUNKINGS]
    for out in outs:
        torch.testing.assert_close(out, expected[0])
    assert sum(not torch.equal(out, expected[0]) for out in outs) >= 3


NAMED = (
    "q1-kv100-page16-gqa3", "chunk-beside-decodes", "q-without-keys", "splits-chunk-beside-decodes",
    "non-causal-window", "sinks-rows-without-keys", "tree-splits", "head-dim-256",
    "v128-of-192-splits",
)  # fmt: skip


@pytest.mark.parametrize("case_id", NAMED)
def test_invariant_attention_of_named_case_is_within_twice_eager(case_id: str, device: torch.device) -> None:
    case = next(case for case in CASES + SCORE_CASES + V_HEAD_DIM_CASES if case.id == case_id)
    inputs = make_inputs(case, torch.bfloat16)
    run = prepare(case, torch.bfloat16, device, inputs=inputs, invariant=True)
    run.launch()
    assert_attention_close(case, inputs, run.out.cpu(), run.lse.cpu())
    assert not run.tickets.any()


def test_attention_with_plan_whose_splits_do_not_fit_the_tiles_is_refused(device: torch.device) -> None:
    case = AttentionCase("mode", (1,), (400,))
    inputs = make_inputs(case, torch.float32).to(device)
    for granule, forged, message in (
        (192, None, f"plan's invariant_split_tokens must be a multiple of {max(MAX_BLOCK_N)}, got 192"),
        (1024, 128, "plan is not invariant: an item passes a multiple of its invariant_split_tokens, 128"),
    ):
        made = plan(
            inputs.cu_seqlens_q.cpu(), inputs.seq_lens.cpu(), **case.plan_options, invariant=True,
            hardware=dataclasses.replace(hardware(1, 64), invariant_split_tokens=granule),
        )  # fmt: skip
        words = torch.from_numpy(made.buffer)
        if forged is not None:
            words[14] = forged
        with pytest.raises(ValueError, match=message):
            mixattn.attention(
                inputs.q, inputs.k_cache, inputs.v_cache, **inputs.index_tensors, plan=words, invariant=True,
                backend="triton",
            )  # fmt: skip
