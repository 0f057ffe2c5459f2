"""Every mistake of faults.py, switched on in the emulated kernel, shows, and by what it says it does."""

from __future__ import annotations

import re

import pytest
import torch

from tests.cases import CASES, SCORE_CASES, assert_attention_close, make_inputs
from tests.cuda.attention_run import prepare
from tests.cuda.emulation import Emulation, build_emulation
from tests.cuda.faults import FAULTS, Fault, write_sources
from tests.cuda.test_mixed_attention import ALL_KINDS_CASES, LONG_CHUNK_CASE
from tests.emu.build import BUILD

SEEDS = range(3)
"""Those of test_mixed_attention.py: what they miss here, the tests of the kernel miss."""


@pytest.fixture(scope="session")
def faulty() -> Emulation:
    sources = BUILD / "faulty"
    write_sources(sources)
    return build_emulation("emulated_faults", [sources])


def outcome(emulation: Emulation, case_id: str, fault: int, seed: int, capability: int) -> str:
    """``right``, ``result``, ``tickets``, or the emulator's report."""
    case = next(case for case in [*CASES, *SCORE_CASES, *ALL_KINDS_CASES, LONG_CHUNK_CASE] if case.id == case_id)
    inputs = make_inputs(case, torch.bfloat16)
    run = prepare(case, torch.bfloat16, inputs=inputs, capability=capability)
    try:
        run.launch(emulation, seed=seed, fault=fault)
    except RuntimeError as error:
        return str(error)
    try:
        assert_attention_close(case, inputs, run.out, run.lse)
    except AssertionError:
        return "result"
    return "tickets" if run.tickets.any() else "right"


@pytest.mark.parametrize("number", range(1, len(FAULTS) + 1), ids=lambda number: FAULTS[number - 1].name)
def test_fault_shows(number: int, faulty: Emulation) -> None:
    fault: Fault = FAULTS[number - 1]
    outcomes = [outcome(faulty, fault.case, number, seed, fault.capability) for seed in SEEDS]
    caught = [found for found in outcomes if found != "right"]
    assert caught, "no schedule shows it"
    assert all(re.search(fault.caught_by, found) for found in caught), outcomes


@pytest.mark.parametrize(("case_id", "capability"), sorted({(fault.case, fault.capability) for fault in FAULTS}))
def test_no_fault_shows_where_none_is_on(case_id: str, capability: int, faulty: Emulation) -> None:
    assert [outcome(faulty, case_id, 0, seed, capability) for seed in SEEDS] == ["right"] * len(SEEDS)
