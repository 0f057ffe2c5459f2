"""What the tests of primitives share: the library that runs them, and random numbers."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from tests.emu.build import ROOT, build

FOLDER = ROOT / "tests" / "emu"


@pytest.fixture(scope="session")
def primitives() -> ModuleType:
    return build("emulated_primitives", [FOLDER / "primitives.cpp"], [FOLDER])


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
