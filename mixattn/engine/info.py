"""What this machine has, and which of mixattn's kernels run on it; ``mixattn-engine info``."""

from __future__ import annotations

import torch

from mixattn import _C, __version__, env
from mixattn.executor.kv_pool import free_memory_bytes
from mixattn.ops.backends import backends


def info_lines() -> list[str]:
    """Name and value, a line each; then every backend, with the reason where it cannot run."""
    cpu = _C.cpu_info()
    isa, kernels = env.cpu_isa(), f"(this CPU can: {', '.join(cpu['available'])})"
    if isa is None and cpu["passed_over"] is not None:
        kernels += f"; not {cpu['passed_over']}"
    rows = {
        "mixattn": __version__,
        "torch": torch.__version__,
        "CPU": cpu["model"],
        "CPU kernels": f"{isa or cpu['isa']} {kernels}",
        "threads": f"{env.num_threads()} (affinity and cgroup quota; MIXATTN_NUM_THREADS changes it)",
        "OpenMP": cpu["openmp"] or "none loaded: one thread",
        "memory free": f"{free_memory_bytes() / 2**30:.1f} GiB",
        "GPU": _gpus(),
    }
    lines = [f"{name:12} {value}" for name, value in rows.items()]
    lines.append("backends")
    for status in backends().values():
        lines.append(f"  {status.name:10} {'yes' if status.is_available else 'no ':3}  {status.detail}")
    return lines


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    names = [torch.cuda.get_device_name(idx) for idx in range(torch.cuda.device_count())]
    return f"{', '.join(names)} (the engine runs on the CPU in this version)"
