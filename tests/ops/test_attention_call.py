"""Which plan a call without one gets, and how a plan gets to the device of its call.

A GPU is stood in for by torch's meta device and a pin that is watched.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mixattn
from mixattn.ops import attention
from mixattn.ops.attention_call import AttentionCall, attention_layout, plan_on_device
from mixattn.ops.reference import attention_reference
from tests.cases import AttentionCase, make_inputs

META = torch.device("meta")


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, dict[str, Any]]]:
    """The source and the options of each copy to a device; ``pin_memory`` gives a copy, as torch's does."""
    made: list[tuple[Tensor, dict[str, Any]]] = []
    to = Tensor.to

    def watched(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        made.append((tensor, options))
        return to(tensor, *args, **options)

    def pin(tensor: Tensor) -> Tensor:
        pinned = tensor.clone()
        pinned.is_from_pinned_memory = True  # type: ignore[attr-defined]
        return pinned

    monkeypatch.setattr(Tensor, "to", watched)
    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)  # a CPU's torch has no such thing
    return made


def test_plan_goes_to_a_gpu_from_pinned_memory_and_nobody_waits(copies: list[tuple[Tensor, dict[str, Any]]]) -> None:
    words = torch.arange(20, dtype=torch.int32)
    on_device = plan_on_device(words, META)
    ((source, options),) = copies
    words.fill_(-1)  # the next step's plan, into the same buffer
    assert hasattr(source, "is_from_pinned_memory") and options["non_blocking"] is True
    assert source.tolist() == list(range(20))
    assert (on_device.device, on_device.shape, on_device.dtype) == (META, words.shape, torch.int32)


def test_plan_of_a_call_on_the_cpu_is_not_copied(copies: list[tuple[Tensor, dict[str, Any]]]) -> None:
    words = torch.zeros(20, dtype=torch.int32)
    assert plan_on_device(words, torch.device("cpu")) is words and not copies


def test_plan_in_a_captured_graph_is_refused_before_the_copy(
    copies: list[tuple[Tensor, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(
        NotImplementedError, match=r"a captured graph cannot repeat; the nearest is a mixattn\.DevicePlan"
    ):
        plan_on_device(torch.zeros(20, dtype=torch.int32), META)
    assert not copies


def test_plan_that_attention_would_make_in_a_captured_graph_is_refused_before_lengths_are_copied(
    copies: list[tuple[Tensor, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    case = AttentionCase("captured", (1, 5), (20, 30))
    inputs = make_inputs(case, torch.bfloat16).to(META)
    missing: dict[str, Any] = dict.fromkeys(AttentionCall._fields)
    call = AttentionCall(
        **{**missing, "q": inputs.q, "k_cache": inputs.k_cache, "v_cache": inputs.v_cache, **inputs.index_tensors}
    )
    copies.clear()
    with pytest.raises(
        NotImplementedError, match=r"a captured graph cannot repeat; the nearest is a mixattn\.DevicePlan"
    ):
        attention._default_plan(call, "triton", attention_layout(call, inputs.q, None), inputs.q)
    assert not copies


class TestPlanOfACallWithoutOne:
    @pytest.fixture
    def made(self, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
        """The arguments of each plan that is made."""
        seen: list[dict[str, Any]] = []
        make_plan = attention.make_plan
        monkeypatch.setattr(attention, "_last_plan", None)
        monkeypatch.setattr(attention, "make_plan", lambda **terms: seen.append(terms) or make_plan(**terms))
        return seen

    def test_is_made_once_for_layers_of_one_batch(self, made: list[dict[str, Any]]) -> None:
        inputs = make_inputs(AttentionCase("layers", (1, 5), (20, 30)), torch.float32)
        outs = [mixattn.attention(inputs.q, inputs.k_cache, inputs.v_cache, **inputs.index_tensors) for _ in range(3)]
        assert len(made) == 1
        assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])

    def test_is_made_anew_when_lengths_change_in_the_same_tensor(self, made: list[dict[str, Any]]) -> None:
        inputs = make_inputs(AttentionCase("growing", (1, 5), (20, 300)), torch.float32)
        for _ in range(3):
            inputs.index_tensors["seq_lens"] -= 3
            out = mixattn.attention(inputs.q, inputs.k_cache, inputs.v_cache, **inputs.index_tensors)
            expected, _ = attention_reference(inputs.q, inputs.k_cache, inputs.v_cache, **inputs.index_tensors)
            torch.testing.assert_close(out, expected.float(), atol=2e-5, rtol=2e-5)
        assert len(made) == 3

    @pytest.mark.parametrize("change", [{"causal": False}, {"window_left": 4}, {"invariant": True}, {"alibi": True}])
    def test_is_made_anew_for_other_options(self, made: list[dict[str, Any]], change: dict[str, Any]) -> None:
        inputs = make_inputs(AttentionCase("options", (1, 5), (20, 30)), torch.float32)
        options = dict(change)
        if options.pop("alibi", False):  # such calls take no plan with shared prefixes: the block table is left out
            options["alibi_slopes"] = torch.ones(inputs.q.shape[1])
        for terms in ({}, options, {}):
            mixattn.attention(inputs.q, inputs.k_cache, inputs.v_cache, **inputs.index_tensors, **terms)
        assert len(made) == 3

    def test_is_made_anew_for_other_pages(self, made: list[dict[str, Any]]) -> None:
        inputs = make_inputs(AttentionCase("pages", (1, 1), (64, 64)), torch.float32)
        tables = inputs.index_tensors["block_table"], inputs.index_tensors["block_table"].flip(0).contiguous()
        for table in tables:
            mixattn.attention(
                inputs.q, inputs.k_cache, inputs.v_cache, **{**inputs.index_tensors, "block_table": table}
            )
        assert len(made) == 2
