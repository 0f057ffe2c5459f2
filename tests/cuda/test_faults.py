"""Every mistake of faults.py, switched on in the emulated kernel, shows, and by what it says it does."""

from __future__ import annotations

import faulthandler
import os
import re
from collections.abc import Callable, Iterator

import pytest
import torch

import mixattn
from mixattn.ops.plan import H100, cpu_hardware
from tests.cases import (
    CASES,
    PREFIX_CASES,
    SCORE_CASES,
    V_HEAD_DIM_CASES,
    KvFormat,
    assert_attention_close,
    make_inputs,
)
from tests.cuda.attention_run import prepare
from tests.cuda.conftest import forget
from tests.cuda.emulation import NUM_SMS, Emulation, build_emulation
from tests.cuda.faults import ALL_FAULTS, APPEND_FAULTS, FAULTS, MERGE_FAULTS, PLAN_FAULTS, Fault, write_sources
from tests.cuda.test_append_kv import append_both, assert_same
from tests.cuda.test_merge_states import assert_close as assert_states_close
from tests.cuda.test_merge_states import make_states
from tests.cuda.test_mixed_attention import ALL_KINDS_CASES, LONG_CHUNK_CASE, WINDOW_CASE
from tests.cuda.test_plan import BAD_SLICE, NO_ROOM, SHAPES, SPLIT, STATUS_WORD, assert_equal, plan_on_device
from tests.emu.build import BUILD
from tests.ops.test_append_kv import clone
from tests.ops.test_append_kv import make_inputs as make_append_inputs
from tests.ops.test_plan_invariants import Batch
from tests.ops.test_plan_prefix import make_batch
from tests.ops.test_quantized_kv import make_rows

SEEDS = range(3)
"""Those of test_mixed_attention.py: what they miss here, the tests of the kernel miss."""


@pytest.fixture(scope="session")
def faulty() -> Emulation:
    sources = BUILD / "faulty"
    write_sources(sources)
    return build_emulation("emulated_faults", [sources])


def outcome(
    emulation: Emulation,
    case_id: str,
    fault: int,
    seed: int,
    capability: int,
    kv: KvFormat | None = None,
    num_blocks: int = NUM_SMS,
) -> str:
    """``right``, ``result``, ``tickets``, or the emulator's report."""
    named = [*CASES, *SCORE_CASES, *PREFIX_CASES, *V_HEAD_DIM_CASES, *ALL_KINDS_CASES, LONG_CHUNK_CASE, WINDOW_CASE]
    case = next(case for case in named if case.id == case_id)
    inputs = make_inputs(case, torch.bfloat16, kv=kv)
    run = prepare(case, torch.bfloat16, inputs=inputs, capability=capability)
    try:
        run.launch(emulation, seed=seed, fault=fault, num_blocks=num_blocks)
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
    how = fault.capability, fault.kv, fault.num_blocks
    outcomes = [outcome(faulty, fault.case, number, seed, *how) for seed in SEEDS]
    caught = [found for found in outcomes if found != "right"]
    assert caught, "no schedule shows it"
    assert all(re.search(fault.caught_by, found) for found in caught), outcomes


@pytest.mark.parametrize(
    ("case_id", "how"),
    dict.fromkeys((fault.case, (fault.capability, fault.kv, fault.num_blocks)) for fault in FAULTS),
)
def test_no_fault_shows_where_none_is_on(
    case_id: str, how: tuple[int, KvFormat | None, int], faulty: Emulation
) -> None:
    assert [outcome(faulty, case_id, 0, seed, *how) for seed in SEEDS] == ["right"] * len(SEEDS)


# ---- the planner ----------------------------------------------------------------------------------------------------


MANY = Batch([(300, 2000), *[(1, 200 + 97 * i) for i in range(90)], (0, 9), (5, 70)], SHAPES[0], H100)
GROUPS = make_batch(
    [(1, 2000 + 7 * i) for i in range(90)], [0 if i % 13 == 0 else 120 for i in range(90)], shape=SHAPES[0],
    hardware=H100,
)  # fmt: skip
TIES = Batch([(1, 300)] * 37, SHAPES[0], cpu_hardware(1))


def is_planned_right(emulation: Emulation, case: str, fault: int, seed: int) -> bool:
    """Whether the words are the host's, or the status that of a batch without a plan."""
    image = emulation.image(seed=seed, fault=fault)
    if case == "bad":
        words = plan_on_device(image, SPLIT.plan(), SPLIT.cu_seqlens_q, [5, -1, 5], 64)
        return words[STATUS_WORD] == BAD_SLICE
    if case == "no-room":
        host = SPLIT.plan()
        room = host.num_items, host.num_merges - 1
        words = plan_on_device(image, host, SPLIT.cu_seqlens_q, SPLIT.seq_lens, 64, room)
        return words[STATUS_WORD] == NO_ROOM
    if case == "no-partial-room":
        host = SPLIT.plan()
        words = plan_on_device(
            image, host, SPLIT.cu_seqlens_q, SPLIT.seq_lens, 64, capacity_partial_rows=host.num_partial_rows - 1
        )
        return words[STATUS_WORD] == NO_ROOM
    batch = {"many": MANY, "ties": TIES, "groups": GROUPS}[case]
    host = batch.plan()
    assert host.num_groups > 0 or batch is not GROUPS
    assert_equal(plan_on_device(image, host, batch.cu_seqlens_q, batch.seq_lens, 64, pages=batch.pages), host)
    return True


def is_right_in_a_child(check: Callable[[], bool]) -> bool:
    """What ``check`` returns; False, too, where it raises, or dies of an index that a fault has led astray."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        try:
            os._exit(0 if check() else 1)
        except BaseException:  # whatever it is, the parent is told
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("fault", PLAN_FAULTS, ids=lambda fault: fault.name)
def test_fault_of_the_planner_shows(fault: Fault, faulty: Emulation) -> None:
    number = 1 + ALL_FAULTS.index(fault)
    rights = [
        is_right_in_a_child(lambda seed=seed: is_planned_right(faulty, fault.case, number, seed)) for seed in SEEDS
    ]
    assert not all(rights), "no schedule shows it"


@pytest.mark.parametrize("case", ["many", "ties", "groups", "bad", "no-room"])
def test_planner_is_right_where_no_fault_is_on(case: str, faulty: Emulation) -> None:
    assert all(is_planned_right(faulty, case, 0, seed) for seed in SEEDS)


# ---- append_kv and merge_states -------------------------------------------------------------------------------------


@pytest.fixture
def faulty_driver(faulty: Emulation, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulation]:
    """The library with the faults in the place of NVIDIA's driver."""
    monkeypatch.setenv("MIXATTN_LIBCUDA", str(faulty.path))
    faulty.configure()
    forget()
    yield faulty
    forget()


def is_appended_right(case: str) -> bool:
    """Whether append_kv leaves the bits of the reference."""
    v_head_dim = {"other-v": 64, "wider-v": 256}.get(case)
    inputs = make_append_inputs(torch.bfloat16, head_dim=128, v_head_dim=v_head_dim)
    if case == "in-place":
        expected = mixattn.append_kv(**clone(inputs), backend="cpu")
        names = ("k", "v", "k_cache", "v_cache", "slot_mapping", "q", "positions", "rope_cos_sin")
        tensors = [inputs[name] for name in names]
        torch.ops.mixattn.append_kv(*tensors, None, None, None, None, False, "cuda", inputs["q"])
        return expected is not None and torch.equal(inputs["q"], expected)
    if case in ("token", "unit"):
        rows = make_rows(torch.bfloat16, 128)
        inputs = {
            "k": rows,
            "v": rows.flip(0),
            **{f"{x}_cache": torch.zeros(5, 16, 2, 128, dtype=torch.float8_e4m3fn) for x in "kv"},
            "slot_mapping": torch.arange(len(rows)),
            **{f"{x}_scale": torch.zeros(5, 16, 2) if case == "token" else 1.0 for x in "kv"},
        }
    assert_same(*append_both(inputs, interleaved=case == "interleaved"))
    return True


def is_merged_right(case: str) -> bool:
    """Whether merge_states is within one rounding of the truth."""
    outs, lses = make_states(torch.bfloat16, 3, 64)
    if case == "far":
        lses += 300.0
    assert_states_close(outs, lses, *mixattn.merge_states(outs, lses, backend="cuda"))
    return True


def shows(check: Callable[[], bool]) -> bool:
    """Whether ``check`` fails by an exception or by its answer."""
    try:
        return not check()
    except (AssertionError, RuntimeError):
        return True


@pytest.mark.parametrize(
    ("fault", "check"),
    [*((fault, is_appended_right) for fault in APPEND_FAULTS), *((fault, is_merged_right) for fault in MERGE_FAULTS)],
    ids=lambda value: value.name if isinstance(value, Fault) else None,
)
def test_fault_of_append_kv_or_merge_states_shows(
    fault: Fault, check: Callable[[str], bool], faulty_driver: Emulation
) -> None:
    number = 1 + ALL_FAULTS.index(fault)
    shown = []
    for seed in SEEDS:
        faulty_driver.configure(seed=seed, fault=number)
        shown.append(shows(lambda: check(fault.case)))
    assert any(shown), "no schedule shows it"
    faulty_driver.configure()
    assert check(fault.case), "it shows where it is not on"
