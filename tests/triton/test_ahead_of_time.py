"""What the compilers make of the kernels for an A100 and an H100, on any machine: no spills, tensor cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def measure(*arguments: str) -> dict[str, Any]:
    """``ahead_of_time.measure`` in a process of its own: in this one Triton may be the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.triton.ahead_of_time", *arguments]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert result.returncode == 0, result.stderr
    measured: dict[str, Any] = json.loads(result.stdout)
    return measured


def assert_no_spills(measured: dict[str, Any]) -> None:
    assert measured["stack_bytes"] == 0
    assert not {"LDL", "STL"} & measured["instructions"].keys()


@pytest.mark.parametrize(
    ("capability", "matrix_instruction"), [("8.0", "HMMA"), ("9.0", "HGMMA")], ids=["sm_80", "sm_90"]
)
def test_mixed_attention_head_dim_128_bfloat16_compiles_without_spills(
    capability: str, matrix_instruction: str
) -> None:
    measured = measure("mixed_attention", capability, "bfloat16", "128")
    assert_no_spills(measured)
    assert measured["instructions"][matrix_instruction] > 0
    assert measured["instructions"]["LDGSTS"] > 0, "K and V are not copied asynchronously"
    assert measured["shared_bytes"] <= measured["shared_bytes_bound"]


@pytest.mark.slow
def test_mixed_attention_every_switch_flipped_compiles_without_spills() -> None:
    switches = ("IS_CAUSAL", "HAS_WINDOW", "HAS_SOFT_CAP", "HAS_PAGE_SHIFT", "HAS_SAME_STRIDES")
    measured = measure("mixed_attention", "9.0", "float16", "96", *switches)
    assert_no_spills(measured)
    assert measured["shared_bytes"] <= measured["shared_bytes_bound"]


@pytest.mark.parametrize("kernel", ["append_kv", "merge_states"])
def test_small_kernel_compiles_without_spills(kernel: str) -> None:
    measured = measure(kernel, "8.0", "bfloat16", "128")
    assert_no_spills(measured)
    assert measured["registers"] <= 128
