"""Builds the libraries that run CUDA kernels on the CPU; for tests only, in build/emu, only what changed."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import platform
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pybind11
import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "emu"
EMULATOR = sorted((ROOT / "csrc" / "emu").glob("*.cpp"))
# No contraction and no fast math: a float32 result is that of the operations as written.
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]


def ninja_file(name: str, sources: Sequence[Path], includes: Sequence[Path]) -> str:
    """The text of build.ninja that makes a library of its sources and the emulator. ``includes`` are searched first."""
    paths = [*includes, ROOT / "csrc", Path(pybind11.get_include()), Path(sysconfig.get_paths()["include"])]
    lines = [
        f"cxx = {os.environ.get('CXX', 'g++')}",
        f"flags = {' '.join(FLAGS)} -DMODULE_NAME={name} {' '.join(f'-I{path}' for path in paths)}",
        "rule compile",
        "  command = $cxx -MD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx -shared $in -o $out",
    ]
    objects = []
    for source in [*EMULATOR, *sources]:
        objects.append(f"{source.parent.name}_{source.name}.o")
        lines.append(f"build {objects[-1]}: compile {source}")
    lines.append(f"build {name}.so: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def build_library(name: str, sources: Sequence[Path], includes: Sequence[Path] = ()) -> Path:
    """The shared library ``name``, built from ``sources`` and the emulator; skips where it cannot be.

    Test processes that ask at the same time build one after the other.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"the emulation of CUDA kernels switches stacks on x86-64 only, this is {platform.machine()}")
    ninja = shutil.which("ninja") or str(Path(sysconfig.get_path("scripts")) / "ninja")
    folder = BUILD / name
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        file, text = folder / "build.ninja", ninja_file(name, sources, includes)
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
        result = subprocess.run([ninja, "-C", folder], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
    return folder / f"{name}.so"


def build(name: str, sources: Sequence[Path], includes: Sequence[Path] = ()) -> ModuleType:
    """The extension module ``name``; as ``build_library``."""
    spec = importlib.util.spec_from_file_location(name, build_library(name, sources, includes))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
