"""The named batches that every attention kernel meets, their tensors, and the bound that it is held to.

Nothing that a kernel has no business reading is harmless here: every slot of the caches that no row may see holds NaN,
pages are handed out in shuffled order, and block-table entries past a sequence's last page are out of range.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mixattn.ops.kv_dtypes import QUANTIZED, Scale, v_head_dim
from mixattn.ops.reference import attention_reference, dequantize_reference, quantize_reference, visible_keys
from mixattn.ops.tree_mask import tree_mask

UNUSED_BLOCK_ID = 2**31 - 1
"""Fills the block table past a sequence's last page; to read it is an error that shows."""

ROW_FLOOR_ULPS = {torch.float32: 16.0, torch.bfloat16: 0.5, torch.float16: 0.5}
"""The floor of a row's error, in units of eps(dtype) * (largest |v| that a row could return).

Half an eps is one rounding of the output: eager may be lucky on a row, no kernel need be. In float32 there is no final
rounding to hide in: a sum of head_dim products and an exponential, in another order than eager's, come to 16 eps.
"""
LSE_FLOOR = 2e-6
"""The floor of lse's error, times 1 + |lse|: scores are accumulated in float32 whatever the inputs' dtype."""


@dataclass(frozen=True)
class AttentionCase:
    """One batch, by name.

    Args:
        num_workers: workers of the plan; None leaves the plan to the machine. Many workers force splits.
        logit_std: standard deviation of the scaled scores; 1 is smooth, 8 is nearly one-hot.
        alibi: whether there are ALiBi slopes, and whether one set for all sequences or one for each.
        has_sinks: whether each query head has a sink.
        tree_mask: the word of every row.
        shared_pages: with how many pages of the sequence before it each sequence begins; () for none.
        v_head_dim: None is head_dim.
    """

    id: str
    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    causal: bool = True
    window_left: int | None = None
    soft_cap: float | None = None
    softmax_scale: float | None = None
    num_workers: int | None = None
    logit_std: float = 1.0
    alibi: Literal["per-head", "per-seq"] | None = None
    has_sinks: bool = False
    tree_mask: tuple[int, ...] | None = None
    shared_pages: tuple[int, ...] = ()
    v_head_dim: int | None = None

    @property
    def total_q(self) -> int:
        return sum(self.q_lens)

    @property
    def value_dim(self) -> int:
        return self.head_dim if self.v_head_dim is None else self.v_head_dim

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of ``attention`` that are not tensors."""
        return {
            "softmax_scale": self.softmax_scale,
            "causal": self.causal,
            "window_left": self.window_left,
            "soft_cap": self.soft_cap,
        }

    @property
    def plan_options(self) -> dict[str, Any]:
        """The keyword arguments of ``plan`` that describe the shape."""
        return {
            "num_q_heads": self.num_q_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "v_head_dim": self.v_head_dim,
            "causal": self.causal,
            "window_left": self.window_left,
        }


@dataclass(frozen=True)
class KvFormat:
    """What a case's K and V are stored as.

    Args:
        scale: of each token and head, of each head, one for all, or None given.
    """

    dtype: torch.dtype
    scale: Literal["token", "head", "one"] | None = None

    @property
    def id(self) -> str:
        name = QUANTIZED[self.dtype].name if self.dtype in QUANTIZED else str(self.dtype).removeprefix("torch.")
        return f"{name}-{self.scale}" if self.scale else name


QUANTIZED_FORMATS = [
    KvFormat(torch.int8, "token"),
    KvFormat(torch.float8_e4m3fn, "token"),
    KvFormat(torch.float8_e5m2, "head"),
    KvFormat(torch.uint8, "token"),
    KvFormat(torch.int8, "head"),
    KvFormat(torch.float8_e4m3fn),
    KvFormat(torch.float8_e5m2, "token"),
    KvFormat(torch.uint8, "head"),
    KvFormat(torch.int8, "one"),
    KvFormat(torch.float8_e4m3fn, "one"),
    KvFormat(torch.float8_e5m2),
    KvFormat(torch.uint8, "one"),
]
"""Four neighbours are the four dtypes."""


@dataclass(frozen=True)
class AttentionInputs:
    """The tensors of a case; shapes as STYLE.md's table names them."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    cu_seqlens_q: Tensor
    seq_lens: Tensor
    block_table: Tensor
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    tree_mask: Tensor | None = None
    k_scale: Scale = None
    v_scale: Scale = None

    @property
    def index_tensors(self) -> dict[str, Tensor]:
        """The keyword arguments of ``attention`` that are tensors and must be given."""
        return {"cu_seqlens_q": self.cu_seqlens_q, "seq_lens": self.seq_lens, "block_table": self.block_table}

    @property
    def score_tensors(self) -> dict[str, Tensor]:
        """The keyword arguments of ``attention`` that are tensors and that this case has."""
        named = {"alibi_slopes": self.alibi_slopes, "sinks": self.sinks, "tree_mask": self.tree_mask}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def scales(self) -> dict[str, Scale]:
        """The keyword arguments of ``attention`` that go with quantised caches."""
        return {"k_scale": self.k_scale, "v_scale": self.v_scale}

    def to(self, device: torch.device | str) -> AttentionInputs:
        values = (getattr(self, name) for name in self.__dataclass_fields__)
        return AttentionInputs(*(value.to(device) if isinstance(value, Tensor) else value for value in values))


def store(cache: Tensor, kv: KvFormat) -> tuple[Tensor, Scale]:
    """A cache in this format and its scales, from real values; where they are NaN, what must not be read is left.

    That is NaN where the elements or the scales can hold it, and the largest stored magnitude in the integers.
    """
    if kv.dtype not in QUANTIZED:
        return cache.to(kv.dtype), None
    rows = cache.flatten(0, 1)
    largest = rows.nan_to_num().abs().amax(dim=(0, 2)).clamp(min=1.0)  # [num_kv_heads]
    scale: Scale = None
    if kv.scale == "head":
        scale = largest / QUANTIZED[kv.dtype].row_max
    elif kv.scale == "one":
        scale = float(largest.max()) / QUANTIZED[kv.dtype].row_max
    stored, row_scales = quantize_reference(rows, kv.dtype, 1.0 if kv.scale is None else scale)
    if not kv.dtype.is_floating_point:
        stored[rows.isnan().any(dim=-1)] = 0 if kv.dtype == torch.uint8 else -128
    if row_scales is not None:
        scale = row_scales.unflatten(0, cache.shape[:2])
    return stored.unflatten(0, cache.shape[:2]), scale


def make_inputs(
    case: AttentionCase, dtype: torch.dtype, *, seed: int = 0, kv: KvFormat | None = None
) -> AttentionInputs:
    """Random tensors of the case's shapes on the CPU; the same seed gives the same values in every dtype, rounded.

    Args:
        kv: what K and V are stored as; None is ``dtype``.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    pages_per_seq = [-(-kv_len // case.page_size) for kv_len in case.kv_lens]
    shared_per_seq = case.shared_pages or (0,) * len(case.kv_lens)
    num_unread_pages = 2
    num_pages = sum(pages_per_seq) - sum(shared_per_seq) + num_unread_pages
    page_ids = torch.randperm(num_pages, generator=generator, dtype=torch.int32)
    block_table = torch.full((len(case.kv_lens), max([*pages_per_seq, 1]) + 1), UNUSED_BLOCK_ID, dtype=torch.int32)
    words = None if case.tree_mask is None else torch.tensor(case.tree_mask, dtype=torch.int64)
    k_cache, v_cache = (
        torch.full((num_pages, case.page_size, case.num_kv_heads, width), torch.nan)
        for width in (case.head_dim, case.value_dim)
    )
    row = 0
    lens = zip(case.q_lens, case.kv_lens, pages_per_seq, shared_per_seq, strict=True)
    for seq_idx, (q_len, kv_len, num_used, num_shared) in enumerate(lens):
        pages, page_ids = page_ids[: num_used - num_shared], page_ids[num_used - num_shared :]
        if num_shared > 0:  # their keys are there already
            assert num_shared * case.page_size <= min(case.kv_lens[seq_idx - 1 : seq_idx + 1])
            block_table[seq_idx, :num_shared] = block_table[seq_idx - 1, :num_shared]
        block_table[seq_idx, num_shared:num_used] = pages
        slice_words = None if words is None else words[row : row + q_len]
        mask = visible_keys(
            q_len, kv_len, causal=case.causal, window_left=case.window_left, tree_mask=slice_words
        )  # fmt: skip
        is_seen = mask.any(dim=0)
        is_seen[: case.page_size * max(shared_per_seq[seq_idx : seq_idx + 2])] = True  # by a neighbour
        row += q_len
        for cache in (k_cache, v_cache):
            rows = normal(num_used * case.page_size, case.num_kv_heads, cache.shape[3])
            rows[kv_len:] = torch.nan
            rows[:kv_len][~is_seen] = torch.nan
            cache[pages.long()] = rows.unflatten(0, (num_used, case.page_size))[num_shared:]
    scale = case.head_dim**-0.5 if case.softmax_scale is None else case.softmax_scale
    q = normal(case.total_q, case.num_q_heads, case.head_dim) * (case.logit_std / (scale * case.head_dim**0.5))
    cu_seqlens_q = torch.tensor([0, *case.q_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    (k_cache, k_scale), (v_cache, v_scale) = (
        store(cache, KvFormat(dtype) if kv is None else kv) for cache in (k_cache, v_cache)
    )
    return AttentionInputs(
        q=q.to(dtype),
        k_cache=k_cache,
        v_cache=v_cache,
        cu_seqlens_q=cu_seqlens_q,
        seq_lens=torch.tensor(case.kv_lens, dtype=torch.int32),
        block_table=block_table,
        alibi_slopes=_alibi_slopes(case),
        sinks=normal(case.num_q_heads) if case.has_sinks else None,
        tree_mask=words,
        k_scale=k_scale,
        v_scale=v_scale,
    )


def poisoned_out(inputs: AttentionInputs) -> Tensor:
    """An ``out`` for the tensors of a case, filled with NaN."""
    return inputs.q.new_full((*inputs.q.shape[:-1], v_head_dim(inputs.v_cache)), torch.nan)


MOST_ELEMENT_BYTES = 16
"""That a plan can be priced for: reads are then so dear that to share any page is worth a group."""


def plan_arguments(case: AttentionCase, inputs: AttentionInputs) -> dict[str, Any]:
    """The keyword arguments of ``plan`` for a case's tensors: with its block table if it has shared pages."""
    if not case.shared_pages:
        return {**case.plan_options, "kv_element_bytes": inputs.k_cache.element_size()}
    table = {"block_table": inputs.block_table.cpu(), "page_size": case.page_size}
    return {**case.plan_options, "kv_element_bytes": MOST_ELEMENT_BYTES, **table}


def _alibi_slopes(case: AttentionCase) -> Tensor | None:
    """The slopes of ALiBi's authors, 2^(-8 h / num_q_heads) for head h from 1; each sequence's half the last one's."""
    if case.alibi is None:
        return None
    slopes = 2.0 ** (-8.0 * torch.arange(1, case.num_q_heads + 1) / case.num_q_heads)
    if case.alibi == "per-head":
        return slopes
    return 0.5 ** torch.arange(len(case.kv_lens))[:, None] * slopes


def assert_attention_close(case: AttentionCase, inputs: AttentionInputs, out: Tensor, lse: Tensor | None) -> None:
    """Every row of ``out`` is within 2x of eager's own error in that dtype plus a floor; lse within its floor.

    A row is one query token of one head; its error is the largest over head_dim, against float64.
    """
    arguments = (inputs.q, inputs.k_cache, inputs.v_cache)
    options = {**inputs.index_tensors, **inputs.score_tensors, **inputs.scales, **case.options}
    true_out, true_lse = attention_reference(*arguments, **options, compute_dtype=torch.float64)
    eager_out, _ = attention_reference(*arguments, **options, compute_dtype=out.dtype)
    real_v = dequantize_reference(inputs.v_cache, inputs.v_scale, compute_dtype=torch.float64).nan_to_num()
    largest_v = real_v.abs().max() if real_v.numel() else torch.tensor(0.0)
    floor = ROW_FLOOR_ULPS[out.dtype] * torch.finfo(out.dtype).eps * largest_v
    allowed = 2 * row_error(eager_out, true_out) + floor
    error = row_error(out, true_out)
    assert bool((error <= allowed).all()), (  # NaN compares false, so a NaN anywhere fails
        f"{case.id} {out.dtype}: {int((~(error <= allowed)).sum())} of {error.numel()} rows off, the worst "
        f"{float((error / allowed).nan_to_num(torch.inf).max()):.3g} times what is allowed"
    )
    # A row without keys may yet have a sink, and then a finite lse.
    assert bool((out[(true_out == 0).all(dim=-1)] == 0).all()), f"{case.id}: a row without keys is not 0"
    is_empty = true_lse == -torch.inf
    if lse is None:
        return
    assert lse.dtype == torch.float32
    assert bool((lse[is_empty] == -torch.inf).all()), f"{case.id}: lse of a row without keys is not -inf"
    lse_error = (lse.double() - true_lse)[~is_empty].abs()
    allowed_lse = (LSE_FLOOR * (1 + true_lse.abs()) + _query_rounding(case, inputs))[~is_empty]
    assert bool((lse_error <= allowed_lse).all()), (
        f"{case.id} {out.dtype}: lse off by {float((lse_error / allowed_lse).nan_to_num(torch.inf).max()):.3g} times "
        "what is allowed"
    )


def _query_rounding(case: AttentionCase, inputs: AttentionInputs) -> Tensor | float:
    """What a score may lose where a 16-bit q meets int8 keys: q may then be rounded to 2^-16 of the row's largest."""
    if inputs.q.dtype == torch.float32 or inputs.k_cache.dtype != torch.int8:
        return 0.0
    keys = dequantize_reference(inputs.k_cache, inputs.k_scale, compute_dtype=torch.float64).nan_to_num()
    scale = case.head_dim**-0.5 if case.softmax_scale is None else case.softmax_scale
    return 2.0**-16 * inputs.q.double().abs().amax(dim=-1) * keys.abs().sum(dim=-1).max() * scale


def row_error(out: Tensor, truth: Tensor) -> Tensor:
    """[total_q, num_q_heads] float64: the largest absolute error of each row."""
    return (out.double() - truth).abs().amax(dim=-1)


CASES = [
    # One decode: the row alone, over lengths around a page edge, groups and pages of every kind.
    AttentionCase("q1-kv4096-page16-gqa8", (1,), (4096,), num_q_heads=8, num_kv_heads=1),
    AttentionCase("q1-kv1-page16-gqa2", (1,), (1,)),
    AttentionCase("q1-kv33-page16-mha", (1,), (33,), num_q_heads=2, num_kv_heads=2),
    AttentionCase("q1-kv100-page16-gqa3", (1,), (100,), num_q_heads=6, num_kv_heads=2),
    AttentionCase("q1-kv15,16,17-page16-gqa3", (1, 1, 1), (15, 16, 17), num_q_heads=3, num_kv_heads=1),
    AttentionCase("q1-kv63,64,65-page64-gqa8", (1, 1, 1), (63, 64, 65), num_q_heads=8, num_kv_heads=1, page_size=64),
    AttentionCase("q1-kv6,7,8-page7-gqa2", (1, 1, 1), (6, 7, 8), page_size=7),
    AttentionCase("q1-kv37-page1-gqa2", (1,), (37,), page_size=1),
    # Chunks: whole prompts, chunks behind a context, rows around the tile sizes 16, 64 and 128.
    AttentionCase("q17-kv17-page16-gqa2", (17,), (17,)),
    AttentionCase("q65-kv200-page16-gqa3", (65,), (200,), num_q_heads=6, num_kv_heads=2),
    AttentionCase("q129-kv130-page7-mha", (129,), (130,), num_q_heads=2, num_kv_heads=2, page_size=7),
    AttentionCase("q40-kv100-page1-gqa8", (40,), (100,), num_q_heads=8, num_kv_heads=1, page_size=1),
    AttentionCase("q15,16,17-kv31,32,33-page16-gqa2", (15, 16, 17), (31, 32, 33)),
    # Mixed batches, what this project is for.
    AttentionCase("chunk-beside-decodes", (1, 1, 70, 1, 1), (40, 129, 150, 1, 300), num_q_heads=8, num_kv_heads=2),
    AttentionCase("one-long-among-many-short", (1,) * 9, (20, 3, 1500, 17, 64, 5, 1, 33, 16)),
    AttentionCase("two-chunks-and-verify-rows", (33, 5, 1, 50), (33, 90, 77, 114), num_q_heads=6, num_kv_heads=2),
    # Rows and slices with nothing to see.
    AttentionCase("empty-slices-between", (0, 1, 0, 3, 0), (0, 5, 20, 3, 0)),
    AttentionCase("q-without-keys", (3, 1), (0, 20)),
    AttentionCase("q20-kv6-longer-than-keys", (20, 1), (6, 6)),
    AttentionCase("no-sequences", (), ()),
    # Head dimensions.
    AttentionCase("head-dim-8", (1, 20), (50, 60), head_dim=8),
    AttentionCase("head-dim-40", (1, 20), (50, 60), head_dim=40),
    AttentionCase("head-dim-96", (1, 20), (50, 60), head_dim=96),
    AttentionCase("head-dim-128", (1, 20), (50, 60), head_dim=128),
    AttentionCase("head-dim-256", (1, 20), (50, 60), head_dim=256),
    # Splits, forced by a plan for many workers.
    AttentionCase("splits-q1-kv1000-gqa8", (1,), (1000,), num_q_heads=8, num_kv_heads=1, num_workers=64),
    AttentionCase("splits-chunk-beside-decodes", (1, 30, 1), (700, 400, 90), num_workers=64),
    AttentionCase("splits-page7-window", (1, 9), (600, 300), page_size=7, window_left=250, num_workers=64),
    AttentionCase("splits-rows-without-keys", (40, 1), (25, 500), num_workers=64),
    # Masks and score functions.
    AttentionCase("window-q1", (1, 1, 1), (5, 64, 300), window_left=63),
    AttentionCase("window-0-sees-itself", (1, 20), (40, 50), window_left=0),
    AttentionCase("window-chunk-beside-decodes", (1, 70, 1), (90, 200, 33), window_left=31),
    AttentionCase("soft-cap", (1, 30), (100, 70), soft_cap=5.0, logit_std=4.0),
    AttentionCase("soft-cap-window-splits", (1, 30), (400, 300), soft_cap=2.0, window_left=150, num_workers=64),
    AttentionCase("non-causal", (1, 20, 3), (50, 60, 1), causal=False),
    AttentionCase("non-causal-window", (1, 20), (50, 60), causal=False, window_left=10),
    AttentionCase("scale-and-peaked-scores", (1, 40), (300, 90), softmax_scale=0.3, logit_std=8.0),
]


def causal_words(num_rows: int) -> tuple[int, ...]:
    """The tree_mask words of rows that see all before them."""
    return (-1,) * num_rows


def tree_words(*parents: int | None) -> tuple[int, ...]:
    """The tree_mask words of one slice."""
    return tuple(tree_mask(parents).tolist())


# Two branches of two, a root's lonely child, and a second root.
SMALL_TREE = tree_words(None, 0, 0, 1, 2, 0, None)
# 64 rows, the most: a binary tree. Row 63 sees row 0, with the word's last bit.
BINARY_TREE = tree_words(None, *((row - 1) // 2 for row in range(1, 64)))
# Every third row hides its own key, so that nobody sees it, and the rows between see the context and themselves.
HIDDEN_KEYS = tuple(0 if row % 3 == 0 else 1 for row in range(20))

SCORE_CASES = [
    # ALiBi.
    AttentionCase("alibi-q1-gqa8", (1, 1), (300, 17), num_q_heads=8, num_kv_heads=1, alibi="per-head"),
    AttentionCase("alibi-mha-page7", (1, 5, 40), (33, 90, 70), num_q_heads=2, page_size=7, alibi="per-head"),
    AttentionCase("alibi-per-seq-chunk-beside-decodes", (1, 70, 1), (129, 150, 40), alibi="per-seq", num_q_heads=6),
    AttentionCase("alibi-non-causal", (1, 20, 30), (50, 60, 7), causal=False, alibi="per-head"),
    AttentionCase(
        "alibi-soft-cap-window-splits", (1, 30), (400, 300), soft_cap=2.0, window_left=150, num_workers=64,
        alibi="per-seq",
    ),
    # Sinks.
    AttentionCase("sinks-q1-gqa3", (1, 1), (300, 17), num_q_heads=6, has_sinks=True),
    AttentionCase("sinks-chunk-beside-decodes", (1, 70, 1, 3), (129, 150, 40, 1), page_size=1, has_sinks=True),
    AttentionCase("sinks-rows-without-keys", (3, 20, 40, 1), (0, 6, 25, 500), num_workers=64, has_sinks=True),
    AttentionCase("sinks-soft-cap-window-splits", (1, 30), (400, 300), soft_cap=2.0, window_left=150, num_workers=64,
                  has_sinks=True),
    # Trees.
    AttentionCase("tree-gqa1", (7,), (40,), num_q_heads=2, tree_mask=SMALL_TREE),
    AttentionCase("tree-gqa3-page1", (7, 7), (7, 130), num_q_heads=6, page_size=1, tree_mask=SMALL_TREE * 2),
    AttentionCase("tree-gqa8-page7-head-dim-128", (7,), (201,), num_q_heads=8, num_kv_heads=1, head_dim=128,
                  page_size=7, tree_mask=SMALL_TREE),
    AttentionCase("tree-of-64-rows", (64, 64), (64, 150), tree_mask=BINARY_TREE * 2),
    AttentionCase("tree-beside-chunk-and-decodes", (1, 7, 90, 1), (60, 30, 150, 1), num_q_heads=8,
                  tree_mask=(*causal_words(1), *SMALL_TREE, *causal_words(91))),
    AttentionCase("tree-window", (7, 64), (100, 90), window_left=20, tree_mask=(*SMALL_TREE, *BINARY_TREE)),
    AttentionCase("tree-splits", (7, 64), (500, 120), num_workers=64, tree_mask=(*SMALL_TREE, *BINARY_TREE)),
    # A chunk longer than a word: keys 64 and more before a row are seen whatever its word.
    AttentionCase("tree-words-0-in-long-chunk", (150, 100), (150, 180), num_q_heads=2, tree_mask=(0,) * 250),
    AttentionCase("tree-keys-that-no-row-sees", (20, 20), (20, 90), tree_mask=HIDDEN_KEYS * 2),
    AttentionCase("tree-rows-that-see-nothing", (5, 40, 3), (5, 40, 33), tree_mask=(0,) * 48),
    AttentionCase("tree-q20-kv6-longer-than-keys", (20,), (6,), tree_mask=HIDDEN_KEYS),
    # All together.
    AttentionCase("scores-q1-head-dim-256", (1, 1), (130, 20), head_dim=256, alibi="per-head", has_sinks=True),
    AttentionCase(
        "scores-tree-beside-chunk-and-decodes", (1, 7, 70, 0, 1), (60, 30, 150, 9, 1), num_q_heads=6, head_dim=128,
        window_left=40, soft_cap=5.0, logit_std=4.0, alibi="per-seq", has_sinks=True,
        tree_mask=(*causal_words(1), *SMALL_TREE, *causal_words(71)),
    ),
    AttentionCase(
        "scores-splits", (1, 64, 30, 20), (700, 400, 90, 12), num_q_heads=8, page_size=7, num_workers=64,
        alibi="per-head", has_sinks=True, tree_mask=(-1, *BINARY_TREE, *causal_words(30), *HIDDEN_KEYS),
    ),
]  # fmt: skip
"""ALiBi, sinks and tree masks: the cases of the backends that have them (``attention_call.BACKENDS_WITH``)."""

PREFIX_CASES = [
    # Decodes of a shared prefix: one page, many; groups of rows in a small, a medium and a large tile.
    AttentionCase("prefix-of-1-page16-mha", (1, 1, 1), (17, 40, 20), num_q_heads=2, shared_pages=(0, 1, 1)),
    AttentionCase("prefix-of-2-decodes-gqa4", (1, 1), (331, 270), num_q_heads=8, shared_pages=(0, 16)),
    AttentionCase("prefix-of-9-decodes-page7-gqa3", (1,) * 9, tuple(range(120, 129)), num_q_heads=6, page_size=7,
                  shared_pages=(0,) + (14,) * 8),
    AttentionCase("prefix-of-40-decodes-page16-gqa4", (1,) * 40, tuple(100 + i for i in range(40)), num_q_heads=4,
                  num_kv_heads=1, shared_pages=(0,) + (6,) * 39),
    AttentionCase("prefix-gqa8-head-dim-128", (1,) * 5, (140, 150, 160, 129, 200), num_q_heads=16, head_dim=128,
                  shared_pages=(0, 8, 8, 8, 8)),
    AttentionCase("prefix-head-dim-256", (2,) * 20, (70,) * 20, num_q_heads=6, head_dim=256,
                  shared_pages=(0,) + (4,) * 19),
    AttentionCase("prefix-page1-head-dim-96", (1, 1, 1), (60, 61, 70), head_dim=96, page_size=1,
                  shared_pages=(0, 59, 59)),
    # Own keys: one behind the prefix, and as many as the longest of some.
    AttentionCase("prefix-is-all-but-the-row", (1, 1, 1, 1), (129, 129, 129, 129), shared_pages=(0, 8, 8, 8)),
    AttentionCase("prefix-splits", (1, 1, 1, 1), (600, 700, 530, 1300), num_workers=64, shared_pages=(0, 32, 32, 32)),
    AttentionCase("prefix-splits-of-verify-rows", (3, 4, 1, 2), (600, 700, 530, 900), num_workers=64, has_sinks=True,
                  shared_pages=(0, 30, 30, 30)),
    # Beside what shares nothing, and longer prefixes within shorter ones.
    AttentionCase("prefix-beside-chunk-and-decodes", (1, 1, 70, 1, 1, 1, 0, 1, 1),
                  (90, 99, 150, 40, 200, 230, 9, 80, 99), num_q_heads=8, shared_pages=(0, 5, 4, 0, 0, 12, 0, 0, 4)),
    AttentionCase("prefix-within-prefix", (1,) * 8, (200, 210, 330, 350, 340, 100, 90, 95),
                  shared_pages=(0, 2, 2, 20, 20, 2, 5, 2)),
    # Scores.
    AttentionCase("prefix-sinks-soft-cap", (1, 2, 1, 1), (200, 170, 190, 300), has_sinks=True, soft_cap=5.0,
                  logit_std=4.0, shared_pages=(0, 10, 10, 10)),
    AttentionCase("prefix-non-causal", (1, 3, 2), (200, 170, 190), causal=False, shared_pages=(0, 10, 10)),
    AttentionCase("prefix-trees-beside-chunk", (7, 7, 1, 40), (327, 400, 350, 380), shared_pages=(0, 20, 20, 20),
                  tree_mask=(*SMALL_TREE, *SMALL_TREE, *causal_words(41))),
    AttentionCase("prefix-tree-keys-that-no-row-sees", (8, 8), (328, 328), shared_pages=(0, 20),
                  tree_mask=HIDDEN_KEYS[:8] * 2),
]  # fmt: skip
"""Sequences that begin with the same pages; plans that know the block table have groups of them."""

V_HEAD_DIM_CASES = [
    # The sizes that models have, and others around a kernel's steps.
    AttentionCase("v128-of-192-chunk-beside-decodes", (1, 70, 1, 0, 1), (129, 150, 1, 9, 300), num_q_heads=8,
                  head_dim=192, v_head_dim=128),
    AttentionCase("v128-of-192-mha-page7", (20, 1), (33, 40), num_q_heads=2, head_dim=192, v_head_dim=128, page_size=7),
    AttentionCase("v128-of-192-splits", (1, 40), (900, 500), head_dim=192, v_head_dim=128, num_workers=64),
    AttentionCase("v128-of-192-scores", (1, 7, 70, 0, 1), (60, 30, 150, 9, 1), num_q_heads=6, head_dim=192,
                  v_head_dim=128, window_left=40, soft_cap=5.0, logit_std=4.0, alibi="per-seq", has_sinks=True,
                  tree_mask=(*causal_words(1), *SMALL_TREE, *causal_words(71))),
    AttentionCase("v128-of-192-prefix", (1, 1, 2), (329, 270, 300), num_q_heads=8, head_dim=192, v_head_dim=128,
                  shared_pages=(0, 16, 16), has_sinks=True),
    AttentionCase("v-empty-rows", (3, 1, 20), (0, 20, 6), head_dim=192, v_head_dim=128),
    AttentionCase("v64-of-128", (17, 1, 1), (100, 200, 5), head_dim=128, v_head_dim=64),
    AttentionCase("v128-of-64", (17, 1, 1), (100, 200, 5), head_dim=64, v_head_dim=128, num_workers=16),
    AttentionCase("v256-of-64", (17, 1, 1), (100, 200, 5), head_dim=64, v_head_dim=256),
    AttentionCase("v8-of-40", (17, 1, 1), (100, 200, 5), head_dim=40, v_head_dim=8),
    AttentionCase("v40-of-24", (17, 1, 1), (100, 200, 5), head_dim=24, v_head_dim=40, has_sinks=True),
]  # fmt: skip
"""Heads of V of another size than those of K."""
_ALL = CASES + SCORE_CASES + PREFIX_CASES + V_HEAD_DIM_CASES
assert len({case.id for case in _ALL}) == len(_ALL)
for _case in _ALL:
    # An id says what is tested; a page size that is only in the name is not.
    for _named, _actual in (("page", _case.page_size), ("gqa", _case.num_q_heads // _case.num_kv_heads)):
        _found = re.search(rf"\b{_named}(\d+)", _case.id)
        assert _found is None or int(_found[1]) == _actual, f"{_case.id} has {_named} {_actual}"
