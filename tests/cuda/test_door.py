"""``attention(backend="cuda")``: door, checks and loader as on a GPU, the driver an emulated one."""

from __future__ import annotations

import dataclasses
import functools
import logging

import pytest
import torch

import mixattn
from mixattn import _C, env
from mixattn.compat import flash_attn_interface
from mixattn.ops import attention as attention_module
from mixattn.ops import backends, cuda_images
from mixattn.ops.attention import attention
from mixattn.ops.plan import cpu_hardware
from tests.cases import (
    QUANTIZED_FORMATS,
    AttentionCase,
    AttentionInputs,
    KvFormat,
    assert_attention_close,
    make_inputs,
    poisoned_out,
)
from tests.cuda.attention_run import hardware, prepare
from tests.cuda.conftest import forget
from tests.cuda.emulation import NUM_SMS, Emulation
from tests.cuda.test_mixed_attention import DTYPES, SUPPORTED_CASES

CASE = AttentionCase("door", (1, 40, 9), (300, 90, 200), num_q_heads=6, num_workers=8)


def run(case: AttentionCase, inputs: AttentionInputs, **options: object) -> torch.Tensor:
    out, lse = attention(
        inputs.q, inputs.k_cache, inputs.v_cache, **inputs.index_tensors, **inputs.score_tensors, **inputs.scales,
        **case.options, return_lse=True, **{"backend": "cuda", **options},
    )  # fmt: skip
    assert_attention_close(case, inputs, out, lse)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SUPPORTED_CASES, ids=lambda case: case.id)
def test_attention_on_an_emulated_driver_is_within_twice_eager(
    case: AttentionCase, dtype: torch.dtype, driver: Emulation
) -> None:
    inputs = make_inputs(case, dtype)
    plan = mixattn.plan(
        inputs.cu_seqlens_q, inputs.seq_lens, **case.plan_options, kv_element_bytes=dtype.itemsize,
        hardware=hardware(case.num_workers or 4, 64),
    )  # fmt: skip
    driver.configure(seed=1)
    run(case, inputs, plan=plan)
    has_run = driver.counts()["num_switches"] > 0
    assert has_run is (case.total_q > 0), "something else has run it"


def test_attention_without_a_plan_makes_one(driver: Emulation) -> None:
    run(CASE, make_inputs(CASE, torch.bfloat16))


HOPPER_CASE = dataclasses.replace(CASE, id="door-sm_90", head_dim=128, num_workers=None)


def test_attention_on_hopper_takes_its_kernel_and_a_plan_with_small_items_apart(
    driver: Emulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.configure(capability=90)
    forget()
    plans = []
    make_plan = attention_module.make_plan
    monkeypatch.setattr(attention_module, "make_plan", lambda *a, **k: plans.append(make_plan(*a, **k)) or plans[-1])
    run(HOPPER_CASE, make_inputs(HOPPER_CASE, torch.bfloat16))
    (made,) = plans
    assert made.hardware.separates_small and made.hardware.num_workers == 2 * NUM_SMS
    kinds = made.items()["kind"]
    first_small = int(made.buffer[15])
    assert set(kinds[:first_small]) == {0, 1} and set(kinds[first_small:]) == {2}
    threads_of_sm90, threads_of_sm80 = 512 * NUM_SMS, 128 * NUM_SMS
    with_one_queue = mixattn.plan(
        make_inputs(HOPPER_CASE, torch.bfloat16).cu_seqlens_q, [300, 90, 200], **HOPPER_CASE.plan_options,
        kv_element_bytes=2, hardware=dataclasses.replace(made.hardware, separates_small=False),
    )  # fmt: skip
    assert driver.counts()["num_threads"] == threads_of_sm90
    run(HOPPER_CASE, make_inputs(HOPPER_CASE, torch.bfloat16), plan=with_one_queue)
    assert driver.counts()["num_threads"] == threads_of_sm80


def test_attention_fills_the_device_once(driver: Emulation) -> None:
    """The grid is all blocks that are resident at once, whatever the batch."""
    inputs = make_inputs(CASE, torch.bfloat16)
    switches = []
    for num_sms in (NUM_SMS, 2 * NUM_SMS):
        forget()
        driver.configure(num_sms=num_sms)
        run(CASE, inputs)
        switches.append(driver.counts()["num_switches"])
    assert switches[1] > switches[0]


@pytest.mark.parametrize("capability", [80, 90])
def test_attention_leaves_the_sms_of_a_margin_free_whatever_the_plan(capability: int, driver: Emulation) -> None:
    driver.configure(capability=capability)
    forget()
    inputs = make_inputs(HOPPER_CASE, torch.bfloat16)
    for num_workers in (100, 2 * NUM_SMS, 1):
        plan = mixattn.plan(
            inputs.cu_seqlens_q, inputs.seq_lens, **HOPPER_CASE.plan_options, kv_element_bytes=2,
            hardware=hardware(num_workers, 64, separates_small=capability == 90),
        )  # fmt: skip
        whole = run(HOPPER_CASE, inputs, plan=plan)
        blocks_per_sm = driver.counts()["num_blocks"] // NUM_SMS
        assert blocks_per_sm >= 1 and driver.counts()["num_blocks"] == blocks_per_sm * NUM_SMS
        rest = run(HOPPER_CASE, inputs, plan=plan, sm_margin=NUM_SMS - 1)
        assert driver.counts()["num_blocks"] == blocks_per_sm
        assert torch.equal(whole, rest), "the grid has changed the bits"


@pytest.mark.parametrize("capability", [80, 90])
def test_attention_with_sm_margin_plans_for_the_sms_that_are_left(
    capability: int, driver: Emulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.configure(capability=capability)
    forget()
    plans = []
    make_plan = attention_module.make_plan
    monkeypatch.setattr(attention_module, "make_plan", lambda *a, **k: plans.append(make_plan(*a, **k)) or plans[-1])
    run(HOPPER_CASE, make_inputs(HOPPER_CASE, torch.bfloat16), sm_margin=1)
    assert driver.counts()["num_blocks"] == NUM_SMS - 1
    (made,) = plans
    assert made.hardware.num_workers == 2 * (NUM_SMS - 1)


def test_attention_whose_margin_leaves_no_sm_is_refused(driver: Emulation) -> None:
    inputs = make_inputs(CASE, torch.bfloat16)
    plan = mixattn.plan(inputs.cu_seqlens_q, inputs.seq_lens, **CASE.plan_options, hardware=hardware(4, 64))
    for options in ({}, {"plan": plan}):
        with pytest.raises(ValueError, match=r"sm_margin must be in \[0, 2\] on a device of 3 SMs, got 3"):
            run(CASE, inputs, sm_margin=NUM_SMS, **options)


def test_flash_attention_3s_sm_margin_reaches_the_launch(driver: Emulation, monkeypatch: pytest.MonkeyPatch) -> None:
    on_emulation = functools.partial(attention, backend="cuda")
    monkeypatch.setattr("mixattn.compat.varlen.attention", on_emulation)
    monkeypatch.setattr("mixattn.compat.kvcache.attention", on_emulation)
    q, k, v = (torch.randn(40, num_heads, 64, dtype=torch.bfloat16) for num_heads in (4, 2, 2))
    starts = torch.tensor([0, 40], dtype=torch.int32)
    calls = {
        "varlen": lambda margin: flash_attn_interface.flash_attn_varlen_func(
            q, k, v, starts, starts, 40, 40, causal=True, sm_margin=margin
        ),
        "kvcache": lambda margin: flash_attn_interface.flash_attn_with_kvcache(
            q[None], k[None], v[None], causal=True, sm_margin=margin
        ),
    }
    for call in calls.values():
        whole = call(0)
        assert driver.counts()["num_blocks"] == NUM_SMS
        torch.testing.assert_close(call(2), whole)
        assert driver.counts()["num_blocks"] == NUM_SMS - 2


def test_attention_writes_the_callers_out(driver: Emulation) -> None:
    inputs = make_inputs(CASE, torch.float16)
    out = torch.full_like(inputs.q, torch.nan)
    assert run(CASE, inputs, out=out) is out


def test_backends_names_the_emulation_and_leaves_cpu_tensors_to_the_cpu(driver: Emulation) -> None:
    status = mixattn.backends()["cuda"]
    assert status.is_available and status.device_types == ("cpu",)
    assert status.detail == f"emulated on the host by {driver.path}: correct and very slow"
    assert backends.choose_backend("cpu", None) == "cpu"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 80}, "head_dim 80 has no CUDA kernel; the nearest that has is 96"),
        (
            {"head_dim": 64, "v_head_dim": 128},
            "head_dim 64 with v_head_dim 128 has no .* nearest that has is 128 with v_head_dim 128$",
        ),
    ],
)
def test_attention_that_no_kernel_takes_is_refused_before_anything_is_written(
    changes: dict[str, object], message: str, driver: Emulation
) -> None:
    case = AttentionCase("refused", (1, 5), (20, 30), **changes)
    inputs = make_inputs(case, torch.bfloat16)
    out = poisoned_out(inputs).fill_(7.0)
    with pytest.raises(NotImplementedError, match=message):
        run(case, inputs, out=out)
    assert (out == 7.0).all()


def test_attention_of_float32_and_of_pages_in_another_float_dtype_is_refused(driver: Emulation) -> None:
    with pytest.raises(NotImplementedError, match="float32 has no CUDA kernel; the nearest that has is bfloat16"):
        run(CASE, make_inputs(CASE, torch.float32))
    with pytest.raises(
        NotImplementedError, match=r"k_cache is torch\.float16 and q is torch\.bfloat16: backend 'cuda'"
    ):
        run(CASE, make_inputs(CASE, torch.bfloat16, kv=KvFormat(torch.float16)))


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kv", QUANTIZED_FORMATS, ids=lambda kv: kv.id)
def test_attention_over_quantised_pages_without_a_plan_is_within_twice_eager(
    kv: KvFormat, capability: int, driver: Emulation
) -> None:
    """By the kernel of one queue, on Hopper too."""
    driver.configure(capability=capability)
    forget()
    run(CASE, make_inputs(CASE, torch.bfloat16, kv=kv))
    assert driver.counts()["num_threads"] == 128 * NUM_SMS


@pytest.mark.parametrize("kv", [None, QUANTIZED_FORMATS[0]], ids=["bfloat16", "int8"])
def test_attention_of_heads_of_v_of_another_size_runs_the_kernel_of_one_queue_on_hopper(
    kv: KvFormat | None, driver: Emulation
) -> None:
    driver.configure(capability=90)
    forget()
    case = dataclasses.replace(CASE, head_dim=192, v_head_dim=128, num_workers=None)
    assert run(case, make_inputs(case, torch.bfloat16, kv=kv)).shape[2] == 128
    assert driver.counts()["num_threads"] == 128 * NUM_SMS


def test_attention_of_misaligned_queries_is_refused(driver: Emulation) -> None:
    inputs = make_inputs(CASE, torch.bfloat16)
    odd = torch.empty(inputs.q.numel() + 1, dtype=inputs.q.dtype)[1:].view(inputs.q.shape).copy_(inputs.q)
    with pytest.raises(NotImplementedError, match="q must start at a multiple of 16 bytes"):
        attention(odd, inputs.k_cache, inputs.v_cache, **inputs.index_tensors, backend="cuda")


def test_attention_of_a_plan_with_larger_tiles_is_refused(driver: Emulation) -> None:
    case = AttentionCase("large", (129,), (130,), num_q_heads=2, num_kv_heads=2)
    inputs = make_inputs(case, torch.bfloat16)
    wide = dataclasses.replace(cpu_hardware(1), block_rows=(256, 128, 16))
    plan = mixattn.plan(inputs.cu_seqlens_q, inputs.seq_lens, **case.plan_options, kv_element_bytes=2, hardware=wide)
    with pytest.raises(ValueError, match=r"plan must be made for hardware with block_rows \(128, 64, 16\)"):
        run(case, inputs, plan=plan)


# ---- the choice on a GPU --------------------------------------------------------------------------------------------


def choose(call_options: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> str:
    """The backend of a default call on GPU tensors, where CUDA (emulated) and Triton kernels are there."""
    inputs = make_inputs(CASE, torch.bfloat16)
    chosen = []
    on_gpu = [backends.BackendStatus(name, True, ("cuda",), "here") for name in ("cuda", "triton")]
    monkeypatch.setattr(backends, "_cuda", lambda: on_gpu[0])
    monkeypatch.setattr(backends, "_triton", lambda: on_gpu[1])
    backends._default_backends.cache_clear()

    def spy(device_type: str, requested: str | None, why_not: object) -> str:
        chosen.append(backends.choose_backend("cuda", requested, why_not))
        return "reference"

    monkeypatch.setattr("mixattn.ops.attention.choose_backend", spy)
    arguments = {"q": inputs.q, "k_cache": inputs.k_cache, "v_cache": inputs.v_cache, **inputs.index_tensors}
    attention(**{**arguments, **call_options})
    return chosen[0]


def test_default_call_on_a_gpu_takes_the_cuda_kernel(driver: Emulation, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose({}, monkeypatch) == "cuda"


def test_default_call_on_a_gpu_without_a_cuda_kernel_takes_triton_and_says_so(
    driver: Emulation, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backends._log_passed_over.cache_clear()
    odd = torch.empty(50 * 6 * 64 + 1, dtype=torch.bfloat16)[1:].view(50, 6, 64)
    with caplog.at_level(logging.INFO, logger="mixattn.ops.backends"):
        assert choose({"q": odd}, monkeypatch) == "triton"
        assert choose({"q": odd}, monkeypatch) == "triton"
    passed_over = [r.getMessage() for r in caplog.records if "not backend" in r.getMessage()]
    assert len(passed_over) == 1 and "q must start at a multiple of 16 bytes" in passed_over[0]


def test_default_call_on_an_old_gpu_takes_triton(driver: Emulation, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.configure(capability=75)
    assert choose({}, monkeypatch) == "triton"


# ---- what backends() says -------------------------------------------------------------------------------------------


def test_backends_cuda_without_a_driver_tells_what_it_would_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "libcuda", lambda: "libno_such_driver.so.1")
    made = cuda_images.Manifest((13, 0), {"a": cuda_images.ImageDescription("a", ("sm_80", "compute_80"), 1, {})})
    forget()
    monkeypatch.setattr(cuda_images, "manifest", lambda: made)
    status = mixattn.backends()["cuda"]
    assert not status.is_available
    assert status.detail.startswith(
        "kernels for compute_80, sm_80, made by CUDA 13.0; no driver: libno_such_driver.so.1:"
    )
    monkeypatch.setattr(cuda_images, "manifest", lambda: None)
    assert mixattn.backends()["cuda"].detail.startswith("built without CUDA kernels")
    monkeypatch.undo()
    forget()


def test_backends_cuda_on_an_old_gpu_says_so(driver: Emulation) -> None:
    driver.configure(capability=75)
    status = mixattn.backends()["cuda"]
    assert not status.is_available
    assert status.detail == "emulation on the host is sm_75, the kernels need sm_80 or later"


@pytest.mark.parametrize(
    ("version", "capability", "architectures", "reason"),
    [
        (13000, 80, ("sm_80", "compute_80"), None),
        (13010, 90, ("sm_90a",), None),
        (13000, 89, ("sm_80",), None),
        (12080, 80, ("sm_80", "compute_80"), "needs a driver for CUDA 13.0 or later, this one is for 12.8"),
        (13000, 120, ("sm_80", "compute_80"), "needs a driver for CUDA 13.1 or later, this one is for 13.0"),
        (13010, 120, ("sm_80", "compute_80"), None),
    ],
)
def test_driver_version_is_held_against_the_images(
    version: int,
    capability: int,
    architectures: tuple[str, ...],
    reason: str | None,
    driver: Emulation,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Machine code runs with any driver of its major version, PTX with one that is as new as its compiler."""

    class NotEmulated:
        is_emulation = False
        version = 0

    NotEmulated.version = version
    device = {"name": "GPU", "capability": divmod(capability, 10), "num_sms": 1, "shared_bytes_per_block": 1}
    made = cuda_images.Manifest((13, 1), {"a": cuda_images.ImageDescription("a", architectures, 1, {})})
    monkeypatch.setattr(cuda_images, "driver", lambda: NotEmulated)
    monkeypatch.setattr(cuda_images, "devices", lambda: (device,))
    monkeypatch.setattr(cuda_images, "manifest", lambda: made)
    cuda_images.why_device_lacks.cache_clear()
    found = cuda_images.why_device_lacks(0)
    cuda_images.why_device_lacks.cache_clear()
    monkeypatch.undo()
    assert found == (None if reason is None else f"GPU {reason}")


# ---- the loader -----------------------------------------------------------------------------------------------------


def test_driver_that_is_no_driver_says_what_it_lacks() -> None:
    with pytest.raises(RuntimeError, match=r"libm\.so\.6 has no cuInit: the driver is too old"):
        _C.CudaDriver("libm.so.6")


def test_image_that_is_none_is_refused_by_the_drivers_name_for_it(driver: Emulation) -> None:
    with pytest.raises(RuntimeError, match=r"^cuModuleLoadData: CUDA_ERROR_INVALID_IMAGE \("):
        _C.CudaImage(_C.CudaDriver(str(driver.path)), 0, b"no fatbin")


def test_kernel_that_is_not_in_the_image_is_named_by_the_function_that_missed_it(driver: Emulation) -> None:
    image = driver.image()
    with pytest.raises(RuntimeError, match=r"^cuModuleGetFunction of no_such_kernel: CUDA_ERROR_NOT_FOUND"):
        image.launch_pointers(
            kernel="no_such_kernel", num_blocks=1, num_threads=32, shared_bytes=0, pointers=[], stream=0
        )


def test_device_that_is_not_there_is_refused(driver: Emulation) -> None:
    with pytest.raises(RuntimeError, match=r"^cuDeviceGet: CUDA_ERROR_INVALID_DEVICE"):
        _C.CudaImage(_C.CudaDriver(str(driver.path)), 3, b"emulated")


def test_kernel_that_fails_shows_the_emulators_report(emulation: Emulation) -> None:
    launched = prepare(CASE, torch.bfloat16)
    outside = torch.full_like(launched.inputs.block_table, 2**20)
    launched.inputs = dataclasses.replace(launched.inputs, block_table=outside)
    with pytest.raises(
        RuntimeError, match=r"^cuLaunchKernel: CUDA_ERROR_LAUNCH_FAILED \(cp.async: outside of the tens"
    ):
        launched.launch(emulation, seed=0)


def test_every_kernel_of_the_list_is_emulated_and_fills_the_device(driver: Emulation) -> None:
    image = driver.image(num_sms=5, capability=90)
    for kernel in _C.cuda_instances():
        sizes = {"num_threads": kernel["num_threads"], "shared_bytes": kernel["shared_bytes"]}
        assert image.num_blocks(kernel=kernel["name"], **sizes) == 5


def test_kernel_that_takes_more_shared_memory_than_a_block_may_have_is_refused(driver: Emulation) -> None:
    kernel = _C.cuda_instances()[0]["name"]
    with pytest.raises(RuntimeError, match="cuFuncSetAttribute: CUDA_ERROR_INVALID_VALUE"):
        driver.image().num_blocks(kernel=kernel, num_threads=128, shared_bytes=2**20)


def test_images_that_were_built_are_fatbins(driver: Emulation) -> None:
    made = cuda_images.manifest()
    if made is None:
        pytest.skip("built without CUDA kernels: needs nvcc")
    for name in made.images:
        _C.CudaImage(_C.CudaDriver(str(driver.path)), 0, (cuda_images.FOLDER / f"{name}.fatbin").read_bytes())


def test_every_kernel_of_the_list_is_in_the_images_that_were_built() -> None:
    made = cuda_images.manifest()
    if made is None:
        pytest.skip("built without CUDA kernels: needs nvcc")
    listed = {(kernel["image"], kernel["name"]) for kernel in _C.cuda_instances()}
    assert listed == {(image.name, kernel) for image in made.images.values() for kernel in image.kernels}
    assert all((cuda_images.FOLDER / f"{name}.fatbin").stat().st_size == i.num_bytes for name, i in made.images.items())
