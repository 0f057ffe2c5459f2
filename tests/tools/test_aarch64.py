"""The C++ sources for aarch64: what setup.py compiles there is valid. `make test-aarch64` runs it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = "aarch64-linux-gnu-g++"
# setup.py as on aarch64, with setup() replaced by printing what it would compile.
PRINT_BUILD = """
import platform, sys
from pathlib import Path
platform.machine = lambda: "aarch64"
import setuptools
setuptools.setup = lambda **_: None
import setup
print(setup.ninja_file(Path("build"), Path("out"), None))
"""


def commands() -> dict[str, list[str]]:
    """The compiler's arguments of every source, by its name relative to the root, from the ninja file for aarch64."""
    environment = {name: value for name, value in os.environ.items() if name not in ("CXX", "CXXFLAGS", "LDFLAGS")}
    text = subprocess.run(
        [sys.executable, "-c", PRINT_BUILD], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout
    (flags,) = re.findall(r"^flags = (.*)$", text, re.MULTILINE)
    found = re.findall(r"^build .*: compile (.*)\n  isa_flags = (.*)$", text, re.MULTILINE)
    return {str(Path(source).relative_to(ROOT)): [*flags.split(), *isa.split()] for source, isa in found}


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no {COMPILER} (Debian: g++-aarch64-linux-gnu)")
def test_every_source_for_aarch64_is_valid() -> None:
    sources = commands()
    assert {"csrc/cpu/kernels_neon.cpp", "csrc/cpu/kernels_neon_bf16.cpp"} <= sources.keys()
    assert not any("avx" in source for source in sources)
    for source, flags in sources.items():
        command = [COMPILER, *flags, "-Werror", "-fsyntax-only", source]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, f"{source}:\n{result.stderr}"
