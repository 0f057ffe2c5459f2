"""``attention(plan=DevicePlan, backend="triton")`` as in a captured graph; the plan is made on an emulated driver."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

import mixattn
from mixattn import env
from mixattn.triton_kernels import mixed_attention as triton_attention
from tests.cases import AttentionCase, assert_attention_close, make_inputs
from tests.cuda.conftest import driver, emulation  # noqa: F401, the fixtures
from tests.cuda.emulation import Emulation
from tests.device_batch import BATCHES, GARBAGE_WORD, SHAPE, DeviceBatch, device_plan
from tests.triton.attention_run import hardware

pytestmark = pytest.mark.skipif(not env.triton_interpret(), reason="an emulated driver plans in the host's memory")
GROUPS = AttentionCase("shared-prefix", (1, 1, 2, 1), (300, 290, 280, 40), shared_pages=(0, 16, 16, 0), **SHAPE)


class Graph:
    """The launches of ``update`` and two layers, captured while tensors hold garbage: what reads them on the way shows.

    Args:
        options: of ``attention``.
    """

    def __init__(
        self,
        emulation: Emulation,  # noqa: F811
        monkeypatch: pytest.MonkeyPatch,
        batch: DeviceBatch,
        plan: mixattn.DevicePlan,
        **options: Any,
    ) -> None:
        self._emulation = emulation
        self._launches: list[Callable[[], None]] = []
        launch = triton_attention.launch

        def put(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
            run = launch(kernel, grid)
            return lambda *arguments, **options: self._launches.append(lambda: run(*arguments, **options))

        batch.forget()
        plan.buffer.fill_(GARBAGE_WORD)
        with emulation.capture(), monkeypatch.context() as patch:
            patch.setattr(triton_attention, "launch", put)
            batch.update(plan)
            batch.attend(plan, backend="triton", **options)
        assert len(self._launches) == 2 and (plan.buffer == GARBAGE_WORD).all()

    def replay(self) -> None:
        self._emulation.replay()
        for run in self._launches:
            run()


@pytest.mark.parametrize("invariant", [False, True], ids=["balanced", "invariant"])
def test_captured_update_and_attention_run_with_other_lengths_in_the_same_tensors(
    invariant: bool,
    driver: Emulation,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made_for = dataclasses.replace(hardware(8, 64), invariant_split_tokens=128)
    plan, batch = device_plan(made_for, invariant=invariant, dtype="float32"), DeviceBatch(torch.float32)
    graph = Graph(driver, monkeypatch, batch, plan, invariant=invariant)
    before = [tensor.data_ptr() for tensor in (plan.buffer, *plan.workspace)]
    for case in [*BATCHES, BATCHES[0]]:
        inputs = make_inputs(case, torch.float32)
        batch.load(inputs)
        graph.replay()
        batch.check(case, inputs)
        assert plan.read().num_merges > 0
        assert not plan.workspace.tickets.any(), "tickets are not zero again"
    assert [tensor.data_ptr() for tensor in (plan.buffer, *plan.workspace)] == before


def test_captured_graph_groups_slices_by_the_table_of_each_replay(
    driver: Emulation,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan, batch = device_plan(hardware(8, 64), page_size=16), DeviceBatch(torch.bfloat16)
    graph = Graph(driver, monkeypatch, batch, plan)
    for case, num_groups in ((GROUPS, 1), (BATCHES[3], 0)):
        inputs = make_inputs(case, torch.bfloat16)
        batch.load(inputs)
        graph.replay()
        batch.check(case, inputs)
        assert plan.read().num_groups == num_groups
        assert not plan.workspace.tickets.any()


def test_attention_by_a_device_plan_with_heads_of_v_of_another_size(driver: Emulation) -> None:  # noqa: F811
    sizes = {"head_dim": 192, "v_head_dim": 128}
    plan = device_plan(hardware(8, 64), **sizes)
    case = AttentionCase("v128-of-192", (1, 40, 9), (300, 90, 200), **{**SHAPE, **sizes})
    inputs = make_inputs(case, torch.bfloat16)
    arguments = {**inputs.index_tensors, "plan": plan, "backend": "triton"}
    plan.update(inputs.cu_seqlens_q, inputs.seq_lens)
    assert plan.read().num_merges > 0 and plan.workspace.partial_out.shape[1] == 128
    out, lse = mixattn.attention(inputs.q, inputs.k_cache, inputs.v_cache, **arguments, return_lse=True)
    assert_attention_close(case, inputs, out, lse)
    with pytest.raises(ValueError, match=r"v_head_dim 128, .* 192"):
        mixattn.attention(inputs.q, inputs.k_cache, inputs.k_cache, **arguments)


def test_attention_of_a_batch_that_has_no_plan_writes_nothing(
    driver: Emulation,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither does one before the first update; what comes next is computed as if nothing had been."""
    plan, batch = device_plan(hardware(8, 64)), DeviceBatch(torch.bfloat16)
    batch.attend(plan, backend="triton")
    graph, inputs = Graph(driver, monkeypatch, batch, plan), make_inputs(BATCHES[0], torch.bfloat16)
    batch.load(inputs)
    batch.lens["seq_lens"][1] = -1
    graph.replay()
    assert all(results.isnan().all() for results in (*batch.outs, batch.lse, *plan.workspace[:2]))
    assert not plan.workspace.tickets.any()
    batch.load(inputs)
    graph.replay()
    batch.check(BATCHES[0], inputs)


@pytest.mark.parametrize(
    ("plan_options", "invariant", "message"),
    [
        ({"block_rows": (128, 64, 32)}, False, r"plan must be made for hardware with block_rows \(128, 64, 16\)"),
        ({"invariant_split_tokens": 192}, True, "plan's invariant_split_tokens must be a multiple of 128, got 192"),
    ],
)
def test_attention_by_a_device_plan_for_other_tiles_is_refused(
    plan_options: dict[str, Any],
    invariant: bool,
    message: str,
    driver: Emulation,  # noqa: F811
) -> None:
    plan = device_plan(dataclasses.replace(hardware(8, 64), **plan_options), invariant=invariant)
    batch = DeviceBatch(torch.bfloat16)
    with pytest.raises(ValueError, match=message):
        batch.attend(plan, backend="triton", invariant=invariant)
