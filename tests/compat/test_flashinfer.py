"""FlashInfer's wrappers, merges and append: results, lse of base 2, layouts, and the order of plan and run."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mixattn.compat import flashinfer
from mixattn.compat.paged_batch import tree_words, unpack_bits
from mixattn.ops.reference import attention_reference, merge_states_reference, visible_keys
from mixattn.ops.tree_mask import tree_mask
from tests.cases import V_HEAD_DIM_CASES, AttentionCase, AttentionInputs, KvFormat, assert_attention_close, make_inputs
from tests.compat.batches import BY_ID, NAMES, csr_table

MANY = pytest.mark.parametrize("case", [BY_ID[name] for name in NAMES], ids=lambda case: case.id)
WORKSPACE = torch.empty(16, dtype=torch.uint8)


def cache_of(inputs: AttentionInputs, kv_layout: str, is_pair: bool) -> Any:
    """Both caches in FlashInfer's form."""
    caches = [inputs.k_cache, inputs.v_cache]
    if kv_layout == "HND":
        caches = [cache.transpose(1, 2).contiguous() for cache in caches]
    return tuple(caches) if is_pair else torch.stack(caches, dim=1)


def planned_prefill(case: AttentionCase, inputs: AttentionInputs, kv_layout: str = "NHD", **options: Any) -> Any:
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
        WORKSPACE, kv_layout, backend=options.pop("backend", "auto")
    )
    wrapper.plan(
        inputs.cu_seqlens_q, *csr_table(case, inputs), case.num_q_heads, case.num_kv_heads, case.head_dim,
        case.page_size,
        **{
            "causal": case.causal,
            "sm_scale": case.softmax_scale,
            "window_left": -1 if case.window_left is None else case.window_left,
            "logits_soft_cap": case.soft_cap,
            "q_data_type": inputs.q.dtype,
            **options,
        },
    )  # fmt: skip
    return wrapper


@pytest.mark.parametrize("is_pair", [True, False], ids=["pair", "one"])
@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@MANY
def test_prefill_wrapper_of_named_case_is_within_twice_eager(
    case: AttentionCase, kv_layout: str, is_pair: bool
) -> None:
    inputs = make_inputs(case, torch.float32)
    wrapper = planned_prefill(case, inputs, kv_layout)
    cache = cache_of(inputs, kv_layout, is_pair)
    out, lse = wrapper.run(inputs.q, cache, return_lse=True)
    assert lse.shape == (case.total_q, case.num_q_heads)
    assert_attention_close(case, inputs, out, lse * math.log(2))
    assert torch.equal(wrapper.run(inputs.q, cache), out)
    again, lse_again = wrapper.run_return_lse(inputs.q, cache)
    assert torch.equal(again, out) and torch.equal(lse_again, lse)


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
def test_prefill_wrapper_runs_on_the_backend_it_names(backend: str) -> None:
    case = AttentionCase("small", (1, 5, 1), (20, 7, 33))
    inputs = make_inputs(case, torch.float32)
    out, lse = planned_prefill(case, inputs, backend=backend).run(
        inputs.q, (inputs.k_cache, inputs.v_cache), return_lse=True
    )
    assert_attention_close(case, inputs, out, lse * math.log(2))


def test_prefill_wrapper_writes_out_and_lse() -> None:
    case = BY_ID["chunk-beside-decodes"]
    inputs = make_inputs(case, torch.bfloat16)
    out, lse = torch.full_like(inputs.q, torch.nan), torch.full((case.total_q, case.num_q_heads), torch.nan)
    result = planned_prefill(case, inputs, q_data_type="bfloat16").run(
        inputs.q, (inputs.k_cache, inputs.v_cache), out=out, lse=lse, return_lse=True, enable_pdl=True
    )
    assert result[0] is out and result[1] is lse
    assert_attention_close(case, inputs, out, lse * math.log(2))


def test_prefill_wrapper_scales_scores_and_values() -> None:
    case = AttentionCase("scales", (1, 5), (20, 9), softmax_scale=0.1 * 2 * 3)
    inputs = make_inputs(case, torch.float32)
    wrapper = planned_prefill(case, inputs, sm_scale=0.1)
    out = wrapper.run(inputs.q, (inputs.k_cache, inputs.v_cache), q_scale=2.0, k_scale=torch.tensor([3.0]), v_scale=0.5)
    assert_attention_close(case, inputs, out * 2, None)


def test_prefill_wrapper_reads_float8_with_scales() -> None:
    case = AttentionCase("fp8", (1, 5), (20, 9))
    inputs = make_inputs(case, torch.float32)
    caches = [c.nan_to_num().to(torch.float8_e4m3fn) for c in (inputs.k_cache, inputs.v_cache)]
    wrapper = planned_prefill(case, inputs, kv_data_type=torch.float8_e4m3fn)
    out = wrapper.run(inputs.q, tuple(caches), k_scale=0.5, v_scale=3.0)
    truth, _ = attention_reference(inputs.q, caches[0].float() * 0.5, caches[1].float() * 3, **inputs.index_tensors)
    torch.testing.assert_close(out, truth)


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("is_pair", [True, False], ids=["pair", "one"])
def test_prefill_wrapper_reads_float8_with_a_scale_per_token_and_head(kv_layout: str, is_pair: bool) -> None:
    case = AttentionCase("fp8", (1, 5), (20, 9))
    inputs = make_inputs(case, torch.float32, kv=KvFormat(torch.float8_e4m3fn, "token"))
    scales = [inputs.k_scale, inputs.v_scale]
    if kv_layout == "HND":
        scales = [scale.transpose(1, 2).contiguous() for scale in scales]
    wrapper = planned_prefill(case, inputs, kv_layout, kv_data_type=torch.float8_e4m3fn, use_token_head_sf=True)
    out = wrapper.run(
        inputs.q, cache_of(inputs, kv_layout, is_pair),
        kv_cache_sf=tuple(scales) if is_pair else torch.stack(scales, dim=1),
    )  # fmt: skip
    assert_attention_close(case, inputs, out, None)


def test_prefill_wrapper_of_token_scales_that_plan_and_run_disagree_on_is_an_error() -> None:
    case = AttentionCase("fp8", (1, 5), (20, 9))
    inputs = make_inputs(case, torch.float32, kv=KvFormat(torch.float8_e4m3fn, "token"))
    cache, scales = (inputs.k_cache, inputs.v_cache), (inputs.k_scale, inputs.v_scale)
    for planned, given in ((True, None), (False, scales)):
        wrapper = planned_prefill(case, inputs, kv_data_type=torch.float8_e4m3fn, use_token_head_sf=planned)
        with pytest.raises(ValueError, match="kv_cache_sf must be given if, and only if, plan got use_token_head_sf"):
            wrapper.run(inputs.q, cache, kv_cache_sf=given)
    with pytest.raises(ValueError, match=r"kv_cache_sf must be a pair or \[num_pages, 2"):
        planned_prefill(case, inputs, kv_data_type=torch.float8_e4m3fn, use_token_head_sf=True).run(
            inputs.q, cache, kv_cache_sf=scales[0]
        )


@pytest.mark.parametrize("is_given", [True, False])
def test_prefill_wrapper_returns_lse_in_the_base_and_layout_it_is_asked_for(is_given: bool) -> None:
    case = AttentionCase("lse", (1, 5), (20, 9))
    inputs = make_inputs(case, torch.float32)
    wrapper, cache = planned_prefill(case, inputs), (inputs.k_cache, inputs.v_cache)
    _, lse = wrapper.run(inputs.q, cache, return_lse=True)
    buffer = torch.full((case.num_q_heads, case.total_q), torch.nan) if is_given else None
    _, natural = wrapper.run(inputs.q, cache, lse=buffer, return_lse=True, lse_base="ln", lse_layout="HN")
    assert buffer is None or natural is buffer
    assert natural.is_contiguous()
    torch.testing.assert_close(natural, lse.t() * math.log(2))
    for option in ("lse_base", "lse_layout"):
        with pytest.raises(ValueError, match=f"{option} must be .* got 'log10'"):
            wrapper.run(inputs.q, cache, **{option: "log10"})


@pytest.mark.parametrize("name", ["v128-of-192-chunk-beside-decodes", "v128-of-64"])
def test_prefill_wrapper_takes_values_of_another_head_dim(name: str) -> None:
    case = next(case for case in V_HEAD_DIM_CASES if case.id == name)
    inputs = make_inputs(case, torch.float32)
    cache = (inputs.k_cache, inputs.v_cache)
    out, lse = planned_prefill(case, inputs, head_dim_vo=case.v_head_dim).run(inputs.q, cache, return_lse=True)
    assert_attention_close(case, inputs, out, lse * math.log(2))
    with pytest.raises(ValueError, match="values must have head_dim 8, as planned, got 128"):
        planned_prefill(case, inputs, head_dim_vo=8).run(inputs.q, cache)


def test_prefill_wrapper_lse_includes_sinks() -> None:
    case = AttentionCase("sinks", (1, 5), (20, 9))
    inputs = make_inputs(case, torch.float32)
    sinks = torch.randn(case.num_q_heads)
    out, lse = planned_prefill(case, inputs).run(
        inputs.q, (inputs.k_cache, inputs.v_cache), sinks=sinks, return_lse=True
    )
    truth, true_lse = attention_reference(inputs.q, inputs.k_cache, inputs.v_cache, **inputs.index_tensors, sinks=sinks)
    torch.testing.assert_close(out, truth)
    torch.testing.assert_close(lse * math.log(2), true_lse)


def test_prefill_wrapper_planned_again_serves_the_new_batch() -> None:
    first, second = AttentionCase("first", (1, 5), (20, 9)), AttentionCase("second", (7,), (40,), causal=False)
    wrapper = planned_prefill(first, make_inputs(first, torch.float32))
    inputs = make_inputs(second, torch.float32)
    wrapper.plan(
        inputs.cu_seqlens_q, *csr_table(second, inputs), 4, 2, 64, 16, q_data_type=torch.float32,
        seq_lens=inputs.seq_lens, non_blocking=False, fixed_split_size=2, disable_split_kv=True,
    )  # fmt: skip
    assert_attention_close(second, inputs, wrapper.run(inputs.q, (inputs.k_cache, inputs.v_cache)), None)


def test_prefill_wrapper_forward_replaces_the_options_of_plan() -> None:
    case = AttentionCase("forward", (1, 5), (20, 9), window_left=4, soft_cap=3.0, softmax_scale=0.2)
    inputs = make_inputs(case, torch.float32)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(WORKSPACE)
    wrapper.begin_forward(inputs.cu_seqlens_q, *csr_table(case, inputs), 4, 2, 64, 16, q_data_type=torch.float32)
    options = {"causal": True, "window_left": 4, "logits_soft_cap": 3.0, "sm_scale": 0.2}
    cache = (inputs.k_cache, inputs.v_cache)
    assert_attention_close(case, inputs, wrapper.forward(inputs.q, cache, **options), None)
    out, lse = wrapper.forward_return_lse(inputs.q, cache, **options)
    assert_attention_close(case, inputs, out, lse * math.log(2))
    wrapper.end_forward()
    plain = dataclasses.replace(case, causal=False, window_left=None, soft_cap=None, softmax_scale=None)
    full = make_inputs(plain, torch.float32)
    assert_attention_close(plain, full, wrapper.forward(full.q, (full.k_cache, full.v_cache)), None)


def tree_case() -> tuple[AttentionCase, Tensor]:
    """A chunk beside a tree of four drafts, and its mask in FlashInfer's form."""
    words = torch.cat((torch.full((3,), -1), tree_mask([None, 0, 0, 1])))
    case = AttentionCase("tree", (3, 4), (9, 21), tree_mask=tuple(words.tolist()))
    masks = [
        visible_keys(q_len, kv_len, causal=True, window_left=None, tree_mask=part).flatten()
        for q_len, kv_len, part in zip(case.q_lens, case.kv_lens, words.split([3, 4]), strict=True)
    ]
    return case, torch.cat(masks)


def test_prefill_wrapper_takes_a_tree_as_custom_mask() -> None:
    case, mask = tree_case()
    inputs = make_inputs(case, torch.float32)
    out = planned_prefill(case, inputs, causal=False, custom_mask=mask).run(inputs.q, (inputs.k_cache, inputs.v_cache))
    assert_attention_close(case, inputs, out, None)


def test_prefill_wrapper_takes_a_tree_as_packed_custom_mask() -> None:
    case, mask = tree_case()
    inputs = make_inputs(case, torch.float32)
    packed = []
    for part in mask.split([27, 84]):
        bits = torch.cat((part, part.new_zeros(-len(part) % 8))).view(-1, 8).int()
        packed.append((bits << torch.arange(8)).sum(1).to(torch.uint8))
    wrapper = planned_prefill(case, inputs, causal=False, packed_custom_mask=torch.cat(packed))
    assert_attention_close(case, inputs, wrapper.run(inputs.q, (inputs.k_cache, inputs.v_cache)), None)


def test_tree_words_of_a_causal_mask_of_70_rows_see_as_minus_one_does() -> None:
    """Bit 63 included: a word of all ones is -1. The first row's has itself and the 5 keys of the context."""
    mask = visible_keys(70, 75, causal=True, window_left=None)
    words = tree_words(mask.flatten(), [70], [75])
    assert words[-1] == -1 and words[0] == 0b111111
    assert torch.equal(visible_keys(70, 75, causal=True, window_left=None, tree_mask=words), mask)


@pytest.mark.parametrize(
    ("row", "key", "value"),
    [(0, 5, False), (0, 7, True), (69, 6, False)],
    ids=["hides-context", "shows-behind", "hides-beyond-64"],
)
def test_custom_mask_that_is_no_tree_is_refused(row: int, key: int, value: bool) -> None:
    mask = visible_keys(70, 76, causal=True, window_left=None)
    mask[row, key] = value
    with pytest.raises(NotImplementedError, match="custom_mask of sequence 0 is not supported"):
        tree_words(mask.flatten(), [70], [76])


def test_custom_masks_of_wrong_size_are_errors() -> None:
    with pytest.raises(ValueError, match=r"custom_mask must have .* 6 elements, got 5"):
        tree_words(torch.ones(5, dtype=torch.bool), [2], [3])
    with pytest.raises(ValueError, match="packed_custom_mask must be 1 bytes"):
        unpack_bits(torch.ones(2, dtype=torch.uint8), [6])


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("q_len", [1, 3])
def test_decode_wrapper_is_within_twice_eager(q_len: int, kv_layout: str) -> None:
    case = AttentionCase("decode", (q_len,) * 4, (16, 3, 40, 17), window_left=12, soft_cap=5.0)
    inputs = make_inputs(case, torch.float32)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(WORKSPACE, kv_layout, use_tensor_cores=q_len > 1)
    wrapper.plan(*csr_table(case, inputs), 4, 2, 64, 16, "NONE", 12, 5.0, torch.float32, q_len_per_req=q_len)
    cache = cache_of(inputs, kv_layout, is_pair=False)
    out, lse = wrapper.run(inputs.q, cache, return_lse=True, window_left=12)
    assert_attention_close(case, inputs, out, lse * math.log(2))
    assert torch.equal(wrapper.run(inputs.q, cache, q_len_per_req=q_len), out)
    assert torch.equal(wrapper.run_return_lse(inputs.q, cache)[1], lse)


def test_decode_wrapper_forward_replaces_the_options_of_plan() -> None:
    case = AttentionCase("forward", (1, 1), (20, 9), window_left=4, softmax_scale=0.2)
    inputs = make_inputs(case, torch.float32)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(WORKSPACE)
    wrapper.begin_forward(*csr_table(case, inputs), 4, 2, 64, 16, data_type=torch.float32, q_data_type=None)
    out = wrapper.forward(inputs.q, (inputs.k_cache, inputs.v_cache), window_left=4, sm_scale=0.2)
    assert_attention_close(case, inputs, out, None)


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize(
    "case", [BY_ID["chunk-beside-decodes"], BY_ID["soft-cap"], BY_ID["non-causal"]], ids=lambda c: c.id
)
def test_batch_attention_is_within_twice_eager(case: AttentionCase, kv_layout: str) -> None:
    inputs = make_inputs(case, torch.bfloat16)
    indptr, indices, _ = csr_table(case, inputs)
    wrapper = flashinfer.BatchAttention(kv_layout)
    wrapper.plan(
        inputs.cu_seqlens_q, indptr, indices, inputs.seq_lens, case.num_q_heads, case.num_kv_heads, case.head_dim,
        case.head_dim, case.page_size, case.causal, case.softmax_scale, case.soft_cap,
    )  # fmt: skip
    cache = cache_of(inputs, kv_layout, is_pair=True)
    out, lse = wrapper.run(inputs.q, cache, logits_soft_cap=case.soft_cap or 0.0)
    assert_attention_close(case, inputs, out, lse * math.log(2))
    assert torch.equal(wrapper.run(inputs.q, cache)[0], out)


@pytest.mark.parametrize(
    "wrapper",
    [
        flashinfer.BatchPrefillWithPagedKVCacheWrapper(WORKSPACE),
        flashinfer.BatchDecodeWithPagedKVCacheWrapper(WORKSPACE),
        flashinfer.BatchAttention(),
    ],
    ids=lambda wrapper: type(wrapper).__name__,
)
def test_run_before_plan_is_a_runtime_error(wrapper: Any) -> None:
    for name in ("run", "forward", "forward_return_lse", "run_return_lse"):
        if hasattr(wrapper, name):
            with pytest.raises(RuntimeError, match=r"plan\(\) must be called before"):
                getattr(wrapper, name)(torch.zeros(1, 4, 64), torch.zeros(1, 2, 16, 2, 64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(6, 4, 64, dtype=torch.float16)}, "q must be torch.float32, as planned"),
        ({"q": torch.zeros(5, 4, 64)}, "q must have the 6 rows"),
        ({"paged_kv_cache": torch.zeros(4, 3, 16, 2, 64)}, "paged_kv_cache must be a pair"),
        ({"window_left": 3}, "window_left must be as planned, -1, got 3"),
        ({"k_scale": -1.0}, "k_scale must be finite and > 0"),
    ],
)
def test_run_unlike_the_plan_is_an_error(change: dict[str, Any], message: str) -> None:
    case = AttentionCase("small", (1, 5), (20, 9))
    inputs = make_inputs(case, torch.float32)
    arguments = {"q": inputs.q, "paged_kv_cache": (inputs.k_cache, inputs.v_cache), **change}
    with pytest.raises(ValueError, match=message):
        planned_prefill(case, inputs).run(**arguments)


def test_plan_of_bad_arguments_is_an_error() -> None:
    case = AttentionCase("small", (1, 5), (20, 9))
    inputs = make_inputs(case, torch.float32)
    with pytest.raises(ValueError, match="kv_layout must be NHD or HND"):
        flashinfer.BatchAttention("NDH")
    with pytest.raises(ValueError, match=r"q_data_type must be a torch\.dtype or its name"):
        planned_prefill(case, inputs, q_data_type="float17")
    decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(WORKSPACE)
    with pytest.raises(ValueError, match="q_len_per_req must be at most"):
        decode.plan(*csr_table(case, inputs), 4, 2, 64, 16, q_len_per_req=10)
    with pytest.raises(ValueError, match="q_len_per_req must be >= 1"):
        decode.plan(*csr_table(case, inputs), 4, 2, 64, 16, q_len_per_req=0)
    batch = flashinfer.BatchAttention()
    indptr, indices, _ = csr_table(case, inputs)
    batch.plan(inputs.cu_seqlens_q, indptr, indices, inputs.seq_lens, 4, 2, 64, 64, 16)
    with pytest.raises(ValueError, match=r"logits_soft_cap must be as planned, 0.0, got 2.0"):
        batch.run(inputs.q.bfloat16(), (inputs.k_cache.bfloat16(), inputs.v_cache.bfloat16()), logits_soft_cap=2.0)


def test_merges_keep_base_two() -> None:
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(5, 3, 4, 64, generator=generator)
    s = torch.randn(5, 3, 4, generator=generator) * 3
    s[0, 1] = -torch.inf
    truth, true_lse = merge_states_reference(
        v.transpose(0, 1), s.transpose(0, 1) * math.log(2), compute_dtype=torch.float64
    )
    merged, merged_s = flashinfer.merge_states(v, s)
    torch.testing.assert_close(merged.double(), truth, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(merged_s.double() * math.log(2), true_lse, atol=1e-5, rtol=1e-5)
    two = flashinfer.merge_state(*flashinfer.merge_state(v[:, 0], s[:, 0], v[:, 1], s[:, 1]), v[:, 2], s[:, 2])
    torch.testing.assert_close(two, (merged, merged_s), atol=1e-5, rtol=1e-5)
    mask = torch.tensor([True, False, True, True, False])
    first_v, first_s = v[:, 0].clone(), s[:, 0].clone()
    flashinfer.merge_state_in_place(first_v, first_s, v[:, 1], s[:, 1], mask)
    both = flashinfer.merge_state(v[:, 0], s[:, 0], v[:, 1], s[:, 1])
    for result, old, new in ((first_v, v[:, 0], both[0]), (first_s, s[:, 0], both[1])):
        assert torch.equal(result[mask], new[mask]) and torch.equal(result[~mask], old[~mask])
    flashinfer.merge_state_in_place(first_v, first_s, v[:, 1], s[:, 1])
    assert not torch.equal(first_v[1], v[1, 0])


@pytest.mark.parametrize("is_pair", [True, False], ids=["pair", "one"])
@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
def test_append_stores_rows_in_their_pages(kv_layout: str, is_pair: bool) -> None:
    case = AttentionCase("append", (3, 1, 5), (20, 1, 16))
    inputs = make_inputs(case, torch.bfloat16)
    indptr, indices, last_page_len = csr_table(case, inputs)
    seq_lens = flashinfer.get_seq_lens(indptr, last_page_len, case.page_size)
    assert torch.equal(seq_lens, inputs.seq_lens)
    batch_indices, positions = flashinfer.get_batch_indices_positions(inputs.cu_seqlens_q, seq_lens, case.total_q)
    buffers = torch.empty_like(batch_indices), torch.empty_like(positions)
    written = flashinfer.get_batch_indices_positions(inputs.cu_seqlens_q, seq_lens, case.total_q, *buffers)
    assert written[0] is buffers[0] and torch.equal(buffers[0], batch_indices)
    assert written[1] is buffers[1] and torch.equal(buffers[1], positions)
    assert positions.tolist() == [17, 18, 19, 0, 11, 12, 13, 14, 15]
    shape = (12, 16, 2, 64) if kv_layout == "NHD" else (12, 2, 16, 64)
    caches = torch.zeros(12, 2, *shape[1:], dtype=torch.bfloat16)
    k, v = (torch.randn(case.total_q, 2, 64).bfloat16() for _ in range(2))
    cache = tuple(caches.unbind(1)) if is_pair else caches
    flashinfer.append_paged_kv_cache(k, v, batch_indices, positions, cache, indices, indptr, last_page_len, kv_layout)
    expected = torch.zeros_like(caches)
    for row, (seq, position) in enumerate(zip(batch_indices.tolist(), positions.tolist(), strict=True)):
        page, offset = int(inputs.block_table[seq, position // 16]), position % 16
        for which, rows in enumerate((k, v)):
            at = (page, which, offset) if kv_layout == "NHD" else (page, which, slice(None), offset)
            expected[at] = rows[row]
    assert torch.equal(caches, expected)
