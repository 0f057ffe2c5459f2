"""The environment: every variable that mixattn reads, and what the machine grants this process.

| variable | meaning |
|---|---|
| ``MIXATTN_CPU_ISA`` | CPU kernels instead of the best: a name of ``CPU_ISAS`` |
| ``MIXATTN_NUM_THREADS`` | threads of the CPU kernels instead of what ``num_threads`` finds |
| ``MIXATTN_LIBCUDA`` | what to open in place of ``libcuda.so.1``: tests take an emulated driver, for CPU tensors |
| ``MIXATTN_TILES`` | the file of tuned tiles, in place of ``mixattn/tiles.json`` in the user's cache directory |
| ``MIXATTN_API_KEY`` | the server's key, or several with commas between them |
| ``OMP_WAIT_POLICY``, ``GOMP_SPINCOUNT`` | OpenMP's own; with neither, programs of ours let idle threads spin briefly |
| ``THP_MEM_ALLOC_ENABLE`` | torch's own; without it, programs of ours have large CPU tensors in huge pages |
| ``TRITON_INTERPRET`` | ``1``: Triton runs its kernels in its interpreter, on CPU tensors (Triton's own variable) |

``setup.py`` alone reads ``MIXATTN_BUILD_SIMDE``, ``MIXATTN_BUILD_EMULATED_AMX``,
``MIXATTN_BUILD_EMULATED_AVX_VNNI`` and ``MIXATTN_BUILD_CUDA``.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
"""Of glibc's malloc.h."""
CPU_ISAS = ("amx", "avx512_bf16", "avx512_vnni", "avx512", "avx2_vnni", "avx2", "neon_bf16", "neon", "scalar")


@functools.cache
def cpu_isa() -> str | None:
    """The CPU kernels that ``MIXATTN_CPU_ISA`` asks for; None leaves the choice to the CPU. Read once.

    Raises:
        ValueError: no such kernels. Whether this CPU can run them is checked where they are called.
    """
    value = os.environ.get("MIXATTN_CPU_ISA", "").strip().lower()
    if not value:
        return None
    if value not in CPU_ISAS:
        raise ValueError(f"MIXATTN_CPU_ISA must be one of {', '.join(CPU_ISAS)}, got {value!r}")
    return value


def prepare_process() -> None:
    """What our programs do to their process before torch is loaded; the library never does it to its user's."""
    _wait_briefly()
    _keep_freed_memory()
    _use_huge_pages()


def _use_huge_pages() -> None:
    """Lets torch ask for huge pages under tensors of 2 MiB and more, unless the user chose.

    KV pages and weights are read once per step, and a small page is left after 64 cache lines: in a virtual machine the
    next one's address is a walk through two tables. One thread, decodes of 4k keys, heads of 128: 22 GB/s instead of 16
    to 20 in bfloat16, 23 instead of 15 to 21 in float32 (Zen 4, 2026-11-29, six rounds in turns).
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def _keep_freed_memory() -> None:
    """Lets glibc keep freed blocks of up to 32 MiB for the next step.

    Else each tensor of a prompt's chunk comes from the system, which clears it: a step of 512 tokens of smollm2 with
    int8 activations takes 162 ms instead of 150 (2 threads, Zen 5, 2026-11-27).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt(_M_MMAP_THRESHOLD, 32 << 20)
    mallopt(_M_TRIM_THRESHOLD, 256 << 20)
    mallopt(_M_TOP_PAD, 64 << 20)


def _wait_briefly() -> None:
    """Lets idle OpenMP threads sleep after a few microseconds, unless the user chose.

    A decode step has some 150 parallel regions: to wake a sleeping thread for each costs more than the small products,
    and a thread that spins on takes the core from whoever else wants it. Milliseconds per step of smollm2, 2 threads on
    2 cores (Zen 3, 2026-11-25, ``bench.serving.bench_step``), asleep at once / after 2,000 spins / 10,000 / never:
    batch 1 alone 13.7 / 7.3 / 7.7 / 10.1, beside one busy process 17 / 29 / 80 / 15; batch 8 alone 37 / 30 / 27 / 33.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")


@functools.cache
def num_threads() -> int:
    """Threads of the CPU kernels: ``MIXATTN_NUM_THREADS``, or as many CPUs as this process may use. Read once.

    A process may use the CPUs of its affinity mask, and no more than its cgroup's quota: threads beyond the quota would
    run for a part of each period and then stand still, all of them.

    Raises:
        ValueError: ``MIXATTN_NUM_THREADS`` is no integer >= 1.
    """
    value = os.environ.get("MIXATTN_NUM_THREADS", "").strip()
    if value:
        if not value.isdecimal() or int(value) < 1:
            raise ValueError(f"MIXATTN_NUM_THREADS must be an integer >= 1, got {value!r}")
        return int(value)
    num_cpus = len(os.sched_getaffinity(0))
    quota = cgroup_cpus()
    return num_cpus if quota is None else max(1, min(num_cpus, int(quota)))


def api_keys() -> tuple[str, ...]:
    """The server's keys, from ``MIXATTN_API_KEY``."""
    return tuple(key.strip() for key in os.environ.get("MIXATTN_API_KEY", "").split(",") if key.strip())


def libcuda() -> str | None:
    """The library to take in place of NVIDIA's driver."""
    return os.environ.get("MIXATTN_LIBCUDA") or None


def tiles_file() -> tuple[Path, bool]:
    """The file of tuned tiles, which need not be there, and whether ``MIXATTN_TILES`` names it.

    Source: XDG Base Directory Specification, which lets relative paths in XDG_CACHE_HOME be ignored.
    """
    named = os.environ.get("MIXATTN_TILES")
    if named:
        return Path(named).expanduser(), True
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():
        cache = Path.home() / ".cache"
    return cache / "mixattn" / "tiles.json", False


def triton_interpret() -> bool:
    """Whether Triton runs its kernels in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "").strip().lower() in ("1", "true", "yes", "on", "y")


def cgroup_cpus(root: Path = Path("/")) -> float | None:
    """The CPUs that the cgroup's quota grants, the least over the group and its parents; None without a quota.

    Args:
        root: of the file system that holds ``proc`` and ``sys``.
    Source: Linux Documentation/admin-guide/cgroup-v2.rst (cpu.max) and scheduler/sched-bwc.rst (v1).
    """
    quotas = [quota for group in _cpu_cgroups(root) if (quota := _quota(group)) is not None]
    return min(quotas, default=None)


def _cpu_cgroups(root: Path) -> list[Path]:
    """The folders of the cgroup that rations this process's CPU time, and of all its parents."""
    groups = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        # "0::/path" for v2, "4:cpu,cpuacct:/path" for v1. In a container the path can be the host's, which is not
        # there; the mount point itself, a parent of all, is then the container's group.
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            mount = root / "sys/fs/cgroup"
        elif "cpu" in controllers.split(","):
            mount = root / "sys/fs/cgroup/cpu"
        else:
            continue
        inner = Path(path.lstrip("/"))
        groups += [mount / inner, *(mount / parent for parent in inner.parents)]
    return groups


def _quota(group: Path) -> float | None:
    """Quota over period of one cgroup folder, v2 or v1; None where there is none."""
    fields = _read(group / "cpu.max").split()
    if not fields:
        fields = [_read(group / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    if len(fields) != 2 or not fields[0].isdecimal() or not fields[1].isdecimal() or int(fields[1]) == 0:
        return None  # "max", "-1", or no such files
    return int(fields[0]) / int(fields[1])


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
