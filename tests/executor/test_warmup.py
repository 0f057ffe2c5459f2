"""The warm-up: what it compiles for a target is what an engine's steps then find in Triton's cache, and all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mixattn import cli
from mixattn.config import EngineConfig
from mixattn.engine import build
from mixattn.executor import warmup
from mixattn.executor.warmup import Warmed
from mixattn.models.loader import load_model, read_shape
from mixattn.ops import attention_cuda, cuda_images, kv_cache_cuda

ROOT = Path(__file__).resolve().parents[2]

STEPS = """
import json
import sys
from array import array

import torch

from mixattn.config import EngineConfig
from mixattn.executor.executor import LocalExecutor
from mixattn.executor.kv_pool import kv_dtype
from mixattn.models.loader import load_model
from mixattn.ops import backends, elementwise, sampling
from mixattn.triton_kernels._launch import compiling
from mixattn.types import BatchPlan, SamplingParams, Slice

model_name, dtype, cache_dtype, page_size, major, minor = sys.argv[1:]
# Tensors on the CPU that every op takes to Triton, and launches that only compile: the rest is what a GPU's steps do.
backends._triton = lambda: backends.BackendStatus("triton", True, ("cpu",), "compiling")
elementwise.has_triton_for = sampling.has_triton_for = lambda device_type: True
config = EngineConfig(model_name, load_format="dummy", dtype=dtype, attention_backend="triton")
loaded = load_model(config, show_progress=False)
loaded.model.logits = lambda hidden: torch.zeros(len(hidden), loaded.config.vocab_size)  # nothing has computed any
executor = LocalExecutor(
    loaded.model, loaded.config, num_pages=40, page_size=int(page_size), max_model_len=512,
    kv_dtype=kv_dtype(cache_dtype, loaded.dtype), device=torch.device("cpu"),
)


def slice_(name, q_len, kv_len, page):
    pages = array("i", range(page, page + 9))
    return Slice(name, q_len, kv_len, list(range(q_len)), pages, True, SamplingParams(seed=1), 0, [], kv_len)


steps = [[("a", 33, 33, 0)], [("a", 1, 34, 0)], [("a", 1, 35, 0), ("b", 1, 7, 10), ("c", 20, 20, 20)]]
with compiling((int(major), int(minor))) as ahead:
    for step_idx, slices in enumerate(steps):
        executor.execute(BatchPlan(step_idx, tuple(slice_(*one) for one in slices)))
print(json.dumps([[one.kernel, one.how] for one in ahead.kernels]))
"""


def run_compiler(cache: Path, *command: str) -> str:
    """stdout of a process in which Triton compiles, into this folder."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "MIXATTN_TILES")
    }
    result = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env={**environment, "TRITON_CACHE_DIR": str(cache)}, capture_output=True,
        text=True, timeout=280, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def steps_of(cache: Path, *arguments: str) -> dict[str, set[str]]:
    """By kernel, whether the launches of an engine's steps found it in the cache or compiled it."""
    met: dict[str, set[str]] = {}
    for kernel, how in json.loads(run_compiler(cache, "-c", STEPS, *arguments).splitlines()[-1]):
        met.setdefault(kernel, set()).add(how.partition(" in ")[0])
    return met


@pytest.mark.parametrize(
    ("model", "cache_dtype", "capability"),
    [
        ("tiny-qwen3", "int8", (9, 0)),
        pytest.param("tiny-llama", "auto", (8, 0), marks=pytest.mark.slow),
        pytest.param("tiny-mistral", "fp8_e4m3", (10, 0), marks=pytest.mark.slow),
        pytest.param("tiny-qwen2", "int4", (8, 0), marks=pytest.mark.slow),
    ],
)
def test_steps_find_every_kernel_that_was_compiled_for_a_target(
    model: str, cache_dtype: str, capability: tuple[int, int], tmp_path: Path
) -> None:
    major, minor = capability
    shown = run_compiler(
        tmp_path, "-m", "mixattn.cli", "warmup", model, "--load-format", "dummy", "--dtype", "bfloat16",
        "--kv-cache-dtype", cache_dtype, "--max-model-len", "512", "--target", f"sm_{major}{minor}",
    ).splitlines()  # fmt: skip
    kernels = {line[29:].split()[0] for line in shown[:-1]}
    assert kernels == {
        "rms_norm_kernel",
        "silu_mul_kernel",
        "append_kv_kernel",
        "mixed_attention_kernel",
        "draw_kernel",
    }
    assert "Triton: compiled in" in shown[0] and f"on sm_{major}{minor}, in Triton's cache" in shown[-1]
    met = steps_of(tmp_path, model, "bfloat16", cache_dtype, "16", str(major), str(minor))
    # Later launches of a process know the kernel already.
    known = {"found", "the same as one before"}
    assert {kernel: {how.partition(" the cache")[0] for how in hows} for kernel, hows in met.items()} == dict.fromkeys(
        kernels, known
    )
    if model == "tiny-qwen3":  # a kernel that was not warmed is told from one that was
        other = steps_of(tmp_path, model, "bfloat16", cache_dtype, "32", str(major), str(minor))
        assert "compiled" in other["mixed_attention_kernel"] and "compiled" not in other["silu_mul_kernel"]


def warm(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit status, and stdout with stderr, of the command on a tiny model."""
    try:
        status = cli.main(["warmup", "tiny-llama", "--load-format", "dummy", *arguments])
    except SystemExit as exit_:  # argparse
        assert isinstance(exit_.code, int)
        status = exit_.code
    shown = capsys.readouterr()
    return status, shown.out + shown.err


def test_without_a_gpu_or_a_target_there_is_nothing_to_compile(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    status, shown = warm(capsys)
    assert status == 0 and shown.startswith("nothing to compile: torch sees no GPU")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "hopper"], "'hopper' is no architecture such as sm_80, sm_90 or sm_100"),
        (["--target", "sm_75"], "compute capability 7.5 is not supported; the nearest is 8.0"),
        (["--target", "sm_90", "--max-model-len", "4k"], "max_model_len must be in [1, 2048]"),
    ],
)
def test_target_that_is_none_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warmup.env, "triton_interpret", lambda: False)
    status, shown = warm(capsys, *arguments)
    assert status == 2 and message in shown


def test_interpreter_compiles_nothing_and_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warmup.env, "triton_interpret", lambda: True)
    status, shown = warm(capsys, "--target", "sm_90")
    assert status == 2 and "TRITON_INTERPRET=1 compiles nothing" in shown


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen3"])
def test_shape_is_that_of_the_loaded_model(name: str) -> None:
    config = EngineConfig(name, load_format="dummy", dtype="float16")
    model_config, dtype = read_shape(config, torch.device("cpu"))
    loaded = load_model(config)
    assert dtype == loaded.dtype == torch.float16
    assert model_config.head_dim == loaded.config.head_dim and model_config.vocab_size == loaded.config.vocab_size


def test_engine_on_a_gpu_warms_up_before_it_is_ready(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = EngineConfig("tiny-llama", load_format="dummy", max_model_len=256)
    loaded = load_model(config)
    gpu = torch.device("cuda", 0)
    warmed: list[Any] = []

    class ReadyError(Exception):
        pass

    def executor(*arguments: Any, **options: Any) -> None:
        raise ReadyError

    def warm_up(model: warmup.ServedModel, device: torch.device, target: object) -> list[Warmed]:
        warmed.append((model.max_model_len, model.page_size, model.dtype, device, target))
        return []

    monkeypatch.setattr(build, "warm_up", warm_up)
    monkeypatch.setattr(build, "LocalExecutor", executor)
    monkeypatch.setattr(build, "choose_backend", lambda device_type, requested: "cpu")
    on_gpu = SimpleNamespace(**{**vars(loaded), "device": gpu})
    with pytest.raises(ReadyError):
        build.build_engine(config, on_gpu)  # type: ignore[arg-type]
    assert warmed == [(256, 16, torch.float32, gpu, None)]
    warmed.clear()

    def refuse(*arguments: object) -> list[Warmed]:
        raise NotImplementedError("the package triton is not installed")

    with monkeypatch.context() as without_triton:
        without_triton.setattr(build, "warm_up", refuse)
        with pytest.raises(ReadyError):
            build.build_engine(config, on_gpu)  # type: ignore[arg-type]
    assert "nothing is compiled ahead: the package triton is not installed" in caplog.text
    with pytest.raises(ReadyError):  # on the CPU there is nothing to compile
        build.build_engine(config, loaded)
    assert not warmed


def test_calls_that_cuda_kernels_take_are_loaded_and_linked(monkeypatch: pytest.MonkeyPatch) -> None:
    linked: list[str] = []

    class Image:
        def num_blocks(self, *, kernel: str, num_threads: int, shared_bytes: int) -> int:
            linked.append(kernel)
            return 1

    def kernel_of(name: str) -> dict[str, Any]:
        return {"name": name, "image": "image", "num_threads": 128, "shared_bytes": 0}

    def refuse(*arguments: Any) -> dict[str, Any]:
        raise NotImplementedError("soft caps")

    monkeypatch.setattr(cuda_images, "image", lambda device_idx, name: Image())
    monkeypatch.setattr(kv_cache_cuda, "kernel_for", lambda *arguments: kernel_of("append_kv_x"))
    monkeypatch.setattr(attention_cuda, "kernel_for", lambda *arguments: kernel_of("attention_x"))
    monkeypatch.setattr(warmup, "first_backend", lambda device_type: "cuda")
    config = EngineConfig("tiny-mistral", load_format="dummy", dtype="bfloat16")
    model_config, dtype = read_shape(config, torch.device("cpu"))
    served = warmup.ServedModel(model_config, dtype, dtype, 16, 512)
    step = warmup._Step(served, torch.device("cpu"))
    names = list(step.calls())
    assert names == ["rms_norm", "silu_mul", "append_kv", "attention, window_left 31", "draw"]
    assert [step.load_cuda(name) for name in names] == [None, None, "append_kv_x", "attention_x", None]
    assert linked == ["append_kv_x", "attention_x"]
    monkeypatch.setattr(attention_cuda, "kernel_for", refuse)
    assert step.load_cuda("attention, window_left 31") is None
    monkeypatch.setattr(warmup, "first_backend", lambda device_type: "triton")
    assert step.load_cuda("append_kv") is None
