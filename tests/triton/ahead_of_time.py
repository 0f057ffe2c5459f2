"""Compiles the attention kernel for a GPU that need not be there; prints what the compiler made of it as JSON.

For example ``python -m tests.triton.ahead_of_time 9.0 bfloat16 128``; names of switches may follow.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mixattn.triton_kernels.mixed_attention import mixed_attention_kernel
from mixattn.triton_kernels.tiles import choose_tiles, shared_bytes

POINTERS = {
    **dict.fromkeys(("cu_seqlens_q", "seq_lens", "block_table", "plan_words", "tickets"), "*i32"),
    **dict.fromkeys(("lse", "partial_out", "partial_lse"), "*fp32"),
}
TRITON_DTYPES = {"bfloat16": ("*bf16", 2), "float16": ("*fp16", 2), "float32": ("*fp32", 4)}
UNALIGNED = {"group_size", "page_shift", "window_left", "stride_block_table", "stride_lse_token"}
"""Integers that need not be multiples of 16; torch aligns every allocation, and head_dim makes the other strides so."""


def nvidia_tool(name: str) -> str:
    """The path of one of NVIDIA's binary utilities: the one in Triton's wheel, or the system's."""
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    found = str(bundled) if bundled.exists() else shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is neither in Triton's wheel nor on PATH")
    return found


def measure(capability: tuple[int, int], dtype: str, head_dim: int, **switches: bool) -> dict[str, Any]:
    """Compiles causal attention over pages of a power of two, other ``switches`` off; what the binary takes and holds.

    Returns:
        registers (per thread), stack_bytes (spills are there), shared_bytes with the bound that tiles.py gives for it,
        num_instructions, and the number of instructions by the first part of their name.
    """
    pointer, element_bytes = TRITON_DTYPES[dtype]
    tiles = choose_tiles(head_dim, element_bytes, capability)
    constants = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": tiles.block_d,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "NUM_STAGES": tiles.num_stages,
        "IS_CAUSAL": True,
        "HAS_WINDOW": False,
        "HAS_SOFT_CAP": False,
        "HAS_PAGE_SHIFT": True,
        "HAS_KV_STRIDES": True,
        **switches,
    }
    names = mixed_attention_kernel.arg_names
    signature = {}
    for name in names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("q", "k_cache", "v_cache", "out"):
            signature[name] = pointer
        elif name.startswith("score_"):
            signature[name] = "fp32"
        else:
            signature[name] = POINTERS.get(name, "i32")
    aligned = [
        name for name, kind in signature.items() if kind != "constexpr" and kind != "fp32" and name not in UNALIGNED
    ]
    source = ASTSource(
        fn=mixed_attention_kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    kernel = triton.compile(source, target=target, options={"num_warps": tiles.num_warps, "enable_fp_fusion": True})
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = run_tool("cuobjdump", "-res-usage", str(cubin))
        sass = run_tool("cuobjdump", "-sass", str(cubin))
    names_used = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", sass)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack_bytes": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared_bytes": kernel.metadata.shared,
        "shared_bytes_bound": shared_bytes(tiles, element_bytes, capability),
        "num_instructions": len(names_used),
        "instructions": {name: names_used.count(name) for name in sorted(set(names_used))},
    }


def run_tool(name: str, *arguments: str) -> str:
    return subprocess.run([nvidia_tool(name), *arguments], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    major, minor = sys.argv[1].split(".")
    switches = {name: True for name in sys.argv[4:]}
    print(json.dumps(measure((int(major), int(minor)), sys.argv[2], int(sys.argv[3]), **switches)))
