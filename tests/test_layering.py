"""Imports run one way, the integer rooms know neither torch nor a clock, and importing the package stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mixattn

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"mixattn": ROOT / "mixattn", "mixattn.triton_kernels": ROOT / "triton_kernels"}

BASE = {"config", "types", "env", "metrics", "_C"}
MAY_IMPORT = {
    "config": set(),
    "types": {"config"},
    "env": {"config"},
    "metrics": {"types", "config"},
    "triton_kernels": BASE,
    "ops": BASE | {"triton_kernels"},
    "compat": BASE | {"ops"},
    "models": BASE | {"ops"},
    "executor": BASE | {"triton_kernels", "ops", "models"},
    "kv": BASE,
    "sched": BASE | {"kv", "ops.plan"},
    "engine.core": BASE | {"kv", "sched", "ops.plan"},
    "engine": BASE | {"kv", "sched", "engine.core", "ops", "models", "executor"},
    "server": BASE | {"ops", "models", "executor", "engine", "engine.core"},
    "info": BASE | {"ops", "engine"},
    "cli": BASE | {"ops", "models", "kv", "sched", "engine", "engine.core", "executor", "server"},
}
"""Room -> the rooms it may import besides itself. ``ops.plan`` and ``engine.core`` are rooms of their own."""

CLOCKLESS_ROOMS = {"kv", "sched", "engine.core", "types", "config", "metrics", "ops.plan"}
CLOCKS_AND_TENSORS = {
    "torch",
    "triton",
    "time",
    "random",
    "asyncio",
    "threading",
    "datetime",
    "secrets",
    "multiprocessing",
}


def all_modules() -> dict[str, Path]:
    """Every module of the package, by dotted name."""
    modules = {}
    for package, folder in FOLDERS.items():
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            modules[".".join([package, *(p for p in parts if p != "__init__")])] = file
    return modules


def room_of(module: str) -> str | None:
    """The room of a module of ours: ``ops`` for mixattn.ops.attention; None for the package itself and for others'.

    A name that the package exports lazily is in the room that it comes from.
    """
    module = mixattn._LAZY.get(module.removeprefix("mixattn."), module)
    if not module.startswith("mixattn.") or module == "mixattn.__version__":
        return None
    inner = module.removeprefix("mixattn.")
    for room in ("engine.core", "ops.plan"):
        if inner == room or inner.startswith(room + "."):
            return room
    return inner.split(".")[0]


def imported_modules(tree: ast.Module, module: str) -> list[tuple[str, int, bool]]:
    """(dotted name, line, whether inside a function) of all imports of a file, names of from-imports included."""
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    deferred = {id(node) for function in functions for node in ast.walk(function)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                origin = ".".join([*module.split(".")[: -node.level], *filter(None, [node.module])])
            # "from mixattn.ops import plan" names a module, "from mixattn.ops.plan import plan" a thing in one.
            names = [f"{origin}.{alias.name}" for alias in node.names]
        else:
            continue
        found += [(name, node.lineno, id(node) in deferred) for name in names]
    return found


def violations(module: str, source: str) -> list[str]:
    """What ``source``, as the file of ``module``, breaks of the rules, one line each."""
    tree = ast.parse(source)
    room = room_of(module)
    broken = []
    for name, line, is_deferred in imported_modules(tree, module):
        top = name.split(".")[0]
        if is_deferred and top in sys.stdlib_module_names:
            broken.append(f"{module}:{line} defers {name}; only torch and compiled modules are worth deferring")
        if top == "triton_kernels":
            broken.append(f"{module}:{line} imports bare triton_kernels, not mixattn.triton_kernels")
        if room in CLOCKLESS_ROOMS and top in CLOCKS_AND_TENSORS:
            broken.append(f"{module}:{line} imports {top}; {room} knows neither tensors nor clocks")
        target = room_of(name)
        if room is None or target is None or target == room:
            continue
        allowed = MAY_IMPORT["ops" if room == "ops.plan" else room]
        if target not in allowed and not (target == "ops.plan" and (room == "ops" or "ops" in allowed)):
            broken.append(f"{module}:{line} imports {name}; {room} may import only {sorted(allowed)}")
    if module != "mixattn.env":
        broken += [
            f"{module}:{node.lineno} reads the environment; only env.py does"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and node.attr in ("environ", "getenv")
            and isinstance(node.value, ast.Name)
            and node.value.id == "os"
        ]
    return broken


def test_imports_run_one_way() -> None:
    modules = all_modules()
    assert "mixattn.ops.attention" in modules
    broken = [line for module, file in modules.items() for line in violations(module, file.read_text())]
    assert not broken, "\n".join(broken)


def test_every_room_has_a_rule() -> None:
    rooms = {room_of(module) for module in all_modules()} - {None, "ops.plan"}
    assert rooms <= set(MAY_IMPORT)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("mixattn.ops.x", "from mixattn.models import llama"),
        ("mixattn.ops.x", "from mixattn.models.llama import Llama"),
        ("mixattn.ops.x", "import mixattn.executor.local"),
        ("mixattn.sched.x", "import torch"),
        ("mixattn.sched.x", "def f():\n    import torch.nn"),
        ("mixattn.kv.x", "from time import monotonic"),
        ("mixattn.kv.x", "from mixattn.sched import scheduler"),
        ("mixattn.sched.x", "from mixattn.ops.attention import attention"),
        ("mixattn.sched.x", "from ..ops import attention"),
        ("mixattn.engine.core", "import asyncio"),
        ("mixattn.engine.core", "from mixattn.engine.llm import LLM"),
        ("mixattn.ops.plan", "import torch"),
        ("mixattn.executor.x", "from mixattn.sched.scheduler import Scheduler"),
        ("mixattn.kv.x", "from mixattn import attention"),
        ("mixattn.ops.x", "def f():\n    import json"),
        ("mixattn.ops.x", "from triton_kernels import mixed_attention"),
        ("mixattn.ops.x", "import os\nx = os.environ['HOME']"),
    ],
)
def test_violation_is_found(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("mixattn.sched.x", "from mixattn.kv.page_pool import PagePool\nfrom mixattn.ops.plan import plan"),
        ("mixattn.engine.llm", "from mixattn.engine.core import EngineCore\nfrom mixattn.ops import attention"),
        ("mixattn.ops.attention", "from mixattn.ops.plan import plan\nimport torch"),
        ("mixattn.cli", "from mixattn import __version__\ndef f():\n    import torch"),
        ("mixattn.env", "import os\nx = os.environ.get('HOME')"),
    ],
)
def test_allowed_import_passes(module: str, source: str) -> None:
    assert violations(module, source) == []


def run_python(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_import_mixattn_loads_nothing_heavy() -> None:
    run_python(
        "import sys, mixattn\n"
        "heavy = {'torch', 'triton', 'transformers', 'fastapi', 'pydantic', 'numpy', 'mixattn._C'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )


def test_integer_rooms_import_without_torch() -> None:
    names = [m for m in all_modules() if room_of(m) in CLOCKLESS_ROOMS]
    assert {"mixattn.ops.plan", "mixattn.engine.core"} <= set(names)
    run_python(
        "import importlib, sys\n"
        "sys.modules['torch'] = sys.modules['triton'] = None  # makes their import fail\n"
        f"for name in {sorted(names)}:\n"
        "    importlib.import_module(name)\n"
    )
