"""What the compilers make of the attention kernel for an A100 and an H100, on any machine: no spills, tensor cores."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def measure(capability: str, dtype: str, head_dim: int) -> dict[str, Any]:
    """``ahead_of_time.measure`` in a process of its own: in this one Triton may be the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.triton.ahead_of_time", capability, dtype, str(head_dim)]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert result.returncode == 0, result.stderr
    measured: dict[str, Any] = json.loads(result.stdout)
    return measured


@pytest.mark.skipif(
    importlib.util.find_spec("triton.backends.nvidia") is None, reason="Triton without its NVIDIA backend"
)
@pytest.mark.parametrize(
    ("capability", "matrix_instruction"), [("8.0", "HMMA"), ("9.0", "HGMMA")], ids=["sm_80", "sm_90"]
)
def test_mixed_attention_head_dim_128_bfloat16_compiles_without_spills(
    capability: str, matrix_instruction: str
) -> None:
    measured = measure(capability, "bfloat16", 128)
    assert measured["stack_bytes"] == 0
    instructions = measured["instructions"]
    assert "LDL" not in instructions and "STL" not in instructions
    assert instructions[matrix_instruction] > 0
    assert instructions["LDGSTS"] > 0, "K and V are not copied asynchronously"
    assert measured["shared_bytes"] <= measured["shared_bytes_bound"]
