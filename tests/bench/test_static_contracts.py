"""The compiled kernels keep their contracts; and a kernel that did not would be found out."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton

from bench.static.contracts import CONTRACTS, QUICK, RECORD, AttentionContract, differences

ROOT = Path(__file__).resolve().parents[2]
HOPPER = next(contract for contract in CONTRACTS if contract.name == "sm_90-hd128")


def assert_kept(*names: str, timeout_s: int) -> None:
    """Compiles and checks in a process of its own: in this one Triton may be the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.static.contracts", *names]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("name", QUICK)
def test_contracts_common_call_compiles_within_its_limits_and_as_recorded(name: str) -> None:
    assert_kept(name, timeout_s=280)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_contracts_every_case_compiles_within_its_limits_and_as_recorded() -> None:
    assert_kept(timeout_s=1100)


def recorded(name: str) -> dict[str, Any]:
    measured: dict[str, Any] = json.loads(RECORD.read_text())["cases"][name]
    return copy.deepcopy(measured)


def test_contracts_record_keeps_every_limit() -> None:
    assert [sentence for contract in CONTRACTS for sentence in contract.violations(recorded(contract.name))] == []


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        (("stack_bytes",), 8, "stack_bytes is 8, at most 0"),
        (("shared_bytes",), 2**20, "shared_bytes is 1048576, at most"),
        (("programs_per_sm",), 1, "-programs_per_sm is -1, at most -2"),
        (("loops", "large", "local"), 1, "large loop's local is 1, at most 0"),
        (("loops", "small-edge", "local"), 2, "small-edge loop's local is 2, at most 0"),
        (("loops", "large", "warp_instructions_per_mflop"), 901, "large loop's .* is 901, at most 900"),
        (("loops", "small", "warp_instructions_per_mflop"), 2001, "small loop's .* is 2001, at most 2000"),
        (("loops", "large", "matrix"), {"HMMA": 64}, "large loop's products are .* not HGMMA only"),
        (("loops", "large", "issued_flops"), 2**23, "large loop issues 8388608 flops for 4194304"),
        (("loops", "other"), {}, "expected a full and an edge loop of each kind"),
    ],
)  # fmt: skip
def test_violations_a_broken_limit_is_named(path: tuple[str, ...], value: Any, sentence: str) -> None:
    assert isinstance(HOPPER, AttentionContract)
    measured = recorded(HOPPER.name)
    *outer, last = path
    target = measured
    for key in outer:
        target = target[key]
    target[last] = value
    (broken,) = HOPPER.violations(measured)
    assert re.search(sentence, broken), broken


def test_differences_a_measure_that_is_not_the_records_is_named() -> None:
    record = {"triton": triton.__version__, "cases": {"case": {"registers": 100}}}
    assert differences("case", {"registers": 100}, record) == []
    assert differences("case", {"registers": 101}, record) == ["case: registers is 101, the record has 100"]
    assert differences("other", {"registers": 100}, record) == ["other: no record"]
    # Another compiler makes other code: then only the limits hold.
    assert differences("case", {"registers": 101}, {**record, "triton": "0.0"}) == []
