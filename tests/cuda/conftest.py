"""The CUDA kernels, built for the CPU, and the driver that has them in the place of NVIDIA's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mixattn.ops import attention_cuda, backends, cuda_images
from tests.cuda.emulation import Emulation, build_emulation


@pytest.fixture(scope="session")
def emulation() -> Emulation:
    return build_emulation()


def forget() -> None:
    cuda_images.forget()
    for cached in (backends._default_backends, backends._check_requested, attention_cuda._kernel_for):
        cached.cache_clear()


@pytest.fixture
def driver(emulation: Emulation, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulation]:
    """The emulated driver in the place of NVIDIA's, as MIXATTN_LIBCUDA puts it there."""
    monkeypatch.setenv("MIXATTN_LIBCUDA", str(emulation.path))
    emulation.configure()
    forget()
    yield emulation
    forget()
