"""Compiles a Triton kernel for a GPU that need not be there, and reads registers, stack and machine code back."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.static.sass import Instruction, parse
from mixattn.triton_kernels.elementwise import MAX_BLOCK, rms_norm_kernel, silu_mul_kernel
from mixattn.triton_kernels.kv_cache import append_kv_kernel
from mixattn.triton_kernels.merge_states import merge_states_kernel
from mixattn.triton_kernels.mixed_attention import mixed_attention_kernel
from mixattn.triton_kernels.sampling import MAX_BLOCK as MAX_SAMPLING_BLOCK
from mixattn.triton_kernels.sampling import draw_kernel
from mixattn.triton_kernels.tiles import TileChoice, choose_tiles

TRITON_DTYPES = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}
ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
STORED_BITS = {"int8": 8, "float8_e4m3fn": 8, "float8_e5m2": 8, "int4": 4}
OPTIONAL = ("alibi_slopes", "sinks", "tree_mask", "k_scale", "v_scale")
"""Arguments that a call may leave out."""
TYPES = {
    **dict.fromkeys(("cu_seqlens_q", "seq_lens", "block_table", "plan_words", "tickets"), "*i32"),
    **dict.fromkeys(("alibi_slopes", "sinks", "lse", "lses", "partial_out", "partial_lse", "rope_cos_sin"), "*fp32"),
    **dict.fromkeys(("k_scale", "v_scale"), "*fp32"),
    **dict.fromkeys(("slot_mapping", "positions", "tree_mask"), "*i64"),
    **dict.fromkeys(("score_scale", "score_cap", "value_scale"), "fp32"),
}
"""By name of argument; the other pointers are to the dtype of q, k and v, and the rest are int32."""
VALUES = ("q", "k", "v", "k_cache", "v_cache", "q_out", "out", "outs", "x", "residual", "weight", "y", "gate_up")
UNALIGNED = re.compile(r"num_\w+|stride_(block_table|alibi_seq|\w*lses?_\w+|\w_scale_\w+)|score_\w+|\w*value\w*")
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
    v_head_dim: int | None = None,
    page_size: int = 16,
    num_kv_heads: int = 8,
    features: tuple[str, ...] = (),
    kv_format: str | None = None,
    scale: Literal["one", "head", "token"] = "one",
    invariant: bool = False,
    **changed: Any,
) -> tuple[Binary, TileChoice]:
    """The attention kernel for a common call: causal, 4 query heads to a kv head, K and V contiguous.

    Args:
        v_head_dim: None is head_dim.
        features: of alibi_slopes, sinks and tree_mask those that the call has.
        kv_format, scale: what K and V are quantised to, None for not at all, and whether all share a scale, a head's
            keys, or each key of a head has its own.
        changed: constants of the kernel that are to be others than here.
    """
    has_row_terms = not {"alibi_slopes", "tree_mask"}.isdisjoint(features)
    stored_bits = STORED_BITS.get(kv_format, 8 * ELEMENT_BYTES[dtype])
    v_head_dim = head_dim if v_head_dim is None else v_head_dim
    tiles = choose_tiles(
        head_dim, ELEMENT_BYTES[dtype], capability, v_head_dim=v_head_dim, stored_bits=stored_bits,
        has_row_terms=has_row_terms, has_one_kind=invariant,
    )  # fmt: skip
    # In elements of the cache: int4's are bytes of two.
    rows = [num_kv_heads * width // (2 if kv_format == "int4" else 1) for width in (head_dim, v_head_dim)]
    k_strides, v_strides = ((page_size * row, row) for row in rows)
    scale_strides = (page_size * num_kv_heads, num_kv_heads) if scale == "token" else None
    if scale != "one":
        features = (*features, "k_scale", "v_scale")
    constants: dict[str, Any] = {
        "HEAD_DIM": head_dim,
        "V_HEAD_DIM": v_head_dim,
        "BLOCK_D": tiles.block_d,
        "BLOCK_DV": tiles.block_dv,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "NUM_STAGES": tiles.num_stages,
        "GROUP_SIZE": 4,
        "PAGE_SIZE": page_size,
        "K_STRIDES": k_strides,
        "V_STRIDES": v_strides,
        "KV_FORMAT": kv_format,
        "CAPABILITY": 10 * capability[0] + capability[1],
        "K_SCALE_STRIDES": scale_strides,
        "V_SCALE_STRIDES": scale_strides,
        "IS_CAUSAL": True,
        "WINDOW_LEFT": None,
        "HAS_SOFT_CAP": False,
        "IS_INVARIANT": invariant,
        **dict.fromkeys(set(OPTIONAL) - set(features)),
        **changed,
    }
    options = {"num_warps": tiles.num_warps, "maxnreg": tiles.max_registers}
    types = {} if kv_format is None else dict.fromkeys(("k_cache", "v_cache"), "*u8")
    return _compile(mixed_attention_kernel, capability, dtype, constants, types, **options), tiles


def compile_small_kernel(
    name: str, capability: tuple[int, int], dtype: str, head_dim: int, kv_format: str | None = None
) -> Binary:
    """``append_kv`` (neox over the whole head; quantised with a scale per token), ``merge_states``, ``rms_norm`` with a
    residual, ``silu_mul`` or ``draw``."""
    constants: dict[str, Any] = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "BLOCK_HEADS": 8,
    }
    if name == "append_kv":
        constants |= {
            "V_HEAD_DIM": head_dim,
            "BLOCK_DV": constants["BLOCK_D"],
            "ROTARY_DIM": head_dim,
            "BLOCK_PAIRS": constants["BLOCK_D"] // 2,
            "IS_INTERLEAVED": False,
            "KV_FORMAT": kv_format,
            "WRITES_K_SCALE": kv_format is not None,
            "WRITES_V_SCALE": kv_format is not None,
        }
        types = {"k_scale_value": "fp32", "v_scale_value": "fp32"}
        if kv_format is None:
            constants |= {"k_scale": None, "v_scale": None}
        else:
            types |= {"k_cache": "*u8", "v_cache": "*u8"}
        return _compile(append_kv_kernel, capability, dtype, constants, types, num_warps=4, enable_fp_fusion=False)
    if name == "draw":
        types = {
            **dict.fromkeys(("logits", "maxima", "temperatures", "log_min_ps"), "*fp32"),
            **dict.fromkeys(("row_ids", "token_ids"), "*i64"),
            **dict.fromkeys(("top_ks", "keys"), "*i32"),
            "top_ps": "*fp64",
        }
        block = {"BLOCK": MAX_SAMPLING_BLOCK}
        return _compile(draw_kernel, capability, dtype, block, types, num_warps=8, enable_fp_fusion=False)
    if name in ("rms_norm", "silu_mul"):
        return _compile(
            rms_norm_kernel if name == "rms_norm" else silu_mul_kernel,
            capability,
            dtype,
            {"BLOCK": MAX_BLOCK if name == "rms_norm" else MAX_BLOCK // 4},
            {"eps": "fp32"},
            num_warps=4,
        )
    return _compile(merge_states_kernel, capability, dtype, constants, num_warps=4)


def _compile(
    kernel: Any,
    capability: tuple[int, int],
    dtype: str,
    constants: dict[str, Any],
    types: Mapping[str, str] = MappingProxyType({}),
    **options: int | None,
) -> Binary:
    """The kernel, its arguments of the types that their names have here or in TYPES, or of the dtype."""
    names = kernel.arg_names
    types = {**dict.fromkeys(VALUES, TRITON_DTYPES[dtype]), **TYPES, **types}
    signature = {name: types.get(name, "i32") for name in names}
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
