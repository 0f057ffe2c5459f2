"""Builds the libraries that run CUDA kernels on the CPU; for tests only, in build/emu, only what changed."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pybind11
import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "emu"
EMULATOR = sorted((ROOT / "csrc" / "emu").glob("*.cpp"))
# No contraction and no fast math: a float32 result is that of the operations as written.
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]


@dataclass(frozen=True)
class Sanitizer:
    """A way to build, by name.

    Args:
        kernels: flags of everything but the emulator.
        emulator: flags of csrc/emu.
        runtime: the library that the compiler brings along.
    """

    name: str
    kernels: str
    emulator: str
    runtime: str


# Line numbers of inlined functions need -g, frames of the caller no tail calls; -O1 keeps both near the source.
SANITIZER_FLAGS = ["-g", "-O1", "-fno-omit-frame-pointer", "-fno-optimize-sibling-calls"]
THREAD = Sanitizer("thread", "-fsanitize=thread", "-DEMU_THREAD_SANITIZER", "libtsan")
ADDRESS = Sanitizer(
    "address",
    "-fsanitize=address,undefined -fno-sanitize-recover=undefined",
    "-fsanitize=address",
    "libasan and libubsan",
)
"""csrc/emu/sanitizer.h says why the emulator is compiled without the thread sanitizer."""


def ninja_file(name: str, sources: Sequence[Path], includes: Sequence[Path], sanitizer: Sanitizer | None = None) -> str:
    """The text of build.ninja that makes a library of its sources and the emulator, or with a sanitizer a program.

    ``includes`` are searched first.
    """
    paths = [*includes, ROOT / "csrc", Path(pybind11.get_include()), Path(sysconfig.get_paths()["include"])]
    flags = [*FLAGS, f"-DMODULE_NAME={name}", *(f"-I{path}" for path in paths)]
    if sanitizer is not None:
        flags += SANITIZER_FLAGS
    lines = [
        f"cxx = {compiler()}",
        f"flags = {' '.join(flags)}",
        "rule compile",
        "  command = $cxx -MD -MF $out.d $flags $more -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx {'-shared' if sanitizer is None else sanitizer.kernels} $in -o $out",
    ]
    objects = []
    for source in [*EMULATOR, *sources]:
        objects.append(f"{source.parent.name}_{source.name}.o")
        lines.append(f"build {objects[-1]}: compile {source}")
        if sanitizer is not None:
            lines.append(f"  more = {sanitizer.emulator if source in EMULATOR else sanitizer.kernels}")
    lines.append(f"build {name}{'.so' if sanitizer is None else ''}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def run_ninja(name: str, text: str) -> Path:
    """The folder in which this build.ninja was run; skips where it cannot be.

    Test processes that ask at the same time build one after the other.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"the emulation of CUDA kernels switches stacks on x86-64 only, this is {platform.machine()}")
    ninja = shutil.which("ninja") or str(Path(sysconfig.get_path("scripts")) / "ninja")
    folder = BUILD / name
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        file = folder / "build.ninja"
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
        result = subprocess.run([ninja, "-C", folder], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
    return folder


def build_library(name: str, sources: Sequence[Path], includes: Sequence[Path] = ()) -> Path:
    """The shared library ``name``, built from ``sources`` and the emulator."""
    return run_ninja(name, ninja_file(name, sources, includes)) / f"{name}.so"


def build_sanitized(name: str, sources: Sequence[Path], includes: Sequence[Path], sanitizer: Sanitizer) -> Path:
    """The program ``name``, built from ``sources`` and the emulator; skips where the sanitizer does not run."""
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "probe"
        command = [compiler(), *sanitizer.kernels.split(), "-x", "c++", "-", "-o", probe]
        result = subprocess.run(command, input="int main() {}", capture_output=True, text=True, check=False)
        if result.returncode == 0:
            result = subprocess.run([probe], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        pytest.skip(f"needs {sanitizer.runtime}, which come with GCC: {result.stderr.strip()[-300:]}")
    return run_ninja(name, ninja_file(name, sources, includes, sanitizer)) / name


def build(name: str, sources: Sequence[Path], includes: Sequence[Path] = ()) -> ModuleType:
    """The extension module ``name``; as ``build_library``."""
    spec = importlib.util.spec_from_file_location(name, build_library(name, sources, includes))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
