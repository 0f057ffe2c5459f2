"""The ops as torch sees them: schemas and fakes hold, and torch.compile traces the doors without a graph break."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import mixattn
import mixattn.ops.attention  # the ops are registered when their doors are imported
import mixattn.ops.kv_cache
import mixattn.ops.merge
from mixattn.config import RopeConfig
from mixattn.ops.kv_dtypes import Scale
from mixattn.ops.plan import WorkPlan
from mixattn.ops.rope import rope_cos_sin
from tests.cases import AttentionCase, AttentionInputs, assert_attention_close, make_inputs

CASE = AttentionCase("compile", (1, 5, 1), (20, 7, 33), num_q_heads=4, num_kv_heads=2, head_dim=64, page_size=16)
OPTIONS = (0.2, True, 12, 30.0, False, False, 0)  # softmax_scale to sm_margin
NO_SCALES = (None, None, None, None)  # k_scale, v_scale, k_scale_value, v_scale_value
NO_SCORE_TENSORS = (None, None, None, *NO_SCALES)  # alibi_slopes, sinks, tree_mask
NO_DEVICE_PLAN = (None, None, None, None)  # partial_out, partial_lse, tickets, device_plan
SCORE_TENSORS = (torch.rand(4), torch.randn(4), torch.tensor([-1, 1, 3, 5, 0, 17, -1]), *NO_SCALES)


@pytest.fixture
def inputs() -> AttentionInputs:
    """The case without NaN: opcheck compares tensors before and after, and NaN equals nothing."""
    made = make_inputs(CASE, torch.float32)
    made.k_cache.nan_to_num_()
    made.v_cache.nan_to_num_()
    return made


def make_plan(inputs: AttentionInputs, **changes: Any) -> WorkPlan:
    return mixattn.plan(inputs.cu_seqlens_q, inputs.seq_lens, **{**CASE.plan_options, **changes})


def tensors_of(inputs: AttentionInputs) -> tuple[Tensor, ...]:
    return (inputs.q, inputs.k_cache, inputs.v_cache, *inputs.index_tensors.values())


@pytest.mark.parametrize("has_plan", [False, True])
def test_attention_op_passes_opcheck(inputs: AttentionInputs, has_plan: bool) -> None:
    words = torch.from_numpy(make_plan(inputs, window_left=12).buffer) if has_plan else None
    torch.library.opcheck(
        torch.ops.mixattn.attention.default, (*tensors_of(inputs), words, *NO_SCORE_TENSORS, *OPTIONS, "cpu")
    )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_attention_op_with_score_tensors_passes_opcheck(inputs: AttentionInputs, backend: str) -> None:
    arguments = (*tensors_of(inputs), None, *SCORE_TENSORS, *OPTIONS, backend)
    torch.library.opcheck(torch.ops.mixattn.attention.default, arguments)


@pytest.mark.parametrize("has_lse", [False, True])
def test_attention_out_op_passes_opcheck(inputs: AttentionInputs, has_lse: bool) -> None:
    out, lse = torch.zeros_like(inputs.q), torch.zeros(CASE.total_q, CASE.num_q_heads)
    arguments = (*tensors_of(inputs), None, *NO_SCORE_TENSORS, *OPTIONS, "cpu", out, lse if has_lse else None)
    arguments = (*arguments, *NO_DEVICE_PLAN)
    torch.library.opcheck(torch.ops.mixattn.attention_out.default, arguments)


def append_arguments() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "k": torch.randn(3, 2, 64),
        "v": torch.randn(3, 2, 64),
        "k_cache": torch.zeros(4, 16, 2, 64),
        "v_cache": torch.zeros(4, 16, 2, 64),
        "slot_mapping": torch.tensor([0, 63, 17]),
        "q": torch.randn(3, 4, 64),
        "positions": torch.tensor([0, 1, 31]),
        "rope_cos_sin": rope_cos_sin(RopeConfig(rotary_dim=64), 32),
    }


def test_append_kv_op_passes_opcheck() -> None:
    arguments = append_arguments()
    torch.library.opcheck(
        torch.ops.mixattn.append_kv.default, (*arguments.values(), *NO_SCALES, False, "cpu", torch.zeros(3, 4, 64))
    )
    without_rope = (*list(arguments.values())[:5], None, None, None, *NO_SCALES, False, None, None)
    torch.library.opcheck(torch.ops.mixattn.append_kv.default, without_rope)


@pytest.mark.parametrize("scales", ["tensors", "values"])
def test_ops_with_quantized_caches_pass_opcheck(inputs: AttentionInputs, scales: str) -> None:
    shape = inputs.k_cache.shape
    caches = [torch.ones(shape, dtype=torch.int8) for _ in "kv"]
    given = (torch.ones(shape[:3]), torch.ones(shape[:3]), None, None)
    if scales == "values":
        given = (None, None, 0.5, 2.0)
    attention_arguments = (inputs.q, *caches, *inputs.index_tensors.values(), None, None, None, None, *given, *OPTIONS)
    torch.library.opcheck(torch.ops.mixattn.attention.default, (*attention_arguments, "cpu"))
    k, v, _, _, slot_mapping = list(append_arguments().values())[:5]
    torch.library.opcheck(
        torch.ops.mixattn.append_kv.default, (k, v, *caches, slot_mapping, None, None, None, *given, False, "cpu", None)
    )


def test_merge_states_op_passes_opcheck() -> None:
    torch.library.opcheck(
        torch.ops.mixattn.merge_states.default, (torch.randn(3, 5, 4, 64), torch.randn(3, 5, 4), None)
    )


def layer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    positions: Tensor,
    table: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    plan: WorkPlan | Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What a model's attention layer does with the ops, among some torch arithmetic."""
    q = mixattn.append_kv(
        k * 2, v * 2, k_cache, v_cache, slot_mapping, q=q * 2, positions=positions, rope_cos_sin=table
    )
    out, lse = mixattn.attention(
        q, k_cache, v_cache, cu_seqlens_q=cu_seqlens_q, seq_lens=seq_lens, block_table=block_table, plan=plan,
        return_lse=True,
    )  # fmt: skip
    return out + 1, lse


def layer_arguments(inputs: AttentionInputs) -> dict[str, Any]:
    """New rows of every sequence go into the slots of its last q_len tokens."""
    generator = torch.Generator().manual_seed(3)
    positions = [torch.arange(kv_len - q_len, kv_len) for q_len, kv_len in zip(CASE.q_lens, CASE.kv_lens, strict=True)]
    slots = [
        inputs.block_table[seq_idx, p // CASE.page_size].long() * CASE.page_size + p % CASE.page_size
        for seq_idx, p in enumerate(positions)
    ]
    return {
        "q": inputs.q,
        "k": torch.randn(CASE.total_q, CASE.num_kv_heads, CASE.head_dim, generator=generator),
        "v": torch.randn(CASE.total_q, CASE.num_kv_heads, CASE.head_dim, generator=generator),
        "k_cache": inputs.k_cache.clone(),
        "v_cache": inputs.v_cache.clone(),
        "slot_mapping": torch.cat(slots),
        "positions": torch.cat(positions),
        "table": rope_cos_sin(RopeConfig(rotary_dim=64), 64),
        **inputs.index_tensors,
    }


@pytest.mark.parametrize(
    ("compiler", "plan_kind"),
    [
        ("eager", "WorkPlan"),
        ("eager", "words"),
        ("eager", "None"),
        ("aot_eager", "WorkPlan"),
        ("aot_eager", "words"),
        pytest.param("inductor", "WorkPlan", marks=pytest.mark.slow),
    ],
)
def test_compiled_layer_without_graph_breaks_equals_eager(
    inputs: AttentionInputs, compiler: str, plan_kind: str
) -> None:
    work_plan = make_plan(inputs)
    plan = {"WorkPlan": work_plan, "words": torch.from_numpy(work_plan.buffer), "None": None}[plan_kind]
    eager_arguments, arguments = layer_arguments(inputs), layer_arguments(inputs)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=compiler, fullgraph=True)
    with torch.no_grad():
        out, lse = compiled(**arguments, plan=plan)
        expected_out, expected_lse = layer(**eager_arguments, plan=plan)
    for cache in ("k_cache", "v_cache"):
        torch.testing.assert_close(arguments[cache], eager_arguments[cache])
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(lse, expected_lse)


@pytest.mark.parametrize("has_scale_tensors", [True, False])
def test_compiled_quantized_layer_without_graph_breaks_equals_eager(
    inputs: AttentionInputs, has_scale_tensors: bool
) -> None:
    def quantized_layer(
        k_cache: Tensor, v_cache: Tensor, k_scale: Scale, v_scale: Scale, arguments: dict[str, Tensor]
    ) -> Tensor:
        scales: dict[str, Any] = {"k_scale": k_scale, "v_scale": v_scale}
        mixattn.append_kv(arguments["k"] * 2, arguments["v"], k_cache, v_cache, arguments["slot_mapping"], **scales)
        return mixattn.attention(inputs.q, k_cache, v_cache, **inputs.index_tensors, **scales) + 1

    shape = inputs.k_cache.shape
    results = []
    for run in (quantized_layer, torch.compile(quantized_layer, backend="aot_eager", fullgraph=True)):
        torch._dynamo.reset()
        caches = [torch.ones(shape, dtype=torch.int8) for _ in "kv"]
        scales = [torch.ones(shape[:3]) if has_scale_tensors else 0.05 for _ in "kv"]
        with torch.no_grad():
            results.append((run(*caches, *scales, layer_arguments(inputs)), *caches))
    for expected, compiled in zip(*results, strict=True):
        assert torch.equal(expected, compiled)


def test_compiled_layer_serves_another_batch_of_the_same_shape(inputs: AttentionInputs) -> None:
    """The lengths and the plan are data of the graph, not constants in it."""
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for kv_lens in ((20, 7, 33), (31, 12, 2)):
        lens = torch.tensor(kv_lens, dtype=torch.int32)
        arguments = {**layer_arguments(inputs), "seq_lens": lens}
        arguments["block_table"] = inputs.block_table.clamp(max=inputs.k_cache.shape[0] - 1)
        eager_arguments = {name: value.clone() for name, value in arguments.items()}
        plan = mixattn.plan(arguments["cu_seqlens_q"], lens, **CASE.plan_options)
        with torch.no_grad():
            out, lse = compiled(**arguments, plan=plan)
            expected_out, expected_lse = layer(**eager_arguments, plan=plan)
        torch.testing.assert_close(out, expected_out)
        torch.testing.assert_close(lse, expected_lse)


def test_dispatch_mode_sees_the_ops_and_plain_calls_give_the_same_bits(inputs: AttentionInputs) -> None:
    """A plain call goes past the dispatcher; one that somebody listens to must not."""

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.add(func.name())
            return func(*args, **(kwargs or {}))

    names: set[str] = set()
    arguments, plain_arguments = layer_arguments(inputs), layer_arguments(inputs)
    with Recorder():
        out, lse = layer(**arguments, plan=make_plan(inputs))
        mixattn.attention(*tensors_of(inputs)[:3], **inputs.index_tensors)
    assert {"mixattn::append_kv", "mixattn::attention", "mixattn::attention_out"} <= names
    plain_out, plain_lse = layer(**plain_arguments, plan=make_plan(inputs))
    assert torch.equal(out, plain_out) and torch.equal(lse, plain_lse)


def test_fake_tensors_give_shapes_without_running_the_kernel(inputs: AttentionInputs) -> None:
    real = layer_arguments(inputs)
    with FakeTensorMode() as mode:
        arguments = {name: mode.from_tensor(tensor) for name, tensor in real.items()}
        out, lse = layer(**arguments, plan=None)
    assert out.shape == inputs.q.shape and lse.shape == inputs.q.shape[:2] and lse.dtype == torch.float32


def test_compiled_attention_into_out_writes_it(inputs: AttentionInputs) -> None:
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def into(out: Tensor) -> Tensor:
        return mixattn.attention(
            inputs.q, inputs.k_cache, inputs.v_cache, **inputs.index_tensors, **CASE.options, out=out
        )

    out = torch.full_like(inputs.q, torch.nan)
    with torch.no_grad():
        into(out)
    assert_attention_close(CASE, make_inputs(CASE, torch.float32), out, None)


def test_compiled_attention_with_score_tensors_equals_eager(inputs: AttentionInputs) -> None:
    torch._dynamo.reset()
    alibi_slopes, sinks, words, *_ = SCORE_TENSORS

    def call(scale: Tensor) -> Tensor:
        return mixattn.attention(
            *tensors_of(inputs)[:3], **inputs.index_tensors, alibi_slopes=alibi_slopes * scale, sinks=sinks * scale,
            tree_mask=words,
        )  # fmt: skip

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    scale = torch.tensor(2.0)
    with torch.no_grad():
        torch.testing.assert_close(compiled(scale), call(scale))


def test_compiled_attention_of_bad_shape_fails_while_tracing(inputs: AttentionInputs) -> None:
    compiled = torch.compile(mixattn.attention, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"k_cache .* head_dim 64, but q has head_dim 32"):
        compiled(inputs.q[..., :32].contiguous(), inputs.k_cache, inputs.v_cache, **inputs.index_tensors)
