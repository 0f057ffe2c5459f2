"""What the kernels for AMX give for some calls, as digests: a program, which test_amx.py runs over two builds."""

from __future__ import annotations

import hashlib
import sys

import mixattn

if len(sys.argv) > 1:  # a folder whose _C is taken before the package's own
    mixattn.__path__.insert(0, sys.argv[1])

import torch

from mixattn.ops.linear import WEIGHT_FORMS, linear, pack_weight
from tests.cases import CASES, KvFormat, make_inputs
from tests.ops.test_attention import run
from tests.ops.test_linear import stored_matrix


def print_digest(name: str, tensor: torch.Tensor) -> None:
    contents = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    print(name, hashlib.sha256(contents).hexdigest())


def main() -> None:
    for form in WEIGHT_FORMS:
        rows, _ = stored_matrix(form, 70, 1120)
        x = torch.randn(50, 1120, generator=torch.Generator().manual_seed(0))
        print_digest(form, linear(x, pack_weight(rows, form, 1120, isa="amx")))
    case = next(c for c in CASES if c.id == "chunk-beside-decodes")
    for q, kv in (
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.int8),
    ):
        out, _ = run(case, make_inputs(case, q, kv=KvFormat(kv, "token" if kv == torch.int8 else None)))
        print_digest(f"{q} {kv}", out)


if __name__ == "__main__":
    main()
