"""How every kernel is launched; or, while it is compiled ahead, only compiled, by the way that a launch takes.

Since the arguments go through the same binder, what is compiled has the key under which a launch looks it up, in the
process and in Triton's cache on disk.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

WARP_SIZE = 32


@dataclass(frozen=True)
class Compiled:
    """One launch that was compiled ahead. Args: kernel: its name; how: in words, how long it took included."""

    kernel: str
    how: str


@dataclass
class CompiledAhead:
    """What ``compiling`` has met.

    Args:
        capability: of the GPU that need not be there; None: the current one.
        kernels: in the order of launches.
    """

    capability: tuple[int, int] | None
    kernels: list[Compiled] = field(default_factory=list)


class _Target:
    """In the place of Triton's driver, as far as compiling asks one: a GPU that need not be there."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self._arch = 10 * capability[0] + capability[1]

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, WARP_SIZE)

    def get_current_device(self) -> str:
        """No index: what is compiled for a target must not be found by launches on this machine's GPUs."""
        return f"sm_{self._arch}"

    def get_current_stream(self, device: object) -> int:
        return 0


_compiling: CompiledAhead | None = None


def target_capability() -> tuple[int, int] | None:
    """The compute capability that kernels are being compiled for; None where they run."""
    return None if _compiling is None else _compiling.capability


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """``kernel[grid]``; inside of ``compiling`` what only compiles the kernel for the arguments."""
    if _compiling is None:
        run: Callable[..., Any] = kernel[grid]
        return run
    met = _compiling

    def compile_ahead(*arguments: Any, **options: Any) -> None:
        begin_s, are_hits = time.monotonic(), []
        before = triton.knobs.compilation.listener
        triton.knobs.compilation.listener = lambda *, cache_hit, **_: are_hits.append(cache_hit)
        try:
            kernel.warmup(*arguments, grid=grid, **options)
        finally:
            triton.knobs.compilation.listener = before
        how = "the same as one before"
        if are_hits:
            how = f"{'found in the cache' if are_hits[0] else 'compiled'} in {time.monotonic() - begin_s:.1f} s"
        met.kernels.append(Compiled(kernel.__name__, how))

    return compile_ahead


@contextlib.contextmanager
def compiling(capability: tuple[int, int] | None) -> Iterator[CompiledAhead]:
    """Launches in this block compile and do not run, so that their results are not written. For one thread at a time.

    Args:
        capability: to compile for, with tensors on the CPU; None: the current GPU.
    """
    global _compiling
    assert _compiling is None, "a block is inside of another"
    driver = triton.runtime.driver
    previous = driver._active
    if capability is not None:
        driver.set_active(_Target(capability))
    _compiling = CompiledAhead(capability)
    try:
        yield _compiling
    finally:
        _compiling = None
        if capability is not None:
            driver.set_active(previous)
