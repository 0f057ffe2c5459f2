"""Which ISAs the tests of the CPU kernels run on here, and which not."""

from __future__ import annotations

import pytest

from mixattn import _C, env

X86_ISAS = ("amx", "avx512_bf16", "avx512_vnni", "avx512", "avx2_vnni", "avx2", "scalar")


@pytest.mark.parametrize("name", env.CPU_ISAS)
def test_cases_run_on_every_isa_that_the_cpu_has(name: str) -> None:
    """Skips where it has not: test_amx and test_avx_vnni run emulated kernels, make test-aarch64 neon and neon_bf16."""
    info = _C.cpu_info()
    if name not in info["available"]:
        pytest.skip(f"this CPU has no {name} (it has {', '.join(info['available'])})")
    assert name in info["compiled"]


def test_every_isa_that_is_compiled_here_has_a_name() -> None:
    assert set(_C.cpu_info()["compiled"]) <= set(env.CPU_ISAS)


def test_best_isa_is_the_first_that_is_neither_emulated_nor_passed_over() -> None:
    info = _C.cpu_info()
    candidates = [isa for isa in info["available"] if isa not in info["emulated"]]
    if info["passed_over"] is not None:
        assert info["passed_over"].startswith(f"{candidates.pop(0)}: ")
    assert info["isa"] == candidates[0]


@pytest.mark.parametrize(
    ("isas", "bfloat16_s", "chosen", "passed_over"),
    [
        (X86_ISAS[1:], 1e-6, "avx512_bf16", None),
        (X86_ISAS[1:], 1.99e-6, "avx512_bf16", None),
        (X86_ISAS[1:], 2e-6, "avx512_vnni", "avx512_bf16: two bfloat16 products take as long as 2.0 FMAs"),
        (X86_ISAS[1:], 4e-6, "avx512_vnni", "avx512_bf16: two bfloat16 products take as long as 4.0 FMAs"),
        (X86_ISAS, 4e-6, "amx", None),
        (X86_ISAS[2:], 4e-6, "avx512_vnni", None),
    ],
    ids=["as-often-as-fma", "less-than-half", "half", "a-fourth", "tiles", "no-bfloat16"],
)
def test_isa_with_bfloat16_products_is_chosen_if_one_is_faster_than_two_fmas(
    isas: tuple[str, ...], bfloat16_s: float, chosen: str, passed_over: str | None
) -> None:
    if not set(isas) <= set(_C.cpu_info()["compiled"]):
        pytest.skip("this build has no kernels for x86-64")
    assert _C.choose_isa(isas, bfloat16_s, 1e-6) == {"isa": chosen, "passed_over": passed_over}
