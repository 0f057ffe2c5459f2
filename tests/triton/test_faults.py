"""Mistakes that a kernel engineer makes, each put into a copy of the Triton kernels: the cases catch every one."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cases import (
    CASES,
    PREFIX_CASES,
    SCORE_CASES,
    V_HEAD_DIM_CASES,
    AttentionInputs,
    KvFormat,
    assert_attention_close,
    make_inputs,
)
from tests.triton import attention_run
from tests.triton.test_mixed_attention import FAR_CASE, FAR_PAGE_STRIDE, far_apart

KERNELS = Path(__file__).resolve().parents[2] / "triton_kernels"


@dataclass(frozen=True)
class Fault:
    """A mistake, by name.

    Args:
        file: of triton_kernels.
        right: the source as it is, found once in the file.
        wrong: what is there instead.
        case: id of the case of tests/cases.py that shows it.
        caught_by: ``result`` (not close to the truth, or NaN) or ``tickets`` (not zero after the launch).
        kv: what the case's K and V are stored as; None is q's dtype, which is float16 then and otherwise.
    """

    name: str
    file: str
    right: str
    wrong: str
    case: str
    caught_by: str = "result"
    kv: KvFormat | None = None


ATTENTION = "mixed_attention.py"
CHUNK = "q65-kv200-page16-gqa3"
SPLITS = "splits-chunk-beside-decodes"
DECODE = "q1-kv100-page16-gqa3"
V_NARROWER = "v128-of-192-splits"
V_WIDER = "v256-of-64"
V_WIDER_SPLITS = "v128-of-64"
INT8 = KvFormat(torch.int8, "token")

FAULTS = [
    Fault("causal-mask-off-by-one", ATTENTION, "tl.minimum(position + 1, kv_end)", "tl.minimum(position + 2, kv_end)",
          CHUNK),
    Fault("no-mask-at-the-diagonal", ATTENTION, 'tl.where(is_visible, scores, -float("inf"))', "scores", CHUNK),
    Fault("full-tiles-reach-past-the-diagonal", ATTENTION, "tl.minimum(first_position + 1, kv_end)", "kv_end", CHUNK),
    Fault("window-off-by-one", ATTENTION, "(row_position - WINDOW_LEFT)", "(row_position - WINDOW_LEFT + 1)",
          "window-q1"),
    Fault("full-tiles-reach-before-the-window", ATTENTION, "last_position - WINDOW_LEFT",
          "first_position - WINDOW_LEFT", "soft-cap-window-splits"),
    Fault("slot-off-by-one-in-its-page", "_pages.py", "(run_begin % PAGE_SIZE)", "((run_begin + 1) % PAGE_SIZE)",
          "q1-kv6,7,8-page7-gqa2"),
    Fault("v-past-the-last-key-not-zeroed", ATTENTION,
          "V_HEAD_DIM, 0, BLOCK_DV, KV_FORMAT, CAPABILITY, IS_PINNED, IS_EDGE)",
          "V_HEAD_DIM, 0, BLOCK_DV, KV_FORMAT, CAPABILITY, IS_PINNED, False)", DECODE),
    Fault("sums-not-rescaled", ATTENTION, "v, accumulator * rescale)", "v, accumulator)", "scale-and-peaked-scores"),
    Fault("merge-one-split-too-early", ATTENTION, "merge + MERGE_NUM_ITEMS) - 1", "merge + MERGE_NUM_ITEMS) - 2",
          SPLITS),
    Fault("merge-never", ATTENTION, "merge + MERGE_NUM_ITEMS) - 1", "merge + MERGE_NUM_ITEMS)", SPLITS),
    Fault("merge-of-a-group-counts-splits", ATTENTION, "merge + MERGE_NUM_ITEMS) - 1", "merge + MERGE_NUM_SPLITS) - 1",
          "prefix-splits"),
    Fault("merge-skips-a-split", ATTENTION, "tl.range(0, num_splits", "tl.range(1, num_splits", SPLITS),
    Fault("ticket-not-reset", ATTENTION, "tl.store(ticket, 0)", "pass", SPLITS, "tickets"),
    Fault("item-counter-not-reset", ATTENTION, "tl.store(tickets, 0)", "pass", DECODE, "tickets"),
    Fault("sink-in-every-split", ATTENTION, "tl.where(is_whole, INT32_MAX, 0)", "INT32_MAX",
          "sinks-soft-cap-window-splits"),
    Fault("tree-bit-off-by-one", ATTENTION, "(distance & (TREE_MASK_BITS - 1))",
          "(distance + 1 & (TREE_MASK_BITS - 1))", "tree-gqa3-page1"),
    Fault("v-that-the-tree-hides-from-all-not-zeroed", ATTENTION, ".to(tl.int32), 0) == 1",
          ".to(tl.int32), 0) >= 0", "tree-keys-that-no-row-sees"),
    Fault("alibi-of-the-first-sequence-for-all", ATTENTION, "seq_idx.to(tl.int64) * stride_alibi_seq",
          "seq_idx.to(tl.int64) * 0", "alibi-per-seq-chunk-beside-decodes"),
    Fault("key-scale-of-head-0", ATTENTION, "kv_head.to(tl.int64) * stride_k_scale_head", "kv_head.to(tl.int64) * 0",
          CHUNK, kv=INT8),
    Fault("value-scales-of-head-0", ATTENTION, "kv_head.to(tl.int64) * stride_v_scale_head", "kv_head.to(tl.int64) * 0",
          CHUNK, kv=KvFormat(torch.uint8, "head")),
    Fault("key-scales-along-the-rows", ATTENTION, "scores * key_scale[None, :]", "scores * tl.max(key_scale, 0)",
          CHUNK, kv=INT8),
    Fault("value-unit-changes-without-the-sums", "_softmax.py", "value_max * inverse", "value_max / value_max",
          CHUNK, kv=INT8),
    Fault("int4-columns-taken-for-dimensions", "_quantized.py", "dim % HALF * 2 + dim // HALF", "dim + 0 * HALF",
          DECODE, kv=KvFormat(torch.uint8, "token")),
    Fault("out-stored-with-the-width-of-k", ATTENTION, "stride_lse_token, V_HEAD_DIM, GROUP_SIZE",
          "stride_lse_token, HEAD_DIM, GROUP_SIZE", V_WIDER),
    Fault("partials-as-far-apart-as-k-is-wide", ATTENTION, "(partial_row * V_HEAD_DIM)[:, None] + dim",
          "(partial_row * BLOCK_DV // 2)[:, None] + dim", V_WIDER_SPLITS),
    Fault("merge-of-as-many-columns-as-k-has", ATTENTION, "stride_lse_token, V_HEAD_DIM, BLOCK_DV",
          "stride_lse_token, HEAD_DIM, BLOCK_DV", V_WIDER_SPLITS),
    Fault("v-masked-by-the-width-of-k", ATTENTION, "is_key, V_HEAD_DIM, 0, BLOCK_DV", "is_key, HEAD_DIM, 0, BLOCK_DV",
          V_WIDER),
    Fault("second-part-of-a-head-is-the-first", ATTENTION, "sum(block_d[:part])", "0 * sum(block_d[:part])",
          V_NARROWER),
    Fault("second-part-of-k-left-out", ATTENTION, "dot(query[part], tl.trans(k), scores)",
          "dot(query[0], tl.trans(k), scores) if part == 0 else scores", V_NARROWER),
    Fault("int4-part-of-k-at-elements-and-not-bytes", "_pages.py", "head + FIRST_DIM // PACKED", "head + FIRST_DIM",
          V_NARROWER, kv=KvFormat(torch.uint8, "token")),
    Fault("e4m3-scaled-as-float16", "_quantized.py", "256.0, tl.float16", "1.0, tl.float16",
          DECODE, kv=KvFormat(torch.float8_e4m3fn, "token")),
]  # fmt: skip
INT32_OFFSETS = Fault(
    "int32-page-offsets", "_pages.py", "page.to(tl.int64) * STRIDES[0]", "page.to(tl.int32) * STRIDES[0]", "far-pages"
)

Load = Callable[[Fault | None], Any]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """A copy of the kernels with a fault in it, in place of those that ``AttentionRun.launch`` calls."""

    def load_copy(fault: Fault | None) -> None:
        package = "faulty_kernels"
        folder = tmp_path / package
        folder.mkdir()
        for source in KERNELS.glob("*.py"):
            text = source.read_text().replace("mixattn.triton_kernels", package)
            if fault is not None and fault.file == source.name:
                assert text.count(fault.right) == 1, f"{text.count(fault.right)} times, not once: {fault.right}"
                text = text.replace(fault.right, fault.wrong)
            (folder / source.name).write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        module = importlib.import_module(f"{package}.mixed_attention")
        assert str(module.__file__).startswith(str(tmp_path))
        monkeypatch.setattr(attention_run, "mixed_attention", module.mixed_attention)

    return load_copy


def outcome(case_id: str, kv: KvFormat | None, device: torch.device) -> str:
    """``right``, ``result`` or ``tickets``."""
    cases = CASES + SCORE_CASES + PREFIX_CASES + V_HEAD_DIM_CASES
    case = next(case for case in cases if case.id == case_id)
    inputs = make_inputs(case, torch.float16, kv=kv)
    run = attention_run.prepare(case, torch.float16, device, inputs=inputs)
    run.launch()
    try:
        assert_attention_close(case, inputs, run.out.cpu(), run.lse.cpu())
    except AssertionError:
        return "result"
    return "tickets" if run.tickets.any() else "right"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_shows(fault: Fault, load: Load, device: torch.device) -> None:
    load(fault)
    assert outcome(fault.case, fault.kv, device) == fault.caught_by


@pytest.mark.parametrize("case_id", sorted({fault.case for fault in FAULTS}))
def test_no_fault_shows_where_there_is_none(case_id: str, load: Load, device: torch.device) -> None:
    load(None)
    for kv in {fault.kv for fault in FAULTS if fault.case == case_id}:
        assert outcome(case_id, kv, device) == "right"


@pytest.mark.parametrize("fault", [INT32_OFFSETS, None], ids=["int32-page-offsets", "none"])
def test_fault_of_page_offsets_shows_in_pages_far_apart(
    fault: Fault | None, load: Load, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type != "cpu":
        pytest.skip("needs address space that takes no memory, which a GPU does not give")
    # After a launch the interpreter copies every argument's storage back to where it came from, here onto itself.
    monkeypatch.setattr("triton.runtime.interpreter.GridExecutor._restore_args_dev", lambda *_: None)
    load(fault)
    inputs = make_inputs(FAR_CASE, torch.bfloat16)
    run = attention_run.prepare(FAR_CASE, torch.bfloat16, device, inputs=inputs)
    # Offsets that wrap to negative ones land in the zeros before the first page.
    caches = (far_apart(cache, FAR_PAGE_STRIDE, before=2**31) for cache in (inputs.k_cache, inputs.v_cache))
    run.inputs = AttentionInputs(inputs.q, *caches, **inputs.index_tensors)
    run.launch()
    if fault is None:
        assert_attention_close(FAR_CASE, inputs, run.out, run.lse)
    else:
        with pytest.raises(AssertionError, match="rows off"):
            assert_attention_close(FAR_CASE, inputs, run.out, run.lse)
