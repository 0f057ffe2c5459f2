"""backends: what runs here and why not the rest; the choice of a call, logged once."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

import mixattn
from mixattn import env
from mixattn.ops import backends as backends_module
from mixattn.ops.backends import BACKEND_NAMES, choose_backend


@pytest.fixture(autouse=True)
def forget_choices() -> Iterator[None]:
    """Choices are remembered for the life of the process; a test starts without any and leaves none."""
    for cached in (backends_module._default_backends, backends_module._check_requested):
        cached.cache_clear()
    yield
    for cached in (backends_module._default_backends, backends_module._check_requested):
        cached.cache_clear()


def test_backends_lists_every_backend_with_its_reason() -> None:
    found = mixattn.backends()
    assert tuple(found) == BACKEND_NAMES
    assert found["cpu"].is_available and found["cpu"].device_types == ("cpu",)
    assert f"{env.num_threads()} threads" in found["cpu"].detail
    assert found["reference"].is_available and "cpu" in found["reference"].device_types
    assert all(status.detail for status in found.values())


def test_backends_triton_without_gpu_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(env, "triton_interpret", lambda: False)
    status = mixattn.backends()["triton"]
    assert not status.is_available and status.device_types == ()
    assert status.detail == "torch sees no GPU, and TRITON_INTERPRET=1 is not set"


def test_backends_triton_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends_module.importlib.util, "find_spec", lambda name: None)
    status = mixattn.backends()["triton"]
    assert not status.is_available and status.detail == "the package triton is not installed"


def test_choose_backend_on_cpu_is_cpu_and_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="mixattn.ops.backends"):
        assert [choose_backend("cpu", None) for _ in range(3)] == ["cpu"] * 3
        assert [choose_backend("cpu", "reference") for _ in range(3)] == ["reference"] * 3
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert messages[0].startswith("cpu tensors: backend cpu (")
    assert messages[1].startswith("cpu tensors: backend reference, as requested (")


def test_choose_backend_never_takes_the_triton_interpreter_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "triton_interpret", lambda: True)
    assert choose_backend("cpu", None) == "cpu"
    assert choose_backend("cpu", "triton") == "triton"


def test_choose_backend_without_native_code_does_not_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = backends_module.BackendStatus("cpu", False, (), "mixattn._C does not load (gone)")
    monkeypatch.setattr(backends_module, "_cpu", lambda: missing)
    with pytest.raises(
        NotImplementedError, match=r"no backend for cpu tensors .*_C does not load.*backend='reference'"
    ):
        choose_backend("cpu", None)


def test_choose_backend_of_unavailable_backend_names_what_serves_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "triton_interpret", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        NotImplementedError, match=r"backend='triton' cannot run on cpu tensors: torch sees no GPU.*cpu"
    ):
        choose_backend("cpu", "triton")
    with pytest.raises(NotImplementedError, match=r"backend='cpu' cannot run on cuda tensors: it serves cpu tensors"):
        choose_backend("cuda", "cpu")


def test_choose_backend_on_unknown_device_gives_the_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(env, "triton_interpret", lambda: False)
    with pytest.raises(NotImplementedError, match=r"no backend for xpu tensors .*triton: torch sees no GPU"):
        choose_backend("xpu", None)


def test_choose_backend_of_unknown_name_lists_the_names() -> None:
    with pytest.raises(ValueError, match="backend must be one of cpu, triton, cuda, reference or None, got 'fast'"):
        choose_backend("cpu", "fast")
