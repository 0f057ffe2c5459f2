"""``attention(plan=DevicePlan)`` as in a captured graph: called once, run with other lengths in the same tensors."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import mixattn
from mixattn.ops import cuda_images
from tests.cases import QUANTIZED_FORMATS, AttentionCase, KvFormat, assert_attention_close, make_inputs
from tests.cuda.attention_run import hardware
from tests.cuda.conftest import forget
from tests.cuda.emulation import NUM_SMS, Emulation
from tests.device_batch import BATCHES, GARBAGE_WORD, MAX_KV_LEN, SHAPE, DeviceBatch, device_plan

GROUPS = AttentionCase(
    "shared-prefix", (1, 1, 2, 1), (300, 290, 280, 40), shared_pages=(0, 16, 16, 0), **SHAPE
)  # fmt: skip


def capture(driver: Emulation, batch: DeviceBatch, plan: mixattn.DevicePlan, **options: Any) -> None:
    """Captures ``update`` and two layers while tensors, plan and lengths included, hold garbage: none is read."""
    batch.forget()
    plan.buffer.fill_(GARBAGE_WORD)
    with driver.capture():
        batch.update(plan)
        batch.attend(plan, backend="cuda", **options)
    assert (plan.buffer == GARBAGE_WORD).all()


def addresses(batch: DeviceBatch, plan: mixattn.DevicePlan) -> list[int]:
    return [tensor.data_ptr() for tensor in (plan.buffer, *plan.workspace, *batch.outs, batch.lse)]


@pytest.mark.parametrize("invariant", [False, True], ids=["balanced", "invariant"])
@pytest.mark.parametrize("capability", [80, 90])
def test_captured_update_and_attention_run_with_other_lengths_in_the_same_tensors(
    capability: int, invariant: bool, driver: Emulation
) -> None:
    driver.configure(capability=capability)
    forget()
    made_for = dataclasses.replace(hardware(8, 64, separates_small=capability == 90), invariant_split_tokens=128)
    plan, batch = device_plan(made_for, invariant=invariant), DeviceBatch(torch.bfloat16)
    capture(driver, batch, plan, invariant=invariant)
    before = addresses(batch, plan)
    for seed, case in enumerate([*BATCHES, BATCHES[0]]):
        inputs = make_inputs(case, torch.bfloat16)
        batch.load(inputs)
        driver.configure(capability=capability, seed=seed)
        driver.replay()
        batch.check(case, inputs)
        assert plan.read().num_merges > 0
        assert not plan.workspace.tickets.any(), "tickets are not zero again"
    assert addresses(batch, plan) == before
    is_hoppers = capability == 90 and not invariant
    assert driver.counts()["num_threads"] == (512 if is_hoppers else 128) * NUM_SMS


def test_captured_graph_groups_slices_by_the_table_of_each_replay(driver: Emulation) -> None:
    plan, batch = device_plan(hardware(8, 64), page_size=16), DeviceBatch(torch.float16)
    capture(driver, batch, plan)
    for case, num_groups in ((GROUPS, 1), (BATCHES[3], 0), (GROUPS, 1)):
        inputs = make_inputs(case, torch.float16)
        batch.load(inputs)
        driver.replay()
        batch.check(case, inputs)
        assert plan.read().num_groups == num_groups
        assert not plan.workspace.tickets.any()


@pytest.mark.parametrize("capability", [80, 90])
def test_attention_of_a_batch_that_has_no_plan_writes_nothing(capability: int, driver: Emulation) -> None:
    """Neither does one before the first update; what comes next is computed as if nothing had been."""
    driver.configure(capability=capability)
    forget()
    torch.use_deterministic_algorithms(True)  # new memory is filled with the largest number
    plan = device_plan(hardware(8, 64, separates_small=capability == 90))
    torch.use_deterministic_algorithms(False)
    batch, inputs = DeviceBatch(torch.bfloat16), make_inputs(BATCHES[0], torch.bfloat16)
    batch.attend(plan, backend="cuda")
    with pytest.raises(ValueError, match="update has not been called"):
        plan.read()
    capture(driver, batch, plan)
    too_many_rows = torch.tensor([0, *[10_000] * 4], dtype=torch.int32)
    for name, values in (("seq_lens", torch.tensor([5, -1, 5, 0])), ("cu_seqlens_q", too_many_rows)):
        batch.load(inputs)
        batch.lens[name].copy_(values)
        driver.replay()
        assert all(results.isnan().all() for results in (*batch.outs, batch.lse, *plan.workspace[:2]))
        assert not plan.workspace.tickets.any()
        with pytest.raises(ValueError):
            plan.read()
        batch.load(inputs)
        driver.replay()
        batch.check(BATCHES[0], inputs)
        plan.workspace.partial_out.fill_(torch.nan)
        plan.workspace.partial_lse.fill_(torch.nan)


def test_attention_by_a_device_plan_over_quantised_pages_is_within_twice_eager(driver: Emulation) -> None:
    plan, case = device_plan(hardware(8, 64), kv_element_bytes=1), BATCHES[0]
    inputs = make_inputs(case, torch.bfloat16, kv=QUANTIZED_FORMATS[0])
    plan.update(inputs.cu_seqlens_q, inputs.seq_lens)
    out, lse = mixattn.attention(
        inputs.q, inputs.k_cache, inputs.v_cache, **inputs.index_tensors, **inputs.scales, plan=plan, return_lse=True,
        backend="cuda",
    )  # fmt: skip
    assert_attention_close(case, inputs, out, lse)


@pytest.mark.parametrize("kv", [None, QUANTIZED_FORMATS[0]], ids=["bfloat16", "int8"])
def test_attention_by_a_device_plan_for_heads_of_v_of_another_size_is_within_twice_eager(
    kv: KvFormat | None, driver: Emulation
) -> None:
    case = dataclasses.replace(BATCHES[0], head_dim=192, v_head_dim=128)
    plan = device_plan(hardware(8, 64), head_dim=192, v_head_dim=128, kv_element_bytes=2 if kv is None else 1)
    inputs = make_inputs(case, torch.bfloat16, kv=kv)
    plan.update(inputs.cu_seqlens_q, inputs.seq_lens)
    assert plan.read().num_merges > 0
    out, lse = mixattn.attention(
        inputs.q, inputs.k_cache, inputs.v_cache, **inputs.index_tensors, **inputs.scales, plan=plan, return_lse=True,
        backend="cuda",
    )  # fmt: skip
    assert plan.workspace.partial_out.shape[1] == 128
    assert_attention_close(case, inputs, out, lse)


@pytest.mark.parametrize("on_device", [False, True], ids=["WorkPlan", "DevicePlan"])
@pytest.mark.parametrize("separates_small", [False, True], ids=["mixed", "apart"])
def test_attention_on_hopper_loads_the_image_that_the_kernel_for_its_plan_is_in(
    separates_small: bool, on_device: bool, driver: Emulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan whose small items are not apart was launched from the other kernel's image, which lacks its kernel."""
    driver.configure(capability=90)
    forget()
    case, inputs = BATCHES[0], make_inputs(BATCHES[0], torch.bfloat16)
    made_for = hardware(8, 64, separates_small)
    plan: Any = mixattn.plan(inputs.cu_seqlens_q, inputs.seq_lens, **case.plan_options, hardware=made_for)
    if on_device:
        plan = device_plan(made_for)
        plan.update(inputs.cu_seqlens_q, inputs.seq_lens)
    names = []
    image = cuda_images.image
    with monkeypatch.context() as patch:
        patch.setattr(cuda_images, "image", lambda idx, name: names.append(name) or image(idx, name))
        mixattn.attention(inputs.q, inputs.k_cache, inputs.v_cache, **inputs.index_tensors, plan=plan, backend="cuda")
    arch, num_threads = ("sm90", 512) if separates_small else ("sm80", 128)
    assert names == [f"{arch}_mixed_attention_hd64"] and driver.counts()["num_threads"] == num_threads * NUM_SMS


@pytest.mark.parametrize(
    ("plan_options", "call_options", "message"),
    [
        ({"max_num_seqs": 2}, {}, "plan was made for max_num_seqs 2, this call has num_seqs 3"),
        ({"max_total_q": 49}, {}, "plan was made for max_total_q 49, this call has total_q 50"),
        ({"num_q_heads": 8}, {}, "plan was made for num_q_heads 8, this call has 6"),
        ({"num_kv_heads": 1}, {}, "plan was made for num_kv_heads 1, this call has 2"),
        ({"head_dim": 128}, {}, "plan was made for head_dim 128, this call has 64"),
        ({"v_head_dim": 128}, {}, "plan was made for v_head_dim 128, this call has 64"),
        ({"dtype": "float32"}, {}, "plan was made for kv_element_bytes 4, this call has 2"),
        ({"causal": False}, {}, "plan was made for causal False, this call has True"),
        ({"window_left": 7}, {}, "plan was made for window_left 7, this call has None"),
        ({"window_left": 7}, {"window_left": 8}, "plan was made for window_left 7, this call has 8"),
        ({"invariant": True}, {}, "plan was made for invariant True, this call has False"),
        ({}, {"invariant": True}, "plan was made for invariant False, this call has True"),
        ({"page_size": 32}, {}, "plan was made for page_size 32, this call has 16"),
        (
            {"hardware": dataclasses.replace(hardware(8, 64), block_rows=(256, 64, 16))}, {},
            r"plan must be made for hardware with block_rows \(128, 64, 16\), it was made for \(256, 64, 16\)",
        ),
        (
            {"hardware": dataclasses.replace(hardware(8, 64), invariant_split_tokens=96), "invariant": True},
            {"invariant": True}, "plan's invariant_split_tokens must be a multiple of 64, got 96",
        ),
    ],
)  # fmt: skip
def test_attention_by_a_device_plan_for_other_calls_is_refused(
    plan_options: dict[str, Any], call_options: dict[str, Any], message: str, driver: Emulation
) -> None:
    plan = device_plan(**{"hardware": hardware(8, 64), **plan_options})
    inputs = make_inputs(BATCHES[0], torch.bfloat16)
    with pytest.raises(ValueError, match=message):
        mixattn.attention(
            inputs.q, inputs.k_cache, inputs.v_cache, **inputs.index_tensors, plan=plan, backend="cuda", **call_options
        )


@pytest.mark.parametrize("page_size", [None, 16])
def test_attention_with_alibi_slopes_takes_a_device_plan_that_makes_no_groups(
    page_size: int | None, driver: Emulation
) -> None:
    case = dataclasses.replace(BATCHES[0], alibi="per-head")
    inputs = make_inputs(case, torch.bfloat16)
    plan = device_plan(hardware(8, 64), page_size=page_size)
    plan.update(inputs.cu_seqlens_q, inputs.seq_lens, None if page_size is None else inputs.block_table)

    refused = pytest.raises(
        NotImplementedError, match="alibi_slopes is not supported with a plan in which slices share"
    )
    out = None
    with contextlib.nullcontext() if page_size is None else refused:
        out = mixattn.attention(
            inputs.q, inputs.k_cache, inputs.v_cache, **inputs.index_tensors, **inputs.score_tensors, plan=plan,
            backend="cuda",
        )  # fmt: skip
    if out is not None:
        assert_attention_close(case, inputs, out, None)


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
def test_attention_by_a_device_plan_on_a_backend_that_reads_plans_on_the_host_is_refused(
    backend: str | None, driver: Emulation
) -> None:
    inputs = make_inputs(BATCHES[0], torch.bfloat16)
    with pytest.raises(NotImplementedError, match=r"plan on a device is not supported by .* DevicePlan\.read\(\)"):
        mixattn.attention(
            inputs.q, inputs.k_cache, inputs.v_cache, **inputs.index_tensors, plan=device_plan(hardware(8, 64)),
            backend=backend,
        )  # fmt: skip


def test_device_plan_of_more_partial_rows_than_can_be_counted_is_refused(driver: Emulation) -> None:
    with pytest.raises(ValueError, match="max_total_q 1000000 and max_kv_len 1048576 can need 6144000000 partial rows"):
        device_plan(
            dataclasses.replace(hardware(8, 64), invariant_split_tokens=1024), invariant=True, max_total_q=10**6,
            max_kv_len=2**20,
        )  # fmt: skip


def test_device_plan_of_sequences_longer_than_it_was_made_for_has_none(driver: Emulation) -> None:
    """There are items enough for few rows of many keys, but not the partial rows."""
    made_for = dataclasses.replace(hardware(8, 64), invariant_split_tokens=128)
    plan = device_plan(made_for, invariant=True)
    rows = torch.tensor([0, 21], dtype=torch.int32)
    plan.update(rows, torch.tensor([MAX_KV_LEN], dtype=torch.int32))
    assert plan.read().num_merges > 0
    plan.update(rows, torch.tensor([9 * 128], dtype=torch.int32))
    with pytest.raises(ValueError, match="max_kv_len leave room for"):
        plan.read()


# ---- torch ----------------------------------------------------------------------------------------------------------


def made_without_nan(driver: Emulation) -> tuple[Any, mixattn.DevicePlan]:
    """Inputs and their plan; opcheck compares tensors before and after, and NaN equals nothing."""
    inputs = make_inputs(BATCHES[0], torch.bfloat16)
    inputs.k_cache.nan_to_num_()
    inputs.v_cache.nan_to_num_()
    plan = device_plan(hardware(8, 64))
    for tensor in plan.workspace:
        tensor.zero_()
    plan.buffer.zero_()
    plan.update(inputs.cu_seqlens_q, inputs.seq_lens)
    return inputs, plan


def test_attention_out_op_with_a_device_plan_passes_opcheck(driver: Emulation) -> None:
    inputs, plan = made_without_nan(driver)
    torch.library.opcheck(
        torch.ops.mixattn.attention_out.default,
        (
            inputs.q, inputs.k_cache, inputs.v_cache, *inputs.index_tensors.values(), plan.buffer, *(None,) * 7,
            0.2, True, None, None, False, False, 0, "cuda", torch.zeros_like(inputs.q), torch.zeros(inputs.q.shape[:2]),
            *plan.workspace, list(plan.terms),
        ),
    )  # fmt: skip


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_layers_by_a_device_plan_without_graph_breaks_serve_another_batch(
    compiler: str, driver: Emulation
) -> None:
    inputs, plan = made_without_nan(driver)

    def layers(q: Tensor, plan: mixattn.DevicePlan) -> tuple[Tensor, Tensor, Tensor]:
        options = {**inputs.index_tensors, "plan": plan, "backend": "cuda"}
        out, lse = mixattn.attention(q * 2, inputs.k_cache, inputs.v_cache, **options, return_lse=True)
        return out, lse, mixattn.attention(out, inputs.v_cache, inputs.k_cache, **options)

    torch._dynamo.reset()
    compiled = torch.compile(layers, backend=compiler, fullgraph=True)
    with torch.no_grad():
        for kv_lens in ((300, 90, 200), (30, 90, 111)):
            inputs.seq_lens.copy_(torch.tensor(kv_lens))
            plan.update(inputs.cu_seqlens_q, inputs.seq_lens)
            results = compiled(inputs.q, plan)
            assert not plan.workspace.tickets.any()
            for result, expected in zip(results, layers(inputs.q, plan), strict=True):
                assert torch.equal(result, expected)
