"""nvcc: where it is, what ninja is told to make with it, and what it says of the kernels it has made."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc" / "cuda"
FLAGS = ["-std=c++17", "-O3", "-Xptxas", "-v"]
ARCHITECTURES = {
    "sm80": ["sm_80", "sm_90a", "compute_80"],
    "sm90": ["sm_90a"],
}
"""By folder of csrc/cuda, what each .cu file there is compiled for: machine code (sm_*), and PTX (compute_*) that
drivers compile for GPUs of other generations."""
PACKAGES = tuple(
    f"{name}==13.0.*" for name in ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-runtime")
)
"""nvcc and what it calls, of one version: ptxas refuses the PTX of a newer nvvm. An old one: a driver compiles no PTX
that is newer than itself."""

_ENTRY = re.compile(r"Compiling entry function '(?P<kernel>\w+)' for '(?P<architecture>\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME or CUDA_PATH, of PATH, or of the package nvidia-cuda-nvcc; None without any."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        folder = os.environ.get(name)
        if folder and (Path(folder) / "bin" / "nvcc").exists():
            return Path(folder) / "bin" / "nvcc"
    found = shutil.which("nvcc")
    if found is not None:
        return Path(found)
    return next((nvcc for folder in sys.path for nvcc in sorted(Path(folder).glob("nvidia/*/bin/nvcc"))), None)


def cuda_version(nvcc: Path) -> str:
    """The version of the toolkit that nvcc is of: ``13.0``."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+\.\d+)", text)
    if match is None:
        raise RuntimeError(f"{nvcc} --version does not tell its release: {text}")
    return match[1]


def packing_flags(version: str) -> list[str]:
    """Options of nvcc of this version for images of a fifth of the size.

    Drivers that take images of CUDA 13 can unpack these; older nvcc has not the option, older drivers not the format.
    """
    return ["--compress-mode=size"] if int(version.split(".")[0]) >= 13 else []


def image_sources() -> dict[str, Path]:
    """The .cu file of every image, by the image's name: ``sm80_mixed_attention_hd64``."""
    return {
        f"{folder}_{source.stem}": source
        for folder in ARCHITECTURES
        for source in sorted((SOURCES / folder).glob("*.cu"))
    }


def gencode(architectures: list[str]) -> list[str]:
    """nvcc's options for these architectures."""
    return [
        f"-gencode=arch={architecture.replace('sm_', 'compute_')},code={architecture}" for architecture in architectures
    ]


def ninja_lines(nvcc: Path, folder: Path, escape: Callable[[Path], str]) -> list[str]:
    """The rule and the builds that make every image in ``folder``; ptxas' words on each are in NAME.fatbin.log."""
    version = cuda_version(nvcc)
    lines = [
        f"nvcc = {escape(nvcc)}",
        f"nvcc_flags = {' '.join([*FLAGS, *packing_flags(version)])} -I{escape(ROOT / 'csrc')}",
        "rule fatbin",
        # The version is in the command, so that another nvcc at the same place compiles everything anew.
        f"  command = : {version}; $nvcc $nvcc_flags $gencode -fatbin -MD -MF $out.d -MT $out $in -o $out "
        "> $out.log 2>&1 || { cat $out.log; rm -f $out; exit 1; }",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = nvcc $in",
    ]
    for name, source in image_sources().items():
        lines.append(f"build {escape(folder / name)}.fatbin: fatbin {escape(source)}")
        lines.append(f"  gencode = {' '.join(gencode(ARCHITECTURES[source.parent.name]))}")
    return lines


def kernel_usage(log: str) -> dict[str, dict[str, dict[str, int]]]:
    """Registers, stack and spills of every kernel on every architecture, from ptxas' words."""
    usage: dict[str, dict[str, dict[str, int]]] = {}
    entries = list(_ENTRY.finditer(log))
    for entry, end in zip(entries, [*(match.start() for match in entries[1:]), len(log)], strict=True):
        text = log[entry.end() : end]
        stack, registers = _STACK.search(text), _REGISTERS.search(text)
        if stack is None or registers is None:
            raise RuntimeError(f"ptxas does not tell what {entry['kernel']} takes: {text}")
        usage.setdefault(entry["kernel"], {})[entry["architecture"]] = {
            "registers": int(registers[1]),
            "stack_bytes": int(stack[1]),
            "spilled_bytes": int(stack[2]) + int(stack[3]),
        }
    return usage


def install_images(nvcc: Path, built: Path, target: Path) -> None:
    """Copies the images in ``built`` to ``target``, with a manifest of what is in them; what is equal stays untouched.

    The manifest, manifest.json, is what mixattn/ops/cuda_images.py reads.
    """
    target.mkdir(parents=True, exist_ok=True)
    images = {}
    for name, source in image_sources().items():
        data = (built / f"{name}.fatbin").read_bytes()
        _write_if_changed(target / f"{name}.fatbin", data)
        images[name] = {
            "architectures": ARCHITECTURES[source.parent.name],
            "num_bytes": len(data),
            "kernels": kernel_usage((built / f"{name}.fatbin.log").read_text()),
        }
    manifest = {"cuda": cuda_version(nvcc), "images": images}
    _write_if_changed(target / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())
    for file in target.iterdir():
        if file.stem not in images and file.name != "manifest.json":
            file.unlink()


def _write_if_changed(file: Path, data: bytes) -> None:
    if not file.exists() or file.read_bytes() != data:
        aside = file.with_suffix(".tmp")
        aside.write_bytes(data)
        aside.replace(file)
