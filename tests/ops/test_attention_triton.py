"""attention with backend="triton", on Triton's interpreter, in a process of its own that knows so at import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent

SCRIPT = """
import dataclasses

import torch

import mixattn
from mixattn.ops.plan import cpu_hardware
from tests.cases import CASES, SCORE_CASES, KvFormat, assert_attention_close, make_inputs


def run(case_id, hardware=None, kv=None):
    case = next(c for c in CASES + SCORE_CASES if c.id == case_id)
    inputs = make_inputs(case, torch.bfloat16, kv=kv)
    plan = None
    if hardware is not None:
        plan = mixattn.plan(inputs.cu_seqlens_q, inputs.seq_lens, **case.plan_options, hardware=hardware)
    out, lse = mixattn.attention(
        inputs.q, inputs.k_cache, inputs.v_cache, **inputs.index_tensors, **inputs.score_tensors, **inputs.scales,
        **case.options, plan=plan, return_lse=True, backend="triton",
    )
    assert_attention_close(case, inputs, out, lse)
    return plan


cpu = cpu_hardware(1)
assert mixattn.backends()["triton"].device_types == ("cpu",)
run("empty-slices-between")
run("no-sequences")
plan = run("soft-cap-window-splits", dataclasses.replace(cpu, num_workers=64, item_overhead_s=0.0))
assert plan.num_merges > 0
assert run("scores-tree-beside-chunk-and-decodes") is None
case = next(case for case in CASES if case.id == "chunk-beside-decodes")
inputs = make_inputs(case, torch.bfloat16)
out, lse = mixattn.attention(
    inputs.q, inputs.k_cache, inputs.v_cache, **inputs.index_tensors, backend="triton", invariant=True, return_lse=True
)
assert_attention_close(case, inputs, out, lse)
for kv in (KvFormat(torch.int8, "token"), KvFormat(torch.uint8, "head"), KvFormat(torch.float8_e4m3fn, "one")):
    run("chunk-beside-decodes", kv=kv)
k = torch.randn(3, 2, 16)
cache = torch.zeros(2, 2, 4, 2, 8, dtype=torch.uint8)
scales = torch.zeros(2, 2, 4, 2)
for backend in ("triton", "cpu"):
    mixattn.append_kv(
        k, k, *cache, torch.tensor([1, 6, 4]), k_scale=scales[0], v_scale=scales[1], backend=backend
    )
    if backend == "triton":
        stored = cache.clone(), scales.clone()
assert torch.equal(stored[0], cache) and torch.equal(stored[1], scales) and scales.any()
try:
    run("q129-kv130-page7-mha", dataclasses.replace(cpu, block_rows=(256, 128, 16)))
except ValueError as error:
    assert str(error).startswith("plan must be made for hardware with block_rows (128, 64, 16), it has an item of 129")
else:
    raise AssertionError("a plan with larger tiles than the kernel's was run")
"""


def test_attention_on_the_triton_interpreter_is_within_twice_eager() -> None:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr
