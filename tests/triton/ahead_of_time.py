"""Compiles a kernel for a GPU that need not be there; prints what the compiler made of it as JSON.

For example ``python -m tests.triton.ahead_of_time mixed_attention 9.0 bfloat16 128 HAS_WINDOW``.
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

from mixattn.triton_kernels.kv_cache import append_kv_kernel
from mixattn.triton_kernels.merge_states import merge_states_kernel
from mixattn.triton_kernels.mixed_attention import mixed_attention_kernel
from mixattn.triton_kernels.tiles import choose_tiles, shared_bytes

KERNELS = {
    "mixed_attention": mixed_attention_kernel,
    "append_kv": append_kv_kernel,
    "merge_states": merge_states_kernel,
}
TRITON_DTYPES = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}
TYPES = {
    **dict.fromkeys(("cu_seqlens_q", "seq_lens", "block_table", "plan_words", "tickets"), "*i32"),
    **dict.fromkeys(("lse", "lses", "partial_out", "partial_lse", "rope_cos_sin"), "*fp32"),
    **dict.fromkeys(("slot_mapping", "positions"), "*i64"),
    **dict.fromkeys(("score_scale", "score_cap"), "fp32"),
}
"""By name of argument; the other pointers are to the dtype of q, k and v, and the rest are int32."""
VALUES = ("q", "k", "v", "k_cache", "v_cache", "q_out", "out", "outs")
UNALIGNED = re.compile(r"group_size|page_shift|window_left|num_\w+|stride_(block_table|\w*lses?_\w+)|score_\w+")
"""No multiples of 16 as a rule; torch aligns every allocation, and head_dim makes the other strides multiples."""


def constants(kernel: str, head_dim: int, element_bytes: int, capability: tuple[int, int]) -> dict[str, Any]:
    """The compile-time arguments of a common call: causal, neox over the whole head, pages of a power of two."""
    if kernel != "mixed_attention":
        common = {"HEAD_DIM": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim), "BLOCK_HEADS": 8}
        rotary = {"ROTARY_DIM": head_dim, "BLOCK_PAIRS": common["BLOCK_D"] // 2, "IS_INTERLEAVED": False}
        return common | rotary if kernel == "append_kv" else common
    tiles = choose_tiles(head_dim, element_bytes, capability)
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": tiles.block_d,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "NUM_STAGES": tiles.num_stages,
        "IS_CAUSAL": True,
        "HAS_WINDOW": False,
        "HAS_SOFT_CAP": False,
        "HAS_PAGE_SHIFT": True,
        "HAS_SAME_STRIDES": True,
    }


def measure(kernel: str, capability: tuple[int, int], dtype: str, head_dim: int, *flipped: str) -> dict[str, Any]:
    """Compiles one of ``KERNELS``, the ``flipped`` switches of ``constants`` the other way round.

    Returns:
        registers (per thread), stack_bytes (where spills go), shared_bytes and, for the attention, the bound that
        tiles.py gives for it, and the number of instructions by the first part of their name.
    """
    function = KERNELS[kernel]
    element_bytes = 4 if dtype == "float32" else 2
    values = constants(kernel, head_dim, element_bytes, capability)
    values.update({name: not values[name] for name in flipped})
    names = function.arg_names
    signature = {name: TYPES.get(name, TRITON_DTYPES[dtype] if name in VALUES else "i32") for name in names}
    signature.update(dict.fromkeys(values, "constexpr"))
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in values.items()},
        attrs={
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(names)
            if name not in values and not UNALIGNED.fullmatch(name)
        },
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", 10 * capability[0] + capability[1], 32),
        options={"num_warps": 8 if kernel == "mixed_attention" else 4, "enable_fp_fusion": True},
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = cuobjdump("-res-usage", cubin)
        sass = cuobjdump("-sass", cubin)
    registers, stack = (re.search(rf"{field}:(\d+)", usage) for field in ("REG", "STACK"))
    assert registers is not None and stack is not None, usage
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", sass)
    measured = {
        "registers": int(registers[1]),
        "stack_bytes": int(stack[1]),
        "shared_bytes": compiled.metadata.shared,
        "instructions": {name: instructions.count(name) for name in sorted(set(instructions))},
    }
    if kernel == "mixed_attention":
        tiles = choose_tiles(head_dim, element_bytes, capability)
        measured["shared_bytes_bound"] = shared_bytes(tiles, element_bytes, capability)
    return measured


def cuobjdump(option: str, cubin: Path) -> str:
    """What the tool in Triton's wheel, or else the system's, prints of the binary."""
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool = str(bundled) if bundled.exists() else shutil.which("cuobjdump")
    if tool is None:
        raise FileNotFoundError("cuobjdump is neither in Triton's wheel nor on PATH")
    return subprocess.run([tool, option, str(cubin)], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    major, minor = map(int, sys.argv[2].split("."))
    print(json.dumps(measure(sys.argv[1], (major, minor), sys.argv[3], int(sys.argv[4]), *sys.argv[5:])))
