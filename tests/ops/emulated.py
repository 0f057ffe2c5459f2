"""Builds whose kernels for an ISA that this CPU lacks are emulated, and the ordinary cases, run with them."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RUN_PYTEST = "import sys, mixattn, pytest; mixattn.__path__.insert(0, sys.argv[1]); sys.exit(pytest.main(sys.argv[2:]))"
"""The first argument is a folder whose _C is taken before mixattn's own."""


def build_emulated(name: str, folder: Path) -> Path:
    """The package in ``folder`` whose _C has ``name`` emulated (MIXATTN_BUILD_EMULATED_<name>).

    Only one file is compiled, if the ordinary build is fresh. One build at a time: they share its folder, and test
    processes may ask at once.
    """
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder)]
    environment = {**os.environ, f"MIXATTN_BUILD_EMULATED_{name}": "1"}
    with (ROOT / "build" / "emulated.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "mixattn"


def check_cases_pass(package_folder: Path, file: str, cases: str, least: int) -> None:
    """Runs the cases of tests/ops/``file``, at least so many, with the package's _C: all pass, and none is skipped."""
    command = [sys.executable, "-c", RUN_PYTEST, str(package_folder), "-q", "-p", "no:cacheprovider"]
    command += ["-p", "no:xdist", f"tests/ops/{file}", "-k", cases]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    summary = result.stdout.strip().splitlines()[-1]
    passed = re.match(r"(\d+) passed", summary)
    assert passed is not None and int(passed[1]) >= least and "skipped" not in summary, summary
