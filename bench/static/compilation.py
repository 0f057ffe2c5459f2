"""Compiles a Triton kernel for a GPU that need not be there, and reads registers, stack and machine code back."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.static.sass import Instruction, parse
from mixattn.triton_kernels.kv_cache import append_kv_kernel
from mixattn.triton_kernels.merge_states import merge_states_kernel
from mixattn.triton_kernels.mixed_attention import mixed_attention_kernel
from mixattn.triton_kernels.tiles import TileChoice, choose_tiles

TRITON_DTYPES = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}
ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
TYPES = {
    **dict.fromkeys(("cu_seqlens_q", "seq_lens", "block_table", "plan_words", "tickets"), "*i32"),
    **dict.fromkeys(("alibi_slopes", "sinks", "lse", "lses", "partial_out", "partial_lse", "rope_cos_sin"), "*fp32"),
    **dict.fromkeys(("slot_mapping", "positions", "tree_mask"), "*i64"),
    **dict.fromkeys(("score_scale", "score_cap"), "fp32"),
}
"""By name of argument; the other pointers are to the dtype of q, k and v, and the rest are int32."""
VALUES = ("q", "k", "v", "k_cache", "v_cache", "q_out", "out", "outs")
UNALIGNED = re.compile(r"num_\w+|stride_(block_table|alibi_seq|\w*lses?_\w+)|score_\w+")
"""No multiples of 16 as a rule; torch aligns every allocation, and head_dim makes the other strides multiples."""


@dataclass(frozen=True)
class Binary:
    """What the compilers made of a kernel: per thread registers and stack (where spills go), per program the rest."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    num_warps: int
    instructions: list[Instruction]


def compile_mixed_attention(
    capability: tuple[int, int],
    dtype: str,
    head_dim: int,
    *,
    page_size: int = 16,
    num_kv_heads: int = 8,
    features: tuple[str, ...] = (),
    **changed: Any,
) -> tuple[Binary, TileChoice]:
    """The attention kernel for a common call: causal, 4 query heads to a kv head, K and V contiguous.

    Args:
        features: of alibi_slopes, sinks and tree_mask those that the call has.
        changed: constants of the kernel that are to be others than here.
    """
    has_row_terms = not {"alibi_slopes", "tree_mask"}.isdisjoint(features)
    tiles = choose_tiles(head_dim, ELEMENT_BYTES[dtype], capability, has_row_terms=has_row_terms)
    strides = (page_size * num_kv_heads * head_dim, num_kv_heads * head_dim)
    constants: dict[str, Any] = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": tiles.block_d,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "NUM_STAGES": tiles.num_stages,
        "GROUP_SIZE": 4,
        "PAGE_SIZE": page_size,
        "K_STRIDES": strides,
        "V_STRIDES": strides,
        "IS_CAUSAL": True,
        "WINDOW_LEFT": None,
        "HAS_SOFT_CAP": False,
        **dict.fromkeys({"alibi_slopes", "sinks", "tree_mask"} - set(features)),
        **changed,
    }
    options = {"num_warps": tiles.num_warps, "maxnreg": tiles.max_registers}
    return _compile(mixed_attention_kernel, capability, dtype, constants, **options), tiles


def compile_small_kernel(name: str, capability: tuple[int, int], dtype: str, head_dim: int) -> Binary:
    """``append_kv`` (neox over the whole head) or ``merge_states``, 8 heads to a program."""
    constants: dict[str, Any] = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "BLOCK_HEADS": 8,
    }
    if name == "append_kv":
        constants |= {"ROTARY_DIM": head_dim, "BLOCK_PAIRS": constants["BLOCK_D"] // 2, "IS_INTERLEAVED": False}
    kernel = {"append_kv": append_kv_kernel, "merge_states": merge_states_kernel}[name]
    return _compile(kernel, capability, dtype, constants, num_warps=4)


def _compile(
    kernel: Any, capability: tuple[int, int], dtype: str, constants: dict[str, Any], **options: int | None
) -> Binary:
    names = kernel.arg_names
    signature = {name: TYPES.get(name, TRITON_DTYPES[dtype] if name in VALUES else "i32") for name in names}
    signature.update(dict.fromkeys(constants, "constexpr"))
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(names)
            if name not in constants and not UNALIGNED.fullmatch(name)
        },
    )
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    compiled = triton.compile(source, target=target, options={"enable_fp_fusion": True, **options})
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _cuobjdump("-res-usage", cubin)
        sass = _cuobjdump("-sass", cubin)
    registers, stack = (re.search(rf"{field}:(\d+)", usage) for field in ("REG", "STACK"))
    assert registers is not None and stack is not None, usage
    return Binary(
        registers=int(registers[1]),
        stack_bytes=int(stack[1]),
        shared_bytes=compiled.metadata.shared,
        num_warps=compiled.metadata.num_warps,
        instructions=parse(sass),
    )


def _cuobjdump(option: str, cubin: Path) -> str:
    """What the tool in Triton's wheel, or else the system's, prints of the binary."""
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool = str(bundled) if bundled.exists() else shutil.which("cuobjdump")
    if tool is None:
        raise FileNotFoundError("cuobjdump is neither in Triton's wheel nor on PATH")
    return subprocess.run([tool, option, str(cubin)], capture_output=True, text=True, check=True).stdout
