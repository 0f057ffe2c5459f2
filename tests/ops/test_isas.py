"""Which ISAs the tests of the CPU kernels run on here, and which not."""

from __future__ import annotations

import pytest

from mixattn import _C, env


@pytest.mark.parametrize("name", env.CPU_ISAS)
def test_cases_run_on_every_isa_that_the_cpu_has(name: str) -> None:
    """Skips where it has not: test_amx runs amx on emulated tiles, make test-aarch64 runs neon and neon_bf16."""
    info = _C.cpu_info()
    if name not in info["available"]:
        pytest.skip(f"this CPU has no {name} (it has {', '.join(info['available'])})")
    assert name in info["compiled"]


def test_every_isa_that_is_compiled_here_has_a_name() -> None:
    assert set(_C.cpu_info()["compiled"]) <= set(env.CPU_ISAS)
