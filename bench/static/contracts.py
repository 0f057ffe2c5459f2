"""What the compilers must make of the kernels, and what they made of it when ``contracts.json`` was written.

    python -m bench.static.contracts                 compiles every case, checks it against limits and record
    python -m bench.static.contracts sm_90-hd128     the named cases only
    python -m bench.static.contracts --write         writes the record anew

No GPU is needed, and none of this is a speed: it says what a GPU would have to issue. Leave TRITON_INTERPRET unset.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton

from bench.static.compilation import STORED_BITS, compile_mixed_attention, compile_small_kernel
from bench.static.measure import measure
from mixattn.triton_kernels.tiles import shared_bytes

RECORD = Path(__file__).with_name("contracts.json")


@dataclass(frozen=True)
class AttentionContract:
    """The attention kernel in bfloat16, compiled for one architecture and head size, and its limits.

    Args:
        capability, head_dim, changed: as for ``compile_mixed_attention``.
        family: of the matrix instructions in the large tile's loops.
        large, small: the most warp instructions per MMA-MFLOP in the loops over tiles that every row sees whole.
        programs_per_sm: the least.
        stack_bytes: the most; 0 is no spill anywhere.
        local: the most spill instructions in a full loop, and in an edge loop.
    """

    name: str
    capability: tuple[int, int]
    head_dim: int
    family: str
    large: int
    small: int
    programs_per_sm: int = 1
    stack_bytes: int = 0
    local: tuple[int, int] = (0, 0)
    changed: Mapping[str, Any] = field(default_factory=dict)

    def measure(self) -> dict[str, Any]:
        """Compiles the kernel and measures it."""
        binary, tiles = compile_mixed_attention(self.capability, "bfloat16", self.head_dim, **self.changed)
        stored_bits = STORED_BITS.get(self.changed.get("kv_format", ""))
        bound = shared_bytes(tiles, element_bytes=2, capability=self.capability, stored_bits=stored_bits)
        return {**measure(binary, tiles, self.capability), "shared_bytes_bound": bound}

    def violations(self, measured: Mapping[str, Any]) -> list[str]:
        """Which limits the measures break, one sentence each."""
        loops = measured["loops"]
        if self.changed.get("invariant"):
            if sorted(loops) != ["large"]:
                return [f"{self.name}: expected one loop, found {sorted(loops)}"]
        elif sorted(loops) != ["large", "large-edge", "small", "small-edge"]:
            return [f"{self.name}: expected a full and an edge loop of each kind, found {sorted(loops)}"]
        broken = [
            *above(f"{self.name}: stack_bytes", measured["stack_bytes"], self.stack_bytes),
            *above(f"{self.name}: shared_bytes", measured["shared_bytes"], measured["shared_bytes_bound"]),
            *above(f"{self.name}: -programs_per_sm", -measured["programs_per_sm"], -self.programs_per_sm),
        ]
        for name, limit in (("large", self.large), ("small", self.small)):
            if name not in loops:
                continue
            cost = loops[name]["warp_instructions_per_mflop"]
            broken += above(f"{self.name}: {name} loop's warp_instructions_per_mflop", cost, limit)
        for name, loop in loops.items():
            broken += above(f"{self.name}: {name} loop's local", loop["local"], self.local[name.endswith("-edge")])
            family = self.family if name.startswith("large") else "HMMA"
            if list(loop["matrix"]) != [family]:
                broken.append(f"{self.name}: {name} loop's products are {loop['matrix']}, not {family} only")
            if loop["issued_flops"] not in (None, loop["flops"]):
                broken.append(f"{self.name}: {name} loop issues {loop['issued_flops']} flops for {loop['flops']}")
        return broken


@dataclass(frozen=True)
class SmallKernelContract:
    """A small kernel in bfloat16 for an A100, at head_dim 128: no spills, two programs' registers."""

    name: str
    registers: int = 128
    kernel: str = "append_kv"
    kv_format: str | None = None

    def measure(self) -> dict[str, Any]:
        """Compiles the kernel and measures it."""
        binary = compile_small_kernel(self.kernel, (8, 0), "bfloat16", 128, self.kv_format)
        return {"registers": binary.registers, "stack_bytes": binary.stack_bytes, "shared_bytes": binary.shared_bytes}

    def violations(self, measured: Mapping[str, Any]) -> list[str]:
        """Which limits the measures break, one sentence each."""
        return [
            *above(f"{self.name}: stack_bytes", measured["stack_bytes"], 0),
            *above(f"{self.name}: registers", measured["registers"], self.registers),
        ]


def above(what: str, value: int, limit: int) -> list[str]:
    """[a sentence] if the value is above the limit."""
    return [f"{what} is {value}, at most {limit} is allowed"] if value > limit else []


# 976 is break-even on sm_90: 4,096 flop and 4 instructions per clock and SM.
CONTRACTS: list[AttentionContract | SmallKernelContract] = [
    AttentionContract("sm_90-hd128", (9, 0), 128, "HGMMA", large=900, small=2000, programs_per_sm=2),
    AttentionContract("sm_80-hd128", (8, 0), 128, "HMMA", large=1200, small=2000),
    AttentionContract("sm_100-hd128", (10, 0), 128, "UTCHMMA", large=900, small=2000),
    AttentionContract("sm_90-hd64", (9, 0), 64, "HGMMA", large=1200, small=3200, programs_per_sm=2),
    AttentionContract("sm_80-hd64", (8, 0), 64, "HMMA", large=1600, small=3200),
    AttentionContract("sm_100-hd64", (10, 0), 64, "UTCHMMA", large=1200, small=3200),
    # Their walks over the keys are free of spills, or nearly; the stack is used before and after them.
    AttentionContract("sm_90-hd256", (9, 0), 256, "HGMMA", large=600, small=2200, stack_bytes=8),
    AttentionContract("sm_80-hd256", (8, 0), 256, "HMMA", large=1400, small=2200, stack_bytes=8),
    AttentionContract("sm_100-hd256", (10, 0), 256, "UTCHMMA", large=600, small=2200, stack_bytes=96, local=(2, 16)),
    # Heads of V of another size than K's: DeepSeek V2's and V3's, before K is absorbed.
    AttentionContract(
        "sm_90-hd192-v128", (9, 0), 192, "HGMMA", large=600, small=2000, changed={"v_head_dim": 128},
    ),
    AttentionContract(
        "sm_80-hd192-v128", (8, 0), 192, "HMMA", large=1000, small=2000, stack_bytes=8, changed={"v_head_dim": 128},
    ),
    AttentionContract(
        "sm_100-hd192-v128", (10, 0), 192, "UTCHMMA", large=600, small=2000, changed={"v_head_dim": 128},
    ),
    AttentionContract(
        "sm_90-hd192-v128-int8-token", (9, 0), 192, "HGMMA", large=800, small=3700, stack_bytes=88,
        changed={"v_head_dim": 128, "kv_format": "int8", "scale": "token"},
    ),
    AttentionContract(
        "sm_80-hd192-v128-int8-token", (8, 0), 192, "HMMA", large=1400, small=3700, stack_bytes=8,
        changed={"v_head_dim": 128, "kv_format": "int8", "scale": "token"},
    ),
    AttentionContract(
        "sm_90-hd128-page64", (9, 0), 128, "HGMMA", large=900, small=2200, programs_per_sm=2,
        changed={"page_size": 64},
    ),
    AttentionContract(
        "sm_90-hd128-page1", (9, 0), 128, "HGMMA", large=900, small=2000, programs_per_sm=2, stack_bytes=8,
        changed={"page_size": 1},
    ),
    AttentionContract(
        "sm_90-hd128-window", (9, 0), 128, "HGMMA", large=900, small=2000, programs_per_sm=2, stack_bytes=24,
        local=(1, 6), changed={"WINDOW_LEFT": 4096},
    ),
    AttentionContract(
        "sm_90-hd128-soft-cap", (9, 0), 128, "HGMMA", large=1300, small=2600, programs_per_sm=2, stack_bytes=8,
        local=(0, 2), changed={"HAS_SOFT_CAP": True},
    ),
    AttentionContract(
        "sm_90-hd128-sinks", (9, 0), 128, "HGMMA", large=900, small=2000, programs_per_sm=2, stack_bytes=16,
        local=(0, 1), changed={"features": ("sinks",)},
    ),
    AttentionContract(
        "sm_80-hd128-alibi", (8, 0), 128, "HMMA", large=1300, small=2300, stack_bytes=8,
        changed={"features": ("alibi_slopes",)},
    ),
    AttentionContract(
        "sm_90-hd128-alibi-sinks-tree", (9, 0), 128, "HGMMA", large=1000, small=2300, stack_bytes=8,
        changed={"features": ("alibi_slopes", "sinks", "tree_mask")},
    ),
    AttentionContract(
        "sm_80-hd128-tree", (8, 0), 128, "HMMA", large=1200, small=2000, stack_bytes=16,
        changed={"features": ("tree_mask",)},
    ),
    # 32 keys to a tile would not spill, and cost 774 in full tiles, which a tree has many more of.
    AttentionContract(
        "sm_90-hd256-tree", (9, 0), 256, "HGMMA", large=600, small=2200, stack_bytes=320, local=(10, 112),
        changed={"features": ("tree_mask",)},
    ),
    AttentionContract(
        "sm_80-hd256-tree", (8, 0), 256, "HMMA", large=1600, small=2000, stack_bytes=8,
        changed={"features": ("tree_mask",)},
    ),
    # One tile and one walk for all, with every mask.
    AttentionContract(
        "sm_90-hd128-invariant", (9, 0), 128, "HGMMA", large=1200, small=0, programs_per_sm=2, stack_bytes=8,
        local=(1, 0),
        changed={"invariant": True},
    ),
    # Quantised: within 1.5 times bfloat16's 759 on sm_90, 933 on sm_80. int4 uses the stack before and after its walks.
    AttentionContract(
        "sm_90-hd128-float8", (9, 0), 128, "HGMMA", large=900, small=2500,
        changed={"kv_format": "float8_e4m3fn"},
    ),
    AttentionContract(
        "sm_90-hd128-float8-token", (9, 0), 128, "HGMMA", large=1138, small=3100,
        changed={"kv_format": "float8_e4m3fn", "scale": "token"},
    ),
    AttentionContract(
        "sm_90-hd128-int8-token", (9, 0), 128, "HGMMA", large=1138, small=3800,
        changed={"kv_format": "int8", "scale": "token"},
    ),
    AttentionContract(
        "sm_90-hd128-int4-token", (9, 0), 128, "HGMMA", large=1138, small=3700, stack_bytes=40,
        changed={"kv_format": "int4", "scale": "token"},
    ),
    AttentionContract(
        "sm_100-hd128-float8-token", (10, 0), 128, "UTCHMMA", large=1000, small=4200,
        changed={"kv_format": "float8_e4m3fn", "scale": "token"},
    ),
    AttentionContract(
        "sm_80-hd128-float8", (8, 0), 128, "HMMA", large=1400, small=5500,
        changed={"kv_format": "float8_e4m3fn"},
    ),
    AttentionContract(
        "sm_80-hd128-int8-token", (8, 0), 128, "HMMA", large=1400, small=3800, stack_bytes=8,
        changed={"kv_format": "int8", "scale": "token"},
    ),
    AttentionContract(
        "sm_80-hd128-int4-token", (8, 0), 128, "HMMA", large=1400, small=3700, stack_bytes=64,
        changed={"kv_format": "int4", "scale": "token"},
    ),
    AttentionContract(
        "sm_80-hd64-int8-token", (8, 0), 64, "HMMA", large=2100, small=5300,
        changed={"kv_format": "int8", "scale": "token"},
    ),
    AttentionContract(
        "sm_80-hd256-int8-token", (8, 0), 256, "HMMA", large=2400, small=4000,
        changed={"kv_format": "int8", "scale": "token"},
    ),
    AttentionContract(
        "sm_80-hd256-int4-token", (8, 0), 256, "HMMA", large=2300, small=3800, stack_bytes=256,
        changed={"kv_format": "int4", "scale": "token"},
    ),
    # 32 keys to a tile would not spill, or hardly, and cost a third more: 1,016 and 997.
    AttentionContract(
        "sm_90-hd256-int8-token", (9, 0), 256, "HGMMA", large=800, small=4000, stack_bytes=40, local=(4, 6),
        changed={"kv_format": "int8", "scale": "token"},
    ),
    AttentionContract(
        "sm_90-hd256-int4-token", (9, 0), 256, "HGMMA", large=800, small=3800, stack_bytes=1000, local=(40, 40),
        changed={"kv_format": "int4", "scale": "token"},
    ),
    SmallKernelContract("append_kv"),
    SmallKernelContract("append_kv-int4", kv_format="int4"),
    SmallKernelContract("append_kv-float8", kv_format="float8_e4m3fn"),
    SmallKernelContract("merge_states", kernel="merge_states"),
    SmallKernelContract("rms_norm", kernel="rms_norm"),
    SmallKernelContract("silu_mul", kernel="silu_mul"),
    SmallKernelContract("draw", registers=255, kernel="draw"),
]  # fmt: skip
QUICK = ("sm_90-hd128", "sm_80-hd128")
"""The cases of the default tests."""


def differences(name: str, measured: Mapping[str, Any], record: Mapping[str, Any]) -> list[str]:
    """Where the measures are not those of the record, one sentence each."""
    expected = record["cases"].get(name)
    if expected is None:
        return [f"{name}: no record"]
    if record["triton"] != triton.__version__:
        return []
    return [
        f"{name}: {key} is {measured[key]}, the record has {expected.get(key)}"
        for key in measured
        if measured[key] != expected.get(key)
    ]


def main() -> int:
    """The exit status: 1 if a limit is broken or a measure is not the record's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="cases; all of them if none is named")
    parser.add_argument("--write", action="store_true", help="write the record instead of comparing with it")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - {contract.name for contract in CONTRACTS}
    if unknown:
        parser.error(f"names must be of {', '.join(c.name for c in CONTRACTS)}, got {', '.join(sorted(unknown))}")
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {"triton": triton.__version__, "cases": {}}
    broken = []
    for contract in CONTRACTS:
        if arguments.names and contract.name not in arguments.names:
            continue
        measured = contract.measure()
        print(json.dumps({"case": contract.name, **measured}), flush=True)
        broken += contract.violations(measured)
        if arguments.write:
            record["cases"][contract.name] = measured
        else:
            broken += differences(contract.name, measured, record)
    if arguments.write:
        record["triton"] = triton.__version__
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
    print("\n".join(broken))
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
