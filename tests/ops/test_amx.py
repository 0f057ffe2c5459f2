"""The kernels for AMX on a CPU without: the ordinary cases, over emulated tiles, and what the emulation must catch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mixattn import _C, env
from mixattn.ops.attention import attention
from tests.cases import CASES, make_inputs
from tests.ops.emulated import ROOT, build_emulated, check_cases_pass

needs_avx512_bf16 = pytest.mark.skipif(
    "avx512_bf16" not in _C.cpu_info()["available"],
    reason="the emulation of AMX needs a CPU with AVX512_BF16 and VNNI",
)


@pytest.fixture(scope="module")
def package_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_emulated("AMX", tmp_path_factory.mktemp("emulated_amx"))


@needs_avx512_bf16
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("file", "cases", "least"),
    [
        ("test_attention.py", "amx and bfloat16 and not quantized", 90),
        ("test_attention_invariant.py", "amx and (bfloat16 or named_case)", 60),
        ("test_linear.py", "amx", 40),
    ],
    ids=["attention", "invariant", "linear"],
)
def test_kernels_over_emulated_tiles_pass_the_cases_of_every_isa(
    package_folder: Path, file: str, cases: str, least: int
) -> None:
    check_cases_pass(package_folder, file, cases, least)


@pytest.mark.timeout(900)
def test_emulated_tiles_give_the_bits_of_real_ones(package_folder: Path) -> None:
    """So that what the emulation shows on other CPUs holds on this kind."""
    if "amx" not in _C.cpu_info()["available"]:
        pytest.skip("this CPU has no AMX")

    def digests(*folder: str) -> str:
        command = [sys.executable, "-m", "tests.ops.amx_digests", *folder]
        environment = {**os.environ, "MIXATTN_CPU_ISA": "amx"}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout

    real = digests()
    assert len(real.splitlines()) == 11
    assert real == digests(str(package_folder))


def test_forcing_amx_on_a_cpu_without_says_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    available = _C.cpu_info()["available"]
    if "amx" in available:
        pytest.skip("this CPU has AMX")
    monkeypatch.setattr(env, "cpu_isa", lambda: "amx")
    inputs = make_inputs(CASES[0], torch.bfloat16)
    with pytest.raises(ValueError, match=rf"isa must be one that this CPU runs \({', '.join(available)}\), got 'amx'"):
        attention(inputs.q, inputs.k_cache, inputs.v_cache, **inputs.index_tensors)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program of emulated_amx.cpp, which needs no CPU in particular."""
    program = tmp_path_factory.mktemp("emulated_amx_program") / "program"
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", f"-I{ROOT / 'csrc'}"]
    source = Path(__file__).with_name("emulated_amx.cpp")
    subprocess.run([os.environ.get("CXX", "g++"), *flags, source, "-o", program], check=True)
    return program


@pytest.mark.parametrize(
    ("use", "words"),
    [
        # 1 - 1 of the even elements and 2^-24 + 2^-24 of the odd ones; pair after pair 1 + 2^-24 would be 1.
        ("even-and-odd-are-summed-apart", "34000000 3f800000"),
        # 2^-127 x 2^64 and 2^-64 x 2^-64, added to the smallest numbers of both signs.
        ("subnormal-is-zero", "00000000 00000000"),
        # 5 + 255 (127 + 1 - 1 - 128) + 2 x 3, and -128 x 1.
        ("signed-times-unsigned", "ffffff0c ffffff80"),
    ],
)
def test_emulated_product_is_that_of_intels_pseudocode(program: Path, use: str, words: str) -> None:
    assert subprocess.run([program, use], capture_output=True, text=True, check=True).stdout.strip() == words


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        ("no-config", "tilezero: the tile is not configured"),
        ("released", "tileloadd: the tile is not configured"),
        ("other-tile", "tilestored: the tile is not configured"),
        ("palette", "ldtilecfg: the palette is not 1"),
        ("too-many-rows", "ldtilecfg: a tile has more than 16 rows of 64 bytes"),
        ("too-long-rows", "ldtilecfg: a tile has more than 16 rows of 64 bytes"),
        ("depth", "tdpbf16ps: a and b differ in depth"),
        ("rows", "tdpbf16ps: a and c differ in rows"),
        ("columns", "tdpbsud: b and c differ in columns"),
        ("twice", "tdpbsud: a tile comes twice"),
    ],
)
def test_emulated_tiles_end_the_process_on_misuse(program: Path, misuse: str, message: str) -> None:
    result = subprocess.run([program, misuse], capture_output=True, text=True, check=False)
    assert result.returncode == -signal.SIGABRT
    assert result.stderr.strip() == f"emulated AMX: {message}"
