"""What our programs do to their process before torch is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_PREPARED = """
import os
from mixattn import env
env.prepare_process()
import torch
print(os.environ.get("GOMP_SPINCOUNT"), os.environ["THP_MEM_ALLOC_ENABLE"])
tensor = torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
kilobytes = 0
for line in open("/proc/self/smaps"):
    if line.startswith("AnonHugePages:"):
        kilobytes += int(line.split()[1])
print(kilobytes)
"""


def _prepared(**environment: str) -> list[str]:
    """What a process with these variables, and no others that we look at, prints."""
    ours = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "THP_MEM_ALLOC_ENABLE")
    rest = {name: value for name, value in os.environ.items() if name not in ours}
    found = subprocess.run(
        [sys.executable, "-c", _PREPARED], env=rest | environment, capture_output=True, text=True, check=True
    )
    return found.stdout.split()


def test_threads_wait_briefly_and_large_tensors_lie_in_huge_pages() -> None:
    spins, has_huge_pages, kilobytes = _prepared()
    assert (spins, has_huge_pages) == ("2000", "1")
    if not _HUGE_PAGES.exists() or "[never]" in _HUGE_PAGES.read_text():
        pytest.skip("this kernel gives no huge pages")
    assert int(kilobytes) >= 32 << 10, "half of a tensor of 64 MiB"


def test_what_the_user_chose_stays() -> None:
    spins, has_huge_pages, _ = _prepared(OMP_WAIT_POLICY="passive", THP_MEM_ALLOC_ENABLE="0")
    assert (spins, has_huge_pages) == ("None", "0")
