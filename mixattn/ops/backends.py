"""What this machine can run, why not the rest, and which backend a call gets."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass

from mixattn import env

logger = logging.getLogger(__name__)

BACKEND_NAMES = ("cpu", "triton", "cuda", "reference")


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can run here.

    Args:
        name: one of ``BACKEND_NAMES``.
        is_available: whether a call may ask for it.
        device_types: the tensors' devices that it serves here (``cpu``, ``cuda``).
        detail: what it would run on, or the reason why it is not available.
    """

    name: str
    is_available: bool
    device_types: tuple[str, ...]
    detail: str


def backends() -> dict[str, BackendStatus]:
    """The status of every backend, by name, available or not."""
    return {status.name: status for status in (_cpu(), _triton(), _cuda(), _reference())}


def choose_backend(device_type: str, requested: str | None, why_not: Callable[[str], str | None] | None = None) -> str:
    """The backend of a call on tensors of this device type: ``requested``, or the first available that takes the call.

    The choice is logged once per device type, and so is each reason to pass a backend over.

    Args:
        why_not: the reason why a backend does not take this call, None if it does; asked only where more than one
            backend serves the device and none is requested. Without it every backend takes the call.
    Raises:
        ValueError: ``requested`` is no backend's name.
        NotImplementedError: it is not available here or does not serve this device; the message names one that does.
    """
    if requested is not None:
        _check_requested(device_type, requested)
        return requested
    *better, last = _default_backends(device_type)
    for name in better:
        reason = None if why_not is None else why_not(name)
        if reason is None:
            return name
        _log_passed_over(device_type, name, reason)
    return last


@functools.cache
def _default_backends(device_type: str) -> tuple[str, ...]:
    """The backends that serve the device unasked, in the order in which they are tried."""
    # The Triton interpreter and an emulated driver serve CPU tensors too, but only for whoever asks for them.
    candidates = (_cpu(),) if device_type == "cpu" else _gpu_backends()
    serving = [s for s in candidates if s.is_available and device_type in s.device_types]
    if serving:
        logger.info("%s tensors: backend %s", device_type, ", else ".join(f"{s.name} ({s.detail})" for s in serving))
        return tuple(s.name for s in serving)
    reasons = "; ".join(f"{s.name}: {s.detail}" for s in backends().values() if not s.is_available)
    raise NotImplementedError(
        f"no backend for {device_type} tensors here ({reasons or 'none serves this device'}); "
        "the nearest is backend='reference', slow and on any device"
    )


def _gpu_backends() -> tuple[BackendStatus, ...]:
    """The faster first, as far as bounds tell: from 10.0 on the CUDA kernels have mma.sync only, and Triton tcgen05."""
    import torch

    is_newer = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (10, 0)
    return (_triton(), _cuda()) if is_newer else (_cuda(), _triton())


def first_backend(device_type: str) -> str:
    """The backend that is tried first for tensors on this device; NotImplementedError if none serves it."""
    return _default_backends(device_type)[0]


@functools.lru_cache(maxsize=256)
def _log_passed_over(device_type: str, name: str, reason: str) -> None:
    logger.info("%s tensors: not backend %s where %s", device_type, name, reason)


@functools.cache
def has_triton_for(device_type: str) -> bool:
    """Whether the ops that take no ``backend`` run in Triton on this device; if not on a GPU, torch runs them."""
    if device_type == "cpu":
        return False
    status = _triton()
    serves = status.is_available and device_type in status.device_types
    logger.info("%s tensors: element-wise ops by %s (%s)", device_type, "triton" if serves else "torch", status.detail)
    return serves


@functools.cache
def _check_requested(device_type: str, requested: str) -> None:
    """Raises as ``choose_backend``; a pair that passed is not looked at again."""
    if requested not in BACKEND_NAMES:
        raise ValueError(f"backend must be one of {', '.join(BACKEND_NAMES)} or None, got {requested!r}")
    status = backends()[requested]
    if status.is_available and (device_type in status.device_types or requested == "reference"):
        logger.info("%s tensors: backend %s, as requested (%s)", device_type, requested, status.detail)
        return
    nearest = [s.name for s in backends().values() if s.is_available and device_type in s.device_types]
    reason = status.detail if not status.is_available else f"it serves {', '.join(status.device_types)} tensors here"
    raise NotImplementedError(
        f"backend={requested!r} cannot run on {device_type} tensors: {reason}; available for them: "
        f"{', '.join(nearest) or 'reference'}"
    )


def _cpu() -> BackendStatus:
    try:
        from mixattn import _C
    except ImportError as error:
        return BackendStatus("cpu", False, (), f"mixattn._C does not load ({error}); `make build` builds it")
    info = _C.cpu_info()
    isa = env.cpu_isa() or info["isa"]
    return BackendStatus("cpu", True, ("cpu",), f"{isa}, {env.num_threads()} threads, {info['model']}")


def _triton() -> BackendStatus:
    import torch

    if importlib.util.find_spec("triton") is None:
        return BackendStatus("triton", False, (), "the package triton is not installed")
    if env.triton_interpret():
        return BackendStatus("triton", True, ("cpu",), "the interpreter (TRITON_INTERPRET=1): correct and very slow")
    if not torch.cuda.is_available():
        return BackendStatus("triton", False, (), "torch sees no GPU, and TRITON_INTERPRET=1 is not set")
    return BackendStatus("triton", True, ("cuda",), torch.cuda.get_device_name())


def _cuda() -> BackendStatus:
    import torch

    try:
        from mixattn.ops import cuda_images
    except ImportError as error:
        return BackendStatus("cuda", False, (), f"mixattn._C does not load ({error}); `make build` builds it")
    reason = cuda_images.why_unavailable()
    if reason is not None:
        return BackendStatus("cuda", False, (), reason)
    if cuda_images.driver().is_emulation:
        return BackendStatus("cuda", True, ("cpu",), cuda_images.describe())
    if not torch.cuda.is_available():
        return BackendStatus("cuda", False, (), f"{cuda_images.describe()}; but torch sees no GPU")
    return BackendStatus("cuda", True, ("cuda",), cuda_images.describe())


def _reference() -> BackendStatus:
    import torch

    device_types = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return BackendStatus("reference", True, device_types, "plain torch in float32, slow")
