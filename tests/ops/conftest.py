"""What tests of the CPU kernels share: each runs on every ISA of this CPU."""

from __future__ import annotations

import pytest

from mixattn import _C, env


@pytest.fixture(params=_C.cpu_info()["available"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Forces one ISA on the test. Those that this CPU lacks are named once, by test_isas."""
    name: str = request.param
    monkeypatch.setattr(env, "cpu_isa", lambda: name)
    return name
