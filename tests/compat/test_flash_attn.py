"""The calls of FlashAttention-2, FlashAttention-3 and vLLM: results, lse, layouts, appends."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from mixattn.compat import flash_attn, flash_attn_interface, vllm
from mixattn.ops.reference import attention_reference, rope_reference
from tests.cases import AttentionCase, AttentionInputs, assert_attention_close, make_inputs
from tests.compat.backends import run_on_backend
from tests.compat.batches import BY_ID, NAMES, ragged_kv, window_size

MANY = pytest.mark.parametrize("case", [BY_ID[name] for name in NAMES], ids=lambda case: case.id)
LIBRARIES = ["fa2", "fa3", "vllm"]


def varlen(library: str, case: AttentionCase, inputs: AttentionInputs, **options: Any) -> tuple[Tensor, Tensor]:
    """out and lse [num_q_heads, total_q] of keys without pages, arguments in the library's own order."""
    k, v, cu_seqlens_k = ragged_kv(case, inputs)
    longest = max(case.q_lens), max(case.kv_lens)
    options = {
        "softmax_scale": case.softmax_scale,
        "causal": case.causal,
        "window_size": window_size(case),
        "softcap": case.soft_cap or 0.0,
        **options,
    }
    if library == "fa2":
        out, lse, nothing = flash_attn.flash_attn_varlen_func(
            inputs.q, k, v, inputs.cu_seqlens_q, cu_seqlens_k, *longest, return_attn_probs=True, **options
        )
        assert nothing.numel() == 0
        return out, lse
    if library == "fa3":
        out, lse = flash_attn_interface.flash_attn_varlen_func(
            inputs.q, k, v, inputs.cu_seqlens_q, cu_seqlens_k, *longest, return_attn_probs=True, **options
        )
        return out, lse
    out, lse = vllm.flash_attn_varlen_func(
        inputs.q, k, v, longest[0], inputs.cu_seqlens_q, longest[1], cu_seqlens_k, return_softmax_lse=True, **options
    )
    return out, lse


@pytest.mark.parametrize("library", LIBRARIES)
@MANY
def test_varlen_of_named_case_is_within_twice_eager(case: AttentionCase, library: str) -> None:
    inputs = make_inputs(case, torch.float32)
    out, lse = varlen(library, case, inputs)
    assert lse.shape == (case.num_q_heads, case.total_q) and lse.is_contiguous()
    assert_attention_close(case, inputs, out, lse.T)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_varlen_on_every_backend_is_within_twice_eager(
    library: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_on_backend(monkeypatch, backend)
    case = AttentionCase("small", (1, 5, 1), (20, 7, 33), window_left=9, soft_cap=20.0)
    inputs = make_inputs(case, torch.float32)
    out, lse = varlen(library, case, inputs)
    assert_attention_close(case, inputs, out, lse.T)


@pytest.mark.parametrize("library", LIBRARIES)
def test_varlen_of_views_equals_that_of_copies(library: str) -> None:
    """q, k and v out of one projection, and one whose last dimension is not contiguous."""
    case = BY_ID["chunk-beside-decodes"]
    inputs = make_inputs(case, torch.bfloat16)
    wide = torch.zeros(case.total_q, case.num_q_heads + 3, case.head_dim, dtype=torch.bfloat16)
    wide[:, 1:-2] = inputs.q
    for q in (wide[:, 1:-2], inputs.q.transpose(1, 2).contiguous().transpose(1, 2)):
        assert not q.is_contiguous()
        out, lse = varlen(library, case, dataclasses.replace(inputs, q=q))
        assert_attention_close(case, inputs, out, lse.T)


@MANY
def test_fa2_varlen_over_pages_is_within_twice_eager(case: AttentionCase) -> None:
    inputs = make_inputs(case, torch.float32)
    _, _, cu_seqlens_k = ragged_kv(case, inputs)
    out = flash_attn.flash_attn_varlen_func(
        inputs.q, inputs.k_cache, inputs.v_cache, inputs.cu_seqlens_q, cu_seqlens_k, max(case.q_lens),
        max(case.kv_lens), 0.0, case.softmax_scale, case.causal, window_size(case), case.soft_cap or 0.0,
        block_table=inputs.block_table,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    assert_attention_close(case, inputs, out, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@MANY
def test_vllm_varlen_over_pages_writes_out(case: AttentionCase, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    ones = torch.ones(1, 1).expand(len(case.q_lens), case.num_kv_heads)
    out = torch.full_like(inputs.q, torch.nan)
    result, lse = vllm.flash_attn_varlen_func(
        inputs.q, inputs.k_cache, inputs.v_cache, max(case.q_lens), inputs.cu_seqlens_q, max(case.kv_lens),
        seqused_k=inputs.seq_lens, softmax_scale=case.softmax_scale, causal=case.causal,
        window_size=list(window_size(case)), softcap=case.soft_cap or 0.0, block_table=inputs.block_table,
        return_softmax_lse=True, out=out, fa_version=3, k_descale=ones, v_descale=ones,
        scheduler_metadata=torch.zeros(1), num_splits=4,
    )  # fmt: skip
    assert result is out
    assert_attention_close(case, inputs, out, lse.T)


@MANY
def test_unified_attention_writes_out(case: AttentionCase) -> None:
    inputs = make_inputs(case, torch.float32)
    out = torch.full_like(inputs.q, torch.nan)
    scale = case.head_dim**-0.5 if case.softmax_scale is None else case.softmax_scale
    result = vllm.unified_attention(
        inputs.q, inputs.k_cache, inputs.v_cache, out, inputs.cu_seqlens_q, max(case.q_lens), inputs.seq_lens,
        max(case.kv_lens), scale, case.causal, window_size(case), inputs.block_table, case.soft_cap or 0.0, None,
        torch.ones(1), torch.ones(()), seq_threshold_3D=8, num_par_softmax_segments=16, use_td=True,
    )  # fmt: skip
    assert result is None
    assert_attention_close(case, inputs, out, None)


def test_window_with_right_bound_zero_is_causal() -> None:
    case = BY_ID["window-chunk-beside-decodes"]
    inputs = make_inputs(case, torch.float32)
    out, lse = varlen("fa2", case, inputs, causal=False, window_size=(case.window_left, 0))
    assert_attention_close(case, inputs, out, lse.T)


def test_fa3_varlen_reads_only_the_used_keys() -> None:
    case = AttentionCase("used", (2, 3), (11, 9))
    longer = AttentionCase("used", (2, 3), (20, 30))
    inputs = make_inputs(longer, torch.float32)
    k, v, cu_seqlens_k = ragged_kv(longer, inputs)
    used = torch.tensor(case.kv_lens, dtype=torch.int32)
    out, lse = flash_attn_interface.flash_attn_varlen_func(
        inputs.q, k, v, inputs.cu_seqlens_q, cu_seqlens_k, 3, 30, None, used, causal=True, return_attn_probs=True
    )
    assert_attention_close(case, dataclasses.replace(inputs, seq_lens=used), out, lse.T)


def test_alibi_slopes_and_sinks_are_honoured() -> None:
    case = AttentionCase("options", (1, 5), (20, 9))
    inputs = make_inputs(case, torch.float32)
    slopes, sinks = torch.rand(2, 4), torch.randn(4)
    arguments = (inputs.q, inputs.k_cache, inputs.v_cache)
    truth, true_lse = attention_reference(*arguments, **inputs.index_tensors, alibi_slopes=slopes, sinks=sinks)
    k, v, cu_seqlens_k = ragged_kv(case, inputs)
    out, lse = vllm.flash_attn_varlen_func(
        inputs.q, k, v, 5, inputs.cu_seqlens_q, 20, cu_seqlens_k, causal=True, alibi_slopes=slopes,
        s_aux=sinks.bfloat16(), return_softmax_lse=True,
    )  # fmt: skip
    torch.testing.assert_close(out, truth, atol=2e-2, rtol=0)  # sinks in bfloat16, as FlashAttention-3's fork has them
    torch.testing.assert_close(lse.T, true_lse, atol=2e-2, rtol=0)
    truth, _ = attention_reference(*arguments, **inputs.index_tensors, alibi_slopes=slopes[0], sinks=sinks)
    unified = torch.empty_like(inputs.q)
    vllm.unified_attention(
        *arguments, unified, inputs.cu_seqlens_q, 5, inputs.seq_lens, 20, 0.125, True, (-1, -1), inputs.block_table,
        0.0, None, None, None, alibi_slopes=slopes[0], sinks=sinks,
    )  # fmt: skip
    torch.testing.assert_close(unified, truth)
    truth, _ = attention_reference(*arguments, **inputs.index_tensors, alibi_slopes=slopes)
    out = flash_attn.flash_attn_varlen_func(
        inputs.q, k, v, inputs.cu_seqlens_q, cu_seqlens_k, 5, 20, causal=True, alibi_slopes=slopes
    )
    torch.testing.assert_close(out, truth)


@pytest.mark.parametrize("descale", ["scalar", "expanded", "rows"])
def test_descales_multiply_quantised_caches(descale: str) -> None:
    case = AttentionCase("fp8", (1, 5), (20, 9))
    inputs = make_inputs(case, torch.float32)
    k_cache, v_cache = (c.nan_to_num().to(torch.float8_e4m3fn) for c in (inputs.k_cache, inputs.v_cache))
    scales = {
        "scalar": torch.tensor([0.5]),
        "expanded": torch.tensor([[0.5, 2.0]]).expand(2, 2),
        "rows": torch.tensor([[0.5, 2.0], [0.5, 2.0]]),
    }[descale]
    per_head = scales.expand(2, 2)[0].view(2, 1)
    truth, _ = attention_reference(inputs.q, k_cache.float() * per_head, v_cache.float() * 3, **inputs.index_tensors)
    out = vllm.flash_attn_varlen_func(
        inputs.q, k_cache, v_cache, 5, inputs.cu_seqlens_q, 20, seqused_k=inputs.seq_lens, causal=True,
        block_table=inputs.block_table, k_descale=scales, v_descale=torch.tensor([3.0]),
    )  # fmt: skip
    torch.testing.assert_close(out, truth)


def test_unified_attention_takes_scales_per_token_and_head() -> None:
    case = AttentionCase("int8", (1, 5), (20, 9))
    inputs = make_inputs(case, torch.float32)
    scales = torch.rand(2, *inputs.k_cache.shape[:3]) * 0.02 + 0.01
    k_cache, v_cache = (
        (c.nan_to_num() / s.unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8)
        for c, s in zip((inputs.k_cache, inputs.v_cache), scales, strict=True)
    )
    truth, _ = attention_reference(
        inputs.q, k_cache * scales[0].unsqueeze(-1), v_cache * scales[1].unsqueeze(-1), **inputs.index_tensors
    )
    out = torch.empty_like(inputs.q)
    vllm.unified_attention(
        inputs.q, k_cache, v_cache, out, inputs.cu_seqlens_q, 5, inputs.seq_lens, 20, 0.125, True, (-1, -1),
        inputs.block_table, 0.0, None, None, None, kv_quant_mode=2, k_scale_cache=scales[0], v_scale_cache=scales[1],
    )  # fmt: skip
    torch.testing.assert_close(out, truth, atol=1e-4, rtol=1e-4)


# flash_attn_with_kvcache


@dataclasses.dataclass
class Appended:
    """A batch whose last rows are new, and what the cache must hold after them.

    Args:
        k, v: [batch, new_len, num_kv_heads, head_dim].
        full_k, full_v: per sequence, [kv_len, num_kv_heads, head_dim], the new rows rotated.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    past_lens: Tensor
    full_k: list[Tensor]
    full_v: list[Tensor]
    q_rotated: Tensor


def appended(
    past: tuple[int, ...], q_len: int, new_len: int, rotary: tuple[Tensor, bool] | None, dtype: Any
) -> Appended:
    generator = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    batch = len(past)
    q, k, v = normal(batch, q_len, 4, 32), normal(batch, new_len, 2, 32), normal(batch, new_len, 2, 32)
    full_k, full_v, q_rotated = [], [], []
    for idx, past_len in enumerate(past):
        new_k, new_q = k[idx], q[idx]
        if rotary is not None:
            table, interleaved = rotary
            new_k, new_q = (
                rope_reference(x, past_len + torch.arange(len(x)), table, interleaved=interleaved).to(dtype)
                for x in (new_k, new_q)
            )
        full_k.append(torch.cat((normal(past_len, 2, 32), new_k)))
        full_v.append(torch.cat((normal(past_len, 2, 32), v[idx])))
        q_rotated.append(new_q)
    return Appended(q, k, v, torch.tensor(past, dtype=torch.int32), full_k, full_v, torch.stack(q_rotated))


def rope_table(max_positions: int, rotary_dim: int) -> Tensor:
    angles = torch.outer(torch.arange(max_positions).float(), 0.5 ** torch.arange(rotary_dim // 2))
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def truth_of(made: Appended, causal: bool) -> tuple[Tensor, Tensor]:
    """out [batch, q_len, heads, head_dim] and lse [batch, heads, q_len] in float64."""
    outs, lses = [], []
    for q, k, v in zip(made.q_rotated, made.full_k, made.full_v, strict=True):
        out, lse = attention_reference(
            q, k.unsqueeze(0), v.unsqueeze(0),
            cu_seqlens_q=torch.tensor([0, len(q)]), seq_lens=torch.tensor([len(k)]),
            block_table=torch.zeros(1, 1, dtype=torch.int32), causal=causal, compute_dtype=torch.float64,
        )  # fmt: skip
        outs.append(out)
        lses.append(lse.T)
    return torch.stack(outs), torch.stack(lses)


def contiguous_cache(made: Appended, new_len: int, slots: list[int]) -> tuple[Tensor, Tensor]:
    """[4, 40, 2, 32] NaN but for the past of sequence i at ``slots[i]``."""
    caches = []
    for full in (made.full_k, made.full_v):
        cache = torch.full((4, 40, 2, 32), torch.nan, dtype=made.q.dtype)
        for slot, rows in zip(slots, full, strict=True):
            cache[slot, : len(rows) - new_len] = rows[: len(rows) - new_len]
        caches.append(cache)
    return caches[0], caches[1]


@pytest.mark.parametrize("module", [flash_attn, flash_attn_interface], ids=["fa2", "fa3"])
@pytest.mark.parametrize("rotary", [None, "neox", "interleaved"])
@pytest.mark.parametrize(("q_len", "new_len"), [(1, 1), (5, 5), (2, 6)])
def test_kvcache_appends_in_place_and_sees_the_new_rows(
    q_len: int, new_len: int, rotary: str | None, module: Any
) -> None:
    table, interleaved = rope_table(64, 16), rotary == "interleaved"
    past, slots = (7, 0, 33), [2, 0, 3]
    made = appended(past, q_len, new_len, None if rotary is None else (table, interleaved), torch.float32)
    k_cache, v_cache = contiguous_cache(made, new_len, slots)
    turn = {} if rotary is None else {"rotary_cos": table[:, :8], "rotary_sin": table[:, 8:]}
    out, lse, *rest = module.flash_attn_with_kvcache(
        made.q, k_cache, v_cache, made.k, made.v, **turn, cache_seqlens=made.past_lens,
        cache_batch_idx=torch.tensor(slots, dtype=torch.int32), causal=True, rotary_interleaved=interleaved,
        num_splits=3, return_softmax_lse=True,
    )  # fmt: skip
    assert len(rest) == (2 if module is flash_attn_interface else 0)
    truth, true_lse = truth_of(made, causal=True)
    torch.testing.assert_close(out.double(), truth, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), true_lse, atol=1e-5, rtol=1e-5)
    for idx, slot in enumerate(slots):
        torch.testing.assert_close(k_cache[slot, : len(made.full_k[idx])], made.full_k[idx], atol=1e-6, rtol=1e-6)
        assert bool(k_cache[slot, len(made.full_k[idx]) :].isnan().all()), "a row behind the new ones was written"
        assert torch.equal(v_cache[slot, : len(made.full_v[idx])], made.full_v[idx])


@pytest.mark.parametrize("module", [flash_attn, flash_attn_interface], ids=["fa2", "fa3"])
def test_kvcache_over_pages_appends_in_place(module: Any) -> None:
    made = appended((7, 0, 14), 3, 3, None, torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    block_table = torch.randperm(12, generator=generator).view(3, 4).int()
    caches = []
    for full in (made.full_k, made.full_v):
        cache = torch.full((12, 5, 2, 32), torch.nan, dtype=torch.bfloat16)
        for row, rows in zip(block_table.long(), full, strict=True):
            pages = cache[row].flatten(0, 1)
            pages[: len(rows) - 3] = rows[: len(rows) - 3]
            cache[row] = pages.unflatten(0, (4, 5))
        caches.append(cache)
    name = "block_table" if module is flash_attn else "page_table"
    out = module.flash_attn_with_kvcache(
        made.q, *caches, made.k, made.v, cache_seqlens=made.past_lens, causal=True, **{name: block_table}
    )
    truth, _ = truth_of(made, causal=True)
    torch.testing.assert_close(out.double(), truth, atol=2e-2, rtol=2e-2)
    for cache, full in zip(caches, (made.full_k, made.full_v), strict=True):
        for row, rows in zip(block_table.long(), full, strict=True):
            assert torch.equal(cache[row].flatten(0, 1)[: len(rows)], rows)


@pytest.mark.parametrize("past", [30, torch.tensor([30, 30], dtype=torch.int32)], ids=["int", "tensor"])
def test_kvcache_without_new_rows_reads_cache_seqlens_keys(past: int | Tensor) -> None:
    made = appended((30, 30), 4, 0, None, torch.float32)
    k_cache, v_cache = contiguous_cache(made, 0, [0, 1])
    out, lse = flash_attn.flash_attn_with_kvcache(
        made.q, k_cache, v_cache, cache_seqlens=past, causal=True, return_softmax_lse=True
    )
    truth, true_lse = truth_of(made, causal=True)
    torch.testing.assert_close(out.double(), truth, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), true_lse, atol=1e-5, rtol=1e-5)


def test_kvcache_without_cache_seqlens_reads_all_of_the_cache() -> None:
    made = appended((40, 40), 2, 0, None, torch.float32)
    out = flash_attn.flash_attn_with_kvcache(made.q, *contiguous_cache(made, 0, [0, 1]), causal=True)
    torch.testing.assert_close(out.double(), truth_of(made, causal=True)[0], atol=1e-5, rtol=1e-5)


def test_kvcache_without_causality_turns_all_queries_by_the_first_position() -> None:
    table = rope_table(64, 32)
    made = appended((7, 12), 3, 3, (table, False), torch.float32)
    for idx, past_len in enumerate((7, 12)):
        made.q_rotated[idx] = rope_reference(made.q[idx], torch.full((3,), past_len), table)
    out = flash_attn.flash_attn_with_kvcache(
        made.q, *contiguous_cache(made, 3, [0, 1]), made.k, made.v, table[:, :16], table[:, 16:],
        cache_seqlens=made.past_lens, rotary_interleaved=False,
    )  # fmt: skip
    torch.testing.assert_close(out.double(), truth_of(made, causal=False)[0], atol=1e-5, rtol=1e-5)


def test_fa3_kvcache_of_ragged_rows_equals_that_of_a_batch() -> None:
    """Queries and new keys of several lengths in a row, as speculative verification has them."""
    made = appended((7, 12), 3, 3, None, torch.float32)
    truth, true_lse = truth_of(made, causal=True)
    k_cache, v_cache = contiguous_cache(made, 3, [0, 1])
    starts = torch.tensor([0, 3, 6], dtype=torch.int32)
    out, lse, *_ = flash_attn_interface.flash_attn_with_kvcache(
        made.q.flatten(0, 1), k_cache, v_cache, made.k.flatten(0, 1), made.v.flatten(0, 1),
        cache_seqlens=made.past_lens, cu_seqlens_q=starts, cu_seqlens_k_new=starts, max_seqlen_q=3, causal=True,
        return_softmax_lse=True,
    )  # fmt: skip
    torch.testing.assert_close(out.double(), truth.flatten(0, 1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), true_lse.transpose(0, 1).flatten(1), atol=1e-5, rtol=1e-5)


def test_kvcache_that_is_too_small_for_the_new_rows_is_an_error_and_not_written() -> None:
    made = appended((7, 38), 3, 3, None, torch.float32)
    k_cache = torch.zeros(2, 40, 2, 32)
    with pytest.raises(ValueError, match="room for the new keys in 40 slots"):
        flash_attn.flash_attn_with_kvcache(
            made.q, k_cache, k_cache.clone(), made.k, made.v, cache_seqlens=made.past_lens, causal=True
        )
    assert not bool(k_cache.any())
