"""No access to shared memory takes longer than its width asks for, in any attention kernel that is compiled.

Counted are copies, ldmatrix, loads and stores, by line (csrc/emu/memory.cpp). wgmma's own reads are not: the emulation
takes only matrices in the 128-byte swizzle from multiples of 1,024 bytes on, whose 8 rows lie in 8 groups of banks.
"""

from __future__ import annotations

import re

import pytest
import torch

from mixattn import _C
from tests.cases import AttentionCase, KvFormat, make_inputs
from tests.cuda.attention_run import prepare
from tests.cuda.emulation import Emulation

NAME = re.compile(r"mixattn_sm(\d+)_(?:(bf16|f16)|(int8|e4m3|e5m2|int4))_hd(\d+)(?:_v(\d+))?_(plain|capped|any)")
INSTANCES = [found for each in _C.cuda_instances() if (found := NAME.fullmatch(each["name"])) is not None]
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
STORED = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "int4": torch.uint8}


@pytest.mark.parametrize("instance", INSTANCES, ids=lambda instance: instance[0].removeprefix("mixattn_"))
def test_attention_kernel_has_no_bank_conflicts(instance: re.Match[str], emulation: Emulation) -> None:
    """On a case with items of every kind, splits and masked tiles; its schedule has all lanes come to each line."""
    capability, element, stored, head_dim, v_head_dim, scores = instance.groups()
    case = AttentionCase(
        instance[0], (70, 1, 20), (100, 170, 60), num_q_heads=2, num_kv_heads=1, head_dim=int(head_dim),
        v_head_dim=None if v_head_dim is None else int(v_head_dim), window_left=90, num_workers=6,
        soft_cap=5.0 if scores == "capped" else None,
        alibi="per-head" if scores == "any" else None,
    )  # fmt: skip
    kv = None if stored is None else KvFormat(STORED[stored], "token")
    dtype = DTYPES[element or "bf16"]
    inputs = make_inputs(case, dtype, kv=kv)
    run = prepare(case, dtype, inputs=inputs, capability=int(capability))
    assert set(run.work_plan.items()["kind"]) == {0, 1, 2} and run.work_plan.num_merges > 0
    counts = run.launch(emulation, seed=0)
    assert counts["kernel"] == instance[0]
    assert counts["num_wavefronts"] > 1000
    assert counts["conflicts"] == {}


def test_bank_conflicts_are_looked_for_in_every_attention_kernel() -> None:
    assert len(INSTANCES) == 94
    assert len({instance[0] for instance in INSTANCES}) == len(INSTANCES)
