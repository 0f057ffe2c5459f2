"""Runs the kernels in Triton's interpreter, or, with TRITON_INTERPRET=0 in the environment, on this machine's GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mixattn import env


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels' tensors live."""
    if env.triton_interpret():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("TRITON_INTERPRET=0 asks for a GPU, and torch sees none")
    return torch.device("cuda")


@pytest.fixture(scope="session", autouse=True)
def patch_triton_language_once() -> Iterator[None]:
    """Every call of one jitted function by another patches all of triton.language again, for a third of the run time.

    The launch has patched it already. Only triton.language.core, which Triton's own library functions look into, is
    left to the first of those calls.
    """
    if not env.triton_interpret():
        yield
        return
    from triton.language import core
    from triton.runtime import interpreter

    calls_unpatched = interpreter.InterpretedFunction.__call__
    is_core_patched = False

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal is_core_patched
        if not is_core_patched and core in function.fn.__globals__.values():
            is_core_patched = True
            return calls_unpatched(function, *args, **kwargs)
        return function.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
    yield
    interpreter.InterpretedFunction.__call__ = calls_unpatched
