"""The emulated CUDA kernels in programs that ThreadSanitizer, AddressSanitizer and UndefinedBehaviorSanitizer watch.

Launches that Python makes are recorded, and replayed by a program of its own, which has the kernels of faults.py. What
is seen of a race is csrc/emu/sanitizer.h's: a schedule shows the races of all that it does, but for those between two
blocks of which one happens to draw a number behind the other's fence.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mixattn import _C
from mixattn.ops import kv_cache, merge
from tests.cases import CASES, SCORE_CASES, AttentionCase, KvFormat, make_inputs
from tests.cuda.attention_run import prepare
from tests.cuda.emulation import FOLDER, Emulation
from tests.cuda.faults import ALL_FAULTS, FAULTS, PLAN_FAULTS, RACES, Fault, write_sources
from tests.cuda.test_merge_states import make_states
from tests.cuda.test_mixed_attention import ALL_KINDS_CASES, LONG_CHUNK_CASE, WINDOW_CASE
from tests.cuda.test_plan import HARDWARE, SHAPES
from tests.emu.build import ADDRESS, BUILD, THREAD, Sanitizer, build_sanitized
from tests.ops.test_append_kv import make_inputs as make_append_inputs
from tests.ops.test_plan_invariants import Batch
from tests.ops.test_quantized_kv import NUM_PAGES, PAGE_SIZE, make_rows

RIGHT, DIFFERENT, RACE, MEMORY = 0, 1, 66, 67
"""Exit statuses: those of replay.cpp, then what the sanitizers are told to end with."""
ENVIRONMENT = {
    "TSAN_OPTIONS": f"halt_on_error=1:exitcode={RACE}",
    "ASAN_OPTIONS": f"detect_leaks=0:exitcode={MEMORY}",
    "UBSAN_OPTIONS": f"print_stacktrace=1:exitcode={MEMORY}",
}
NUM_BLOCKS = 2
# A row whose splits both blocks are at work on at once, so that neither learns of the other by drawing an item.
TWO_SPLITS_CASE = AttentionCase("two-splits", (1,), (400,), num_q_heads=2, num_kv_heads=1, num_workers=2)
ALL_CASES = {
    case.id: case for case in [*CASES, *SCORE_CASES, *ALL_KINDS_CASES, LONG_CHUNK_CASE, WINDOW_CASE, TWO_SPLITS_CASE]
}
SMALL = AttentionCase("small", (1, 20), (150, 90), num_q_heads=2, num_kv_heads=1, num_workers=4)
# Of its three tiles of keys the kernel of sm_90 loads the first two in boxes.
BOXES = AttentionCase("boxes", (1, 20), (150, 300), num_q_heads=2, num_kv_heads=1, num_workers=1)
Record = Callable[[Emulation, Path], None]


# ---- recordings -----------------------------------------------------------------------------------------------------


def attention(
    case: AttentionCase | str, *, capability: int = 80, kv: KvFormat | None = None, invariant: bool = False
) -> Record:
    """A launch of attention. The block table ends with the last page that it has."""

    def record(emulation: Emulation, path: Path) -> None:
        found = ALL_CASES[case] if isinstance(case, str) else case
        inputs = make_inputs(found, torch.bfloat16, kv=kv)
        num_pages = max(-(-kv_len // found.page_size) for kv_len in found.kv_lens)
        table = inputs.block_table[:, :num_pages].clone(memory_format=torch.contiguous_format)
        inputs = replace(inputs, block_table=table)
        run = prepare(found, torch.bfloat16, inputs=inputs, capability=capability, invariant=invariant)
        run.launch(emulation, seed=0, num_blocks=NUM_BLOCKS, recording=path)

    return record


def append_kv(*, is_quantised: bool = False, interleaved: bool = False, v_head_dim: int | None = None) -> Record:
    """append_kv in place; caches in float8 with a scale per token and head where ``is_quantised``."""

    def record(emulation: Emulation, path: Path) -> None:
        head_dim = 128
        inputs = make_append_inputs(torch.bfloat16, head_dim=head_dim, v_head_dim=v_head_dim)
        scales: list[Any] = [None, None]
        if is_quantised:
            inputs["k"] = make_rows(torch.bfloat16, head_dim)
            inputs = make_append_inputs(torch.bfloat16, head_dim=head_dim, num_tokens=len(inputs["k"]))
            shape = NUM_PAGES, PAGE_SIZE, 2
            inputs |= {f"{x}_cache": torch.zeros(*shape, head_dim, dtype=torch.float8_e4m3fn) for x in "kv"}
            inputs["slot_mapping"] = torch.arange(len(inputs["k"]))
            scales = [torch.zeros(shape), torch.zeros(shape)]
        # The last row of the table, behind which nothing is to be read.
        inputs["positions"][0] = len(inputs["rope_cos_sin"]) - 1
        names = ("k", "v", "k_cache", "v_cache", "slot_mapping", "q", "positions", "rope_cos_sin")
        tensors = [inputs[name] for name in names]
        emulation.record(path, [*tensors, *(scale for scale in scales if scale is not None)])
        kv_cache._append_kv(*tensors, *scales, None, None, interleaved, "cuda", inputs["q"])

    return record


def merge_states(emulation: Emulation, path: Path) -> None:
    outs, lses = make_states(torch.bfloat16, 3, 64)
    out, lse = torch.empty_like(outs[0]), torch.empty_like(lses[0])
    emulation.record(path, [outs, lses, out, lse])
    _C.cuda_merge_states(
        **merge._sizes(outs, lses), out=out.data_ptr(), lse=lse.data_ptr(), image=emulation.image(), stream=0
    )


def plan(emulation: Emulation, path: Path, *, missing_merges: int = 0) -> None:
    """A batch that is split, with exactly the room that it takes or some merges less."""
    batch = Batch([(300, 2000), *[(1, 200 + 97 * i) for i in range(40)], (0, 9), (5, 70)], SHAPES[1], HARDWARE[0])
    host = batch.plan()
    assert host.num_merges > 0
    room = {"capacity_items": host.num_items, "capacity_merges": host.num_merges - missing_merges}
    words = {
        "cu_seqlens_q": np.array(batch.cu_seqlens_q, np.int32),
        "seq_lens": np.array(batch.seq_lens, np.int32),
        "out": np.zeros(_C.PLAN_HEADER_WORDS + 8 * sum(room.values()), np.int32),
        "scratch": np.zeros(2 * _C.cuda_plan_scratch_words(host.spec, len(batch.seq_lens), host.num_items), np.int32),
    }
    image = emulation.image()
    emulation.record(path, [torch.from_numpy(array) for array in words.values()])
    _C.cuda_plan(
        spec=host.spec, image=image, num_seqs=len(batch.seq_lens), block_table=0, block_table_stride=0, page_size=0,
        **room, capacity_partial_rows=host.num_partial_rows, num_threads=128, stream=0,
        **{name: array.ctypes.data for name, array in words.items()},
    )  # fmt: skip


RECORDS: dict[str, Record] = {
    "sm_80": attention(SMALL),
    "sm_90": attention(BOXES, capability=90),
    "int8": attention(SMALL, kv=KvFormat(torch.int8, "token")),
    "plan": plan,
    "append-kv": append_kv(),
    "merge-states": merge_states,
    "sm_80-splits": attention("splits-chunk-beside-decodes"),
    "sm_80-all-kinds": attention("all-kinds-head-dim-64"),
    "sm_80-head-dim-256": attention("all-kinds-head-dim-256"),
    "sm_80-v128-of-192": attention("all-kinds-head-dim-192-v128"),
    "sm_80-capped": attention("sinks-soft-cap-window-splits"),
    "sm_80-tree": attention("tree-of-64-rows"),
    "sm_80-scores": attention("alibi-soft-cap-window-splits"),
    "sm_90-all-kinds": attention("all-kinds-head-dim-64", capability=90),
    "sm_90-all-kinds-head-dim-128": attention("all-kinds-head-dim-128", capability=90),
    "sm_90-long-chunk": attention(LONG_CHUNK_CASE, capability=90),
    "int8-all-kinds": attention("all-kinds-head-dim-64", kv=KvFormat(torch.int8, "head")),
    "int8-v128-of-192": attention("all-kinds-head-dim-192-v128", kv=KvFormat(torch.int8, "token")),
    "int4-splits": attention("splits-chunk-beside-decodes", kv=KvFormat(torch.uint8, "token")),
    "e4m3-scores": attention("alibi-soft-cap-window-splits", kv=KvFormat(torch.float8_e4m3fn, "token")),
    "invariant": attention("splits-chunk-beside-decodes", invariant=True),
    "invariant-int8": attention("splits-chunk-beside-decodes", kv=KvFormat(torch.int8, "token"), invariant=True),
    "append-kv-quantised": append_kv(is_quantised=True, interleaved=True),
    "append-kv-of-narrower-v": append_kv(v_head_dim=64),
}
QUICK = ("sm_80", "sm_90", "int8", "plan", "append-kv", "merge-states")
"""One small launch of each kernel; the others are behind ``slow``."""


# ---- replays --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def programs() -> Callable[[Sanitizer], Path]:
    """The replay program of a sanitizer."""

    def build(sanitizer: Sanitizer) -> Path:
        sources = BUILD / "faulty"
        write_sources(sources)
        kernels = ("sanitized_attention", "emulated_plan", "emulated_append_kv", "emulated_merge_states")
        files = [FOLDER / f"{name}.cpp" for name in ("replay", *kernels)]
        return build_sanitized(f"replay_{sanitizer.name}", files, [sources, FOLDER], sanitizer)

    return build


def replay(program: Path, recording: Path, *, seed: int = 0, fault: str | None = None) -> tuple[int, str]:
    """The exit status and the report."""
    number = 0 if fault is None else 1 + [each.name for each in ALL_FAULTS].index(fault)
    result = subprocess.run(
        [program, recording, str(seed), str(number)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **ENVIRONMENT},
    )
    return result.returncode, result.stderr


def kernel_lines(report: str) -> list[str]:
    """The lines of kernels that a report's stacks name, as they are written there."""
    frames = re.findall(r"(/\S+/faulty/cuda/\S+?):(\d+)", report)
    return [Path(file).read_text().splitlines()[int(line) - 1] for file, line in frames]


@pytest.mark.parametrize("sanitizer", [THREAD, ADDRESS], ids=lambda sanitizer: sanitizer.name)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in RECORDS]
)
def test_sanitizer_has_nothing_to_report(
    name: str,
    sanitizer: Sanitizer,
    driver: Emulation,
    programs: Callable[[Sanitizer], Path],
    tmp_path: Path,
) -> None:
    program, recording = programs(sanitizer), tmp_path / "launch"
    RECORDS[name](driver, recording)
    for seed in range(1 if name in QUICK else 3):
        status, report = replay(program, recording, seed=seed)
        assert (status, report) == (RIGHT, "")


# ---- what they must report ------------------------------------------------------------------------------------------

RACE_LINES: dict[str, tuple[str, ...]] = {
    "no-barrier-before-v-is-read": ("mx::cp_async16(", "mx::ldmatrix_x4("),
    "no-barrier-before-k-is-read": ("mx::ldmatrix_x4(q[r]", "copy_queries<"),
    "no-barrier-before-q-is-read-by-all-warps": ("mx::ldmatrix_x4(q[r]", "copy_queries<"),
    "no-barrier-before-sums-replace-k-and-v": ("mx::st_shared_v2(", "mx::ldmatrix_x4("),
    "k-overwritten-while-it-is-read": ("mx::ldmatrix_x4(keys", "copy_k(place, next_begin)"),
    "no-wait-for-v": ("mx::ldmatrix_x4_trans(values", "mx::cp_async_wait"),
    "wait-for-k-one-group-too-shallow": ("mx::ldmatrix_x4(", "mx::cp_async_wait"),
    "ticket-without-fences": ("merge_item<", "store_row<"),
    "no-fence-before-the-ticket": ("merge_item<", "store_row<"),
    "no-fence-behind-the-ticket": ("merge_item<", "store_row<"),
    "no-barrier-before-the-fence": ("merge_item<", "store_row<"),
    "rows-dropped-while-they-are-read": ("drop_rows(item", "operator[](ControlWord"),
    "rows-read-before-they-are-dropped": ("drop_rows(item", "copy_queries<"),
    "quantised-lanes-do-not-wait-for-each-other": ("mx::ld_shared_v2(address)", "mx::cp_async_wait"),
    "quantised-no-barrier-before-k-is-read": ("mx::ldmatrix_x4(keys", "widen_keys<"),
    "quantised-no-barrier-before-v-is-read": ("mx::ldmatrix_x4_trans(values", "widen_keys<"),
    "quantised-no-barrier-before-q-is-read": ("fit_queries<", "mx::ld_shared("),
    "quantised-rows-scales-overwritten-before-they-are-read": ("store_scales<", "mx::ld_shared("),
    "quantised-idle-lanes-copy": ("copy_stored<",),
    "sm90-k-not-waited-for": ("mx::cp_async_wait<0>", "produce<"),
    "sm90-v-not-waited-for": ("mx::wgmma_registers(", "mx::load_box("),
    "sm90-scores-not-waited-for": ("mx::wgmma_shared(", "mx::load_box("),
    "sm90-sums-not-waited-for": ("mx::wgmma_registers(", "mx::load_box("),
    "sm90-copies-told-too-early": ("produce<", "consume<"),
    "sm90-queries-not-waited-for": ("draw_words(", "consume<"),
    "sm90-queries-overwritten-while-they-are-read": ("mx::wgmma_shared(", "mx::cp_async_wait"),
    "sm90-tiles-overwritten-while-they-are-read": ("mx::cp_async_wait<0>", "produce<"),
    "sm90-item-released-while-other-lanes-read-it": ("draw_words(", "consume<"),
    "no-barrier-before-sums-are-overwritten": ("set_shared_value(b.warp", "shared_value(b.lane"),
    "no-barrier-before-sums-are-read": ("set_shared_value(b.warp", "shared_value(b.lane"),
    "no-barrier-before-maxima-are-read": ("set_shared_value(b.warp", "shared_value(b.lane"),
    "no-barrier-before-first-tiles-are-read": ("first_tile[s] =", "return first_tile[s]"),
    "no-barrier-before-keys-are-sorted": ("keys[q] =", "from[probe].cost"),
    "no-barrier-before-items-are-written": ("sorted[i /", "low - other_begin"),
    "row-written-while-it-is-read": ("rotate<T>(", "mx::st_global_v4("),
    "page-and-offset-swapped": ("static_cast<uint16_t*>(cache) + to",),
}
"""Faults that are data races, and what the lines of the kernels that the report names have in them.

A box that lands has no stack to name: of a race with it there is the other line only.
"""
PAGE_EDGE = AttentionCase("page-edge", (20,), (160,))
MISUSES: dict[str, tuple[Record, str, str]] = {
    "page-off-by-one": (attention(PAGE_EDGE), "heap-buffer-overflow", "block_table_row["),
    "tail-not-zeroed": (attention("q65-kv200-page16-gqa3"), "heap-buffer-overflow", "block_table_row["),
    "tree-bit-off-by-one": (attention("tree-of-64-rows"), "shift exponent 64 is too large", "word >> (distance"),
    "sine-of-the-pair-off-by-one": (RECORDS["append-kv-quantised"], "heap-buffer-overflow", "cos_sin["),
    "merges-past-their-room": (
        lambda emulation, path: plan(emulation, path, missing_merges=1),
        "heap-buffer-overflow",
        "merges[tile.first_merge + h]",
    ),
}
"""Faults that read or write beside a tensor, or are undefined in C++: a launch, the report, the kernel's line."""
QUICK_FAULTS = ("no-barrier-before-k-is-read", "no-fence-behind-the-ticket", "page-off-by-one")


def fault_of(name: str) -> Fault:
    return next(fault for fault in ALL_FAULTS if fault.name == name)


def record_of(fault: Fault) -> Record:
    """The launch that shows a race."""
    if fault in [*FAULTS, *RACES]:
        return attention(fault.case, capability=fault.capability, kv=fault.kv)
    return plan if fault in PLAN_FAULTS else RECORDS["append-kv"]


def assert_names(report: str, wanted: tuple[str, ...]) -> None:
    lines = kernel_lines(report)
    assert all(any(text in line for line in lines) for text in wanted), (wanted, lines)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK_FAULTS)) for name in RACE_LINES]
)
def test_thread_sanitizer_names_the_lines_of_a_race(
    name: str, driver: Emulation, programs: Callable[[Sanitizer], Path], tmp_path: Path
) -> None:
    program, recording = programs(THREAD), tmp_path / "launch"
    record_of(fault_of(name))(driver, recording)
    status, report = replay(program, recording, fault=name)
    assert status == RACE and "ThreadSanitizer: data race" in report, report
    assert_names(report, RACE_LINES[name])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK_FAULTS)) for name in MISUSES]
)
def test_address_sanitizer_names_the_line_of_a_misuse(
    name: str, driver: Emulation, programs: Callable[[Sanitizer], Path], tmp_path: Path
) -> None:
    program, recording = programs(ADDRESS), tmp_path / "launch"
    record, message, line = MISUSES[name]
    record(driver, recording)
    status, report = replay(program, recording)
    assert (status, report) == (RIGHT, "")
    status, report = replay(program, recording, fault=name)
    assert status == MEMORY and message in report, report
    assert_names(report, (line,))


@pytest.mark.parametrize("fault", ["item-counter-not-reset", "causal-mask-off-by-one"])
def test_replay_tells_that_results_differ(
    fault: str, driver: Emulation, programs: Callable[[Sanitizer], Path], tmp_path: Path
) -> None:
    recording = tmp_path / "launch"
    RECORDS["sm_80"](driver, recording)
    status, report = replay(programs(THREAD), recording, fault=fault)
    assert status == DIFFERENT and "differs" in report
