"""Bad input at the doors of ops: an error that names the argument and the bound, before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mixattn
from mixattn.config import RopeConfig
from mixattn.ops.rope import rope_cos_sin
from tests.cases import AttentionCase, make_inputs

CASE = AttentionCase("door", (1, 3, 0), (20, 7, 16), num_q_heads=4, num_kv_heads=2, head_dim=64, page_size=16)
"""max_pages is 3: two for 20 tokens, and one entry more."""


def attention_arguments() -> dict[str, Any]:
    inputs = make_inputs(CASE, torch.float32)
    return {
        "q": inputs.q,
        "k_cache": inputs.k_cache,
        "v_cache": inputs.v_cache,
        **inputs.index_tensors,
        "out": torch.full_like(inputs.q, 7.0),
    }


def append_arguments() -> dict[str, Any]:
    return {
        "k": torch.zeros(3, 2, 64),
        "v": torch.zeros(3, 2, 64),
        "k_cache": torch.full((4, 16, 2, 64), 7.0),
        "v_cache": torch.full((4, 16, 2, 64), 7.0),
        "slot_mapping": torch.tensor([0, 63, 17]),
        "q": torch.zeros(3, 4, 64),
        "positions": torch.tensor([0, 1, 31]),
        "rope_cos_sin": rope_cos_sin(RopeConfig(rotary_dim=64), 32),
    }


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def with_block_id(row: int, column: int, block_id: int) -> Callable[[dict[str, Any]], Tensor]:
    """The arguments' block table with one entry replaced."""

    def change(arguments: dict[str, Any]) -> Tensor:
        table: Tensor = arguments["block_table"].clone()
        table[row, column] = block_id
        return table

    return change


def plan_for(**changes: Any) -> Tensor:
    """The words of a plan that was made for something else."""
    options = {**CASE.plan_options, **changes}
    lengths = {"cu_seqlens_q": [0, 1, 4, 4], "seq_lens": [20, 7, 16]}
    lengths = {name: options.pop(name, value) for name, value in lengths.items()}
    return torch.from_numpy(mixattn.plan(**lengths, **options).buffer)


# (argument, its bad value or a function of all arguments, error, pattern)
BAD_ATTENTION = [
    ("q", None, TypeError, "q must be a torch.Tensor, got NoneType"),
    ("q", torch.zeros(4, 256), ValueError, r"q must be \[total_q, num_q_heads, head_dim\], got shape \[4, 256\]"),
    ("q", torch.zeros(4, 4, 32), ValueError, "k_cache .* head_dim 64, but q has head_dim 32"),
    ("q", torch.zeros(4, 3, 64), ValueError, r"num_q_heads must be a multiple of num_kv_heads \(2\).* got 3"),
    ("q", torch.zeros(4, 0, 64), ValueError, r"num_q_heads must be a multiple .*, both >= 1, got 0"),
    ("q", torch.zeros(4, 4, 64).double(), NotImplementedError, "q is torch.float64; supported are float32"),
    ("q", torch.zeros(4, 4, 128)[..., ::2], ValueError, r"last dimension of q must be contiguous \(stride 1\), got 2"),
    ("q", torch.zeros(4, 4, 64, requires_grad=True), NotImplementedError, "no backward"),
    ("k_cache", lambda a: a["k_cache"].double(), NotImplementedError, "k_cache is .*64; supported are float32"),
    ("k_cache", lambda a: a["k_cache"].half(), NotImplementedError, "v_cache is .*32 and k_cache is .*16"),
    ("k_scale", 1.0, NotImplementedError, "k_scale is given and k_cache is torch.float32; .* nearest here is None"),
    ("v_cache", torch.zeros(9, 8, 2, 64), ValueError, "v_cache .* with num_pages 9, but k_cache has num_pages"),
    ("v_cache", torch.zeros(1, device="meta"), ValueError, r"v_cache must be \[num_pages, page_size, "),
    ("v_cache", lambda a: a["v_cache"].to("meta"), ValueError, "v_cache must be on q's device cpu, got meta"),
    ("v_cache", lambda a: a["v_cache"].repeat(1, 1, 1, 2)[..., ::2], ValueError, "last dimension of v_cache"),
    ("cu_seqlens_q", int32(0, 1, 4), ValueError, r"cu_seqlens_q must be \[num_seqs \+ 1\] = \[4\], got shape \[3\]"),
    ("cu_seqlens_q", torch.tensor([0, 1, 4, 4]), ValueError, "cu_seqlens_q must be torch.int32, got torch.int64"),
    ("cu_seqlens_q", int32(1, 1, 4, 4), ValueError, r"cu_seqlens_q\[0\] must be 0, got 1"),
    ("cu_seqlens_q", int32(0, 1, 4, 3), ValueError, r"cu_seqlens_q\[3\] must be total_q, 4, got 3"),
    ("cu_seqlens_q", int32(0, 5, 3, 4), ValueError, "cu_seqlens_q must not decrease, got 5 then 3 at 2"),
    ("seq_lens", int32(20, 7), ValueError, "block_table .* with num_seqs 3, but seq_lens has num_seqs 2"),
    ("seq_lens", torch.tensor([20.0, 7.0, 16.0]), ValueError, "seq_lens must be torch.int32, got torch.float32"),
    ("seq_lens", int32(20, -1, 16), ValueError, r"seq_lens\[1\] must be in \[0, .*\] = \[0, 48\], got -1"),
    ("seq_lens", int32(20, 7, 49), ValueError, r"seq_lens\[2\] must be in \[0, .*\] = \[0, 48\], got 49"),
    ("seq_lens", int32(20, 7, 16, 0, 16, 0)[::2], ValueError, "last dimension of seq_lens must be contiguous"),
    ("block_table", torch.zeros(3, dtype=torch.int32), ValueError, r"block_table must be \[num_seqs, max_pages\]"),
    ("block_table", torch.zeros(3, 3), ValueError, "block_table must be torch.int32, got torch.float32"),
    ("block_table", with_block_id(0, 1, -1), ValueError, r"block_table\[0, 1\] .*\[0, num_pages\) = \[0, 6\), got -1"),
    ("block_table", with_block_id(1, 0, 6), ValueError, r"block_table\[1, 0\] .*\[0, num_pages\) = \[0, 6\), got 6"),
    ("softmax_scale", float("nan"), ValueError, "softmax_scale must be finite and > 0, got nan"),
    ("softmax_scale", float("inf"), ValueError, "softmax_scale must be finite and > 0, got inf"),
    ("softmax_scale", 0.0, ValueError, "softmax_scale must be finite and > 0, got 0.0"),
    ("soft_cap", -1.0, ValueError, "soft_cap must be finite and > 0, got -1.0"),
    ("soft_cap", float("nan"), ValueError, "soft_cap must be finite and > 0, got nan"),
    ("window_left", -1, ValueError, "window_left must be >= 0 or None, got -1"),
    ("alibi_slopes", [0.5], TypeError, "alibi_slopes must be a torch.Tensor, got list"),
    ("alibi_slopes", torch.zeros(2), ValueError, "alibi_slopes .* with num_q_heads 2, but q has num_q_heads 4"),
    ("alibi_slopes", torch.zeros(2, 4), ValueError, "alibi_slopes .* with num_seqs 2, but seq_lens has num_seqs 3"),
    ("alibi_slopes", torch.zeros(1, 3, 4), ValueError, r"alibi_slopes must be \[num_q_heads\], got shape \[1, 3, 4\]"),
    ("alibi_slopes", torch.zeros(4).double(), ValueError, "alibi_slopes must be torch.float32, got torch.float64"),
    ("alibi_slopes", torch.zeros(4, device="meta"), ValueError, "alibi_slopes must be on q's device cpu, got meta"),
    ("alibi_slopes", torch.zeros(8)[::2], ValueError, "last dimension of alibi_slopes must be contiguous"),
    ("sinks", torch.zeros(3), ValueError, "sinks .* with num_q_heads 3, but q has num_q_heads 4"),
    ("sinks", torch.zeros(4, requires_grad=True), NotImplementedError, "no backward"),
    ("sinks", torch.zeros(4).half(), ValueError, "sinks must be torch.float32, got torch.float16"),
    ("tree_mask", 3, TypeError, "tree_mask must be a torch.Tensor, got int"),
    ("tree_mask", int32(1, 1, 1, 1), ValueError, "tree_mask must be torch.int64, got torch.int32"),
    ("tree_mask", torch.ones(3, dtype=torch.int64), ValueError, "tree_mask .* with total_q 3, but q has total_q 4"),
    ("plan", [1, 2], TypeError, "plan must be a torch.Tensor, got list"),
    ("plan", torch.zeros(64), ValueError, "plan must be a WorkPlan or its words, 1-dimensional contiguous int32"),
    ("plan", int32(1, 2), ValueError, "plan .* 2 words"),
    ("plan", torch.zeros(64, dtype=torch.int32), ValueError, "plan .*not written by mixattn.plan"),
    ("plan", plan_for()[:-1], ValueError, "plan .* words"),
    ("plan", plan_for(head_dim=32), ValueError, "plan was made for head_dim 32, this call has 64"),
    ("plan", plan_for(num_q_heads=8), ValueError, "plan was made for num_q_heads 8, this call has 4"),
    ("plan", plan_for(causal=False), ValueError, "plan was made for causal False, this call has True"),
    ("plan", plan_for(window_left=3), ValueError, "plan was made for window_left 3, this call has None"),
    ("plan", plan_for(cu_seqlens_q=[0, 1, 4], seq_lens=[20, 7]), ValueError, "plan was made for num_seqs 2, .* has 3"),
    ("plan", plan_for(cu_seqlens_q=[0, 1, 5, 5]), ValueError, "plan was made for total_q 5, this call has 4"),
    ("out", torch.zeros(4, 4, 32), ValueError, "out .* with v_head_dim 32, but v_cache has v_head_dim 64"),
    ("out", torch.zeros(4, 4, 64).half(), ValueError, "out must be torch.float32, got torch.float16"),
    ("out", torch.zeros(4, 4, 128)[..., ::2], ValueError, "last dimension of out must be contiguous"),
    ("out", torch.zeros(4, 1, 64).expand(4, 4, 64), ValueError, "out is written and must not have stride 0"),
    ("backend", "gpu", ValueError, "backend must be one of cpu, triton, cuda, reference or None, got 'gpu'"),
    ("backend", "cuda", NotImplementedError, "backend='cuda' cannot run on cpu tensors: .* available.*cpu"),
]  # fmt: skip


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("argument", "value", "error", "message"), BAD_ATTENTION)
def test_attention_of_bad_argument_names_it_and_writes_nothing(
    argument: str, value: Any, error: type[Exception], message: str, backend: str
) -> None:
    arguments = {**attention_arguments(), "backend": backend}
    out = arguments["out"]
    arguments[argument] = value(arguments) if callable(value) else value
    with pytest.raises(error, match=message):
        mixattn.attention(**arguments)
    assert bool((out == 7.0).all())


def test_attention_of_tree_mask_without_causal_is_refused() -> None:
    arguments = {**attention_arguments(), "causal": False, "tree_mask": torch.ones(4, dtype=torch.int64)}
    with pytest.raises(ValueError, match="causal must be True with tree_mask, got False"):
        mixattn.attention(**arguments)
    assert bool((arguments["out"] == 7.0).all())


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("seq_lens", int32(20, 8, 16)),
        ("seq_lens", int32(20, 6, 16)),
        ("seq_lens", int32(48, 7, 16)),
        ("seq_lens", int32(20, 49, 16)),
        ("seq_lens", int32(20, -1, 16)),
        ("cu_seqlens_q", int32(0, 2, 4, 4)),
        ("cu_seqlens_q", int32(0, 1, 3, 4)),
        ("cu_seqlens_q", int32(0, 5, 4, 4)),
        ("cu_seqlens_q", int32(0, -1, 4, 4)),
        ("cu_seqlens_q", int32(0, 1, 4, 5)),
    ],
    ids=str,
)
def test_attention_with_plan_of_other_lengths_is_refused(argument: str, value: Tensor) -> None:
    """A plan kept from another step has the same shape; to run it would read wrong keys, or leave rows unwritten."""
    arguments = attention_arguments()
    arguments["plan"] = plan_for()
    mixattn.attention(**arguments)
    arguments["out"].fill_(7.0)
    arguments[argument] = value
    with pytest.raises(ValueError, match=rf"plan was not made for this batch|{argument}\["):
        mixattn.attention(**arguments)
    assert bool((arguments["out"] == 7.0).all())


@pytest.mark.parametrize(("head_dim", "nearest"), [(4, 8), (60, 64), (100, 104), (264, 256), (512, 256)])
def test_attention_of_unsupported_head_dim_names_the_nearest(head_dim: int, nearest: int) -> None:
    arguments = attention_arguments()
    arguments.update(q=torch.zeros(4, 4, head_dim), out=None)
    arguments.update({name: torch.zeros(6, 16, 2, head_dim) for name in ("k_cache", "v_cache")})
    with pytest.raises(NotImplementedError, match=f"head_dim {head_dim} .* the nearest is {nearest}$"):
        mixattn.attention(**arguments)


@pytest.mark.parametrize(("v_head_dim", "nearest"), [(4, 8), (60, 64), (264, 256)])
def test_attention_of_unsupported_v_head_dim_names_the_nearest(v_head_dim: int, nearest: int) -> None:
    arguments = attention_arguments() | {"v_cache": torch.zeros(6, 16, 2, v_head_dim), "out": None}
    with pytest.raises(NotImplementedError, match=f"v_head_dim {v_head_dim} .* the nearest is {nearest}$"):
        mixattn.attention(**arguments)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_attention_of_no_sequences_is_empty(backend: str) -> None:
    caches = torch.zeros(0, 16, 2, 64), torch.zeros(0, 16, 2, 64)
    out, lse = mixattn.attention(
        torch.zeros(0, 4, 64), *caches, cu_seqlens_q=int32(0), seq_lens=torch.zeros(0, dtype=torch.int32),
        block_table=torch.zeros(0, 0, dtype=torch.int32), return_lse=True, backend=backend,
    )  # fmt: skip
    assert out.shape == (0, 4, 64) and lse.shape == (0, 4)


BAD_APPEND = [
    ("k_cache", torch.zeros(1, 16, 2, 64).expand(4, 16, 2, 64), ValueError, "k_cache is written and must not have"),
    ("v_cache", lambda a: a["v_cache"].to("meta"), ValueError, "v_cache must be on k's device cpu, got meta"),
    ("k", torch.zeros(3, 128), ValueError, r"k must be \[total_q, num_kv_heads, head_dim\], got shape \[3, 128\]"),
    ("k", torch.zeros(3, 2, 64).double(), NotImplementedError, "k is torch.float64; supported are float32"),
    ("v", torch.zeros(3, 3, 64), ValueError, "v .* with num_kv_heads 3, but k has num_kv_heads 2"),
    ("v", torch.zeros(3, 2, 64).half(), NotImplementedError, "v is torch.float16 and k is torch.float32"),
    ("v", torch.zeros(3, 2, 128)[..., ::2], ValueError, "last dimension of v must be contiguous"),
    ("k_cache", torch.zeros(4, 16, 2, 64).half(), NotImplementedError, "v_cache is .*32 and k_cache is .*16"),
    ("v_scale", torch.ones(2), NotImplementedError, "v_scale is given and k_cache is torch.float32; .* None"),
    ("v_cache", torch.zeros(4, 8, 2, 64), ValueError, "v_cache .* with page_size 8, but k_cache has page_size 16"),
    ("slot_mapping", [0, 1, 2], TypeError, "slot_mapping must be a torch.Tensor, got list"),
    ("slot_mapping", torch.tensor([0, 1]), ValueError, "slot_mapping .* with total_q 2, but k has total_q 3"),
    ("slot_mapping", int32(0, 1, 2), ValueError, "slot_mapping must be torch.int64, got torch.int32"),
    ("slot_mapping", torch.tensor([0, -1, 2]), ValueError, r"slot_mapping\[1\] must be in .*\[0, 64\), got -1"),
    ("slot_mapping", torch.tensor([0, 1, 64]), ValueError, r"slot_mapping\[2\] must be in .*\[0, 64\), got 64"),
    ("q", torch.zeros(2, 4, 64), ValueError, "q .* with total_q 2, but k has total_q 3"),
    ("q", torch.zeros(3, 4, 64).half(), NotImplementedError, "q is torch.float16 and k is torch.float32"),
    ("positions", [0, 1, 2], TypeError, "positions must be a torch.Tensor, got list"),
    ("positions", None, ValueError, "rope_cos_sin is given without positions"),
    ("positions", torch.tensor([0, 1]), ValueError, "positions .* with total_q 2, but k has total_q 3"),
    ("positions", torch.tensor([-1, 0, 1]), ValueError, r"positions\[0\] must be in .*\[0, 32\), got -1"),
    ("positions", torch.tensor([0, 1, 32]), ValueError, r"positions\[2\] must be in .*\[0, 32\), got 32"),
    ("rope_cos_sin", None, ValueError, "positions is given without rope_cos_sin"),
    ("rope_cos_sin", torch.zeros(32, 64).half(), ValueError, "rope_cos_sin must be torch.float32, got torch.float16"),
    ("rope_cos_sin", torch.zeros(32, 66), ValueError, r"rotary_dim must be even and in .* \[2, 64\], got 66"),
    ("rope_cos_sin", torch.zeros(32, 7), ValueError, r"rotary_dim must be even and in .* \[2, 64\], got 7"),
    ("backend", "gpu", ValueError, "backend must be one of .* got 'gpu'"),
]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("argument", "value", "error", "message"), BAD_APPEND)
def test_append_kv_of_bad_argument_names_it_and_writes_nothing(
    argument: str, value: Any, error: type[Exception], message: str, backend: str
) -> None:
    arguments = {**append_arguments(), "backend": backend}
    k_cache, v_cache = arguments["k_cache"], arguments["v_cache"]
    arguments[argument] = value(arguments) if callable(value) else value
    with pytest.raises(error, match=message):
        mixattn.append_kv(**arguments)
    assert bool((k_cache == 7.0).all()) and bool((v_cache == 7.0).all())


def quantized(dtype: torch.dtype, width: int = 64) -> dict[str, Any]:
    """Caches of the dtype with scales per head, for both doors."""
    cache = torch.full((6, 16, 2, width), 0x33, dtype=torch.uint8).view(dtype)
    return {"k_cache": cache, "v_cache": cache.clone(), "k_scale": torch.ones(2), "v_scale": torch.ones(2)}


INT8, INT4 = quantized(torch.int8), quantized(torch.uint8, 32)
BAD_SCALES = [
    (INT8, "k_scale", None, ValueError, "k_scale must be a float, .* with k_cache of int8, got None"),
    (INT4, "v_scale", None, ValueError, "v_scale must be a float, .* with k_cache of int4, got None"),
    (INT8, "k_scale", 0.0, ValueError, "k_scale must be finite and > 0, got 0.0"),
    (INT8, "v_scale", -1, ValueError, "v_scale must be finite and > 0, got -1"),
    (INT8, "v_scale", float("nan"), ValueError, "v_scale must be finite and > 0, got nan"),
    (INT8, "v_scale", float("inf"), ValueError, "v_scale must be finite and > 0, got inf"),
    (INT8, "k_scale", [1.0], TypeError, "k_scale must be a torch.Tensor, got list"),
    (INT8, "k_scale", torch.ones(3), ValueError, "k_scale .* with num_kv_heads 3, but .* has num_kv_heads 2"),
    (INT8, "k_scale", torch.ones(()), ValueError, r"k_scale must be \[num_pages, page_size, num_kv_heads\], got"),
    (INT8, "v_scale", torch.ones(6, 2), ValueError, r"v_scale must be \[num_pages, page_size, num_kv_heads\], got"),
    (INT8, "v_scale", torch.ones(5, 16, 2), ValueError, "v_scale .* with num_pages 5, but k_cache has num_pages 6"),
    (INT8, "v_scale", torch.ones(6, 8, 2), ValueError, "v_scale .* with page_size 8, but k_cache has page_size 16"),
    (INT8, "v_scale", torch.ones(2).half(), ValueError, "v_scale must be torch.float32, got torch.float16"),
    (INT8, "v_scale", torch.ones(2, device="meta"), ValueError, "v_scale must be on k_cache's device cpu, got meta"),
    (INT8, "v_cache", INT4["v_cache"], NotImplementedError, "v_cache is .*uint8 and k_cache is .*int8; .* one dtype"),
    (INT8, "v_cache", quantized(torch.float8_e5m2)["v_cache"], NotImplementedError, "v_cache is .* k_cache is .*int8"),
    (
        INT4,
        "k_cache",
        INT8["k_cache"].view(torch.uint8),
        ValueError,
        "k_cache holds int4, .* head_dim / 2 = 32, got 64",
    ),
]


@pytest.mark.parametrize("door", ["attention", "append_kv"])
@pytest.mark.parametrize(("quantization", "argument", "value", "error", "message"), BAD_SCALES)
def test_doors_of_bad_scale_or_cache_name_it_and_write_nothing(
    quantization: dict[str, Any], argument: str, value: Any, error: type[Exception], message: str, door: str
) -> None:
    given = attention_arguments() if door == "attention" else append_arguments()
    arguments = {**given, **quantization, argument: value}
    before = {name: arguments[name].clone() for name in ("k_cache", "v_cache")}
    with pytest.raises(error, match=message):
        (mixattn.attention if door == "attention" else mixattn.append_kv)(**arguments)
    for name, cache in before.items():
        assert torch.equal(arguments[name].view(torch.uint8), cache.view(torch.uint8))


def test_append_kv_into_scales_that_share_memory_says_so() -> None:
    scale = torch.ones(6, 16, 1).expand(6, 16, 2)
    arguments = {**append_arguments(), **INT8, "k_scale": scale}
    with pytest.raises(ValueError, match="k_scale is written and must not have stride 0"):
        mixattn.append_kv(**arguments)


def test_append_kv_of_q_without_rope_says_that_q_is_only_rotated() -> None:
    arguments = {**append_arguments(), "positions": None, "rope_cos_sin": None}
    with pytest.raises(ValueError, match="q is given without positions and rope_cos_sin"):
        mixattn.append_kv(**arguments)
