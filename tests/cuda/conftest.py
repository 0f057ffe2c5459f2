"""The CUDA kernels, built for the CPU."""

from __future__ import annotations

import pytest

from tests.cuda.emulation import Emulation, build_emulation


@pytest.fixture(scope="session")
def emulation() -> Emulation:
    return build_emulation()
