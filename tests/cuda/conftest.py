"""The CUDA kernels, built for the CPU."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from tests.emu.build import build

FOLDER = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def emulated() -> ModuleType:
    return build("emulated_attention", [FOLDER / "emulated.cpp"])
