"""The grid of ``attention(backend="triton")``: what the SMs hold at once, but for those of ``sm_margin``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mixattn
from mixattn import env
from mixattn.compat import flash_attn_interface
from mixattn.ops import attention as attention_module
from mixattn.ops.attention import attention, device_hardware
from mixattn.ops.plan import H100, cpu_hardware, with_workers
from mixattn.triton_kernels import mixed_attention as triton_attention
from tests.cases import AttentionCase, assert_attention_close, make_inputs

pytestmark = pytest.mark.skipif(not env.triton_interpret(), reason="observes the grid in the interpreter")

CASE = AttentionCase("grid", (1, 20, 9), (100, 40, 60), num_q_heads=4)
NUM_SMS = 5
PROGRAMS_PER_SM = 2
"""Of the tiles of an H100, which the interpreter runs."""


@pytest.fixture
def grids(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The grids of the launches to come, on a device that seems to have ``NUM_SMS``."""
    seen: list[tuple[int, ...]] = []
    kernel = triton_attention.mixed_attention_kernel

    class Watched:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            seen.append(grid)
            return kernel[grid]

    monkeypatch.setattr(triton_attention, "mixed_attention_kernel", Watched())
    monkeypatch.setattr(triton_attention, "num_sms", lambda device: NUM_SMS)
    return seen


def run(**options: Any) -> torch.Tensor:
    inputs = make_inputs(CASE, torch.bfloat16)
    out, lse = attention(
        inputs.q, inputs.k_cache, inputs.v_cache, **inputs.index_tensors, **CASE.options, return_lse=True,
        backend="triton", **options,
    )  # fmt: skip
    assert_attention_close(CASE, inputs, out, lse)
    return out


def test_grid_fills_the_sms_outside_of_the_margin_whatever_the_plan(grids: list[tuple[int, ...]]) -> None:
    inputs = make_inputs(CASE, torch.bfloat16)
    for num_sms in (2 * NUM_SMS, NUM_SMS, NUM_SMS - 2):
        plan = mixattn.plan(
            inputs.cu_seqlens_q, inputs.seq_lens, **CASE.plan_options, kv_element_bytes=2,
            hardware=with_workers(H100, num_sms, PROGRAMS_PER_SM),
        )  # fmt: skip
        whole, rest = run(plan=plan), run(plan=plan, sm_margin=NUM_SMS - 1)
        assert torch.equal(whole, rest), "the grid has changed the bits"
    assert grids == [(2 * NUM_SMS,), (PROGRAMS_PER_SM,)] * 3


def test_grid_of_a_call_without_a_plan_leaves_the_margin_free(
    grids: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = []
    make_plan = attention_module.make_plan
    monkeypatch.setattr(attention_module, "make_plan", lambda *a, **k: plans.append(make_plan(*a, **k)) or plans[-1])
    run()
    run(sm_margin=3)
    assert grids == [(2 * NUM_SMS,), (2 * (NUM_SMS - 3),)]
    assert [made.hardware.num_workers for made in plans] == [2 * NUM_SMS, 2 * (NUM_SMS - 3)]


def test_flash_attention_3s_sm_margin_reaches_the_grid(
    grids: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_triton(*args: Any, **options: Any) -> Any:
        return attention(*args, **options, backend="triton")

    monkeypatch.setattr("mixattn.compat.kvcache.attention", in_triton)
    q, k, v = (torch.randn(1, 20, num_heads, 64, dtype=torch.bfloat16) for num_heads in (4, 2, 2))
    flash_attn_interface.flash_attn_with_kvcache(q, k, v, causal=True, sm_margin=4)
    assert grids == [(PROGRAMS_PER_SM,)]


@pytest.mark.parametrize(("margin", "bounds"), [(NUM_SMS, r"in \[0, 4\] on a device of 5 SMs"), (-1, ">= 0")])
def test_margin_out_of_bounds_is_refused(margin: int, bounds: str, grids: list[tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match=f"sm_margin must be {bounds}, got {margin}"):
        run(sm_margin=margin)
    assert not grids


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_margin_on_a_cpu_changes_nothing(backend: str) -> None:
    inputs = make_inputs(CASE, torch.float32)
    arguments = {"q": inputs.q, "k_cache": inputs.k_cache, "v_cache": inputs.v_cache, **inputs.index_tensors}
    whole = attention(**arguments, backend=backend)
    assert torch.equal(attention(**arguments, backend=backend, sm_margin=1000), whole)
    with pytest.raises(ValueError, match="sm_margin must be >= 0, got -1"):
        attention(**arguments, backend=backend, sm_margin=-1)


def test_device_hardware_leaves_the_margin_out(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="H100", major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    gpu = torch.device("cuda", 0)
    for first in ("triton", "cuda"):
        monkeypatch.setattr(attention_module, "first_backend", lambda device_type, first=first: first)
        whole, rest = (mixattn.device_hardware(gpu, sm_margin=margin) for margin in (0, 16))
        assert (whole.num_workers, rest.num_workers) == (2 * 132, 2 * 116)
        assert rest.flops_per_s == whole.flops_per_s and rest.separates_small is whole.separates_small
    assert device_hardware(gpu, 1, sm_margin=16).num_workers == 116
    with pytest.raises(ValueError, match=r"sm_margin must be in \[0, 131\] on a device of 132 SMs, got 132"):
        device_hardware(gpu, sm_margin=132)
    cpu = torch.device("cpu")
    assert device_hardware(cpu, sm_margin=16) == cpu_hardware()
    with pytest.raises(ValueError, match="sm_margin must be >= 0, got -1"):
        device_hardware(cpu, sm_margin=-1)
