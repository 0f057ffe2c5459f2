"""The kernels for AVX2 with AVX_VNNI on a CPU without: its instructions, encoded as AVX512_VNNI has them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixattn import _C
from tests.ops.emulated import build_emulated, check_cases_pass


@pytest.fixture(scope="module")
def package_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    available = _C.cpu_info()["available"]
    if "avx2_vnni" in available:
        pytest.skip("this CPU has AVX_VNNI: the ordinary tests run them")
    if "avx512_vnni" not in available:
        pytest.skip("the emulation of AVX_VNNI needs a CPU with AVX512_VNNI")
    return build_emulated("AVX_VNNI", tmp_path_factory.mktemp("emulated_avx_vnni"))


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("file", "cases", "least"),
    [
        ("test_linear.py", "avx2_vnni and rounded", 20),
        ("test_attention.py", "avx2_vnni and int8", 60),
        ("test_quantized_kv.py", "avx2_vnni and int8", 90),
    ],
    ids=["linear", "attention", "quantized-kv"],
)
def test_kernels_with_products_of_bytes_pass_the_cases_of_every_isa(
    package_folder: Path, file: str, cases: str, least: int
) -> None:
    check_cases_pass(package_folder, file, cases, least)
