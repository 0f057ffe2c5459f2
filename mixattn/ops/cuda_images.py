"""The CUDA kernels' images: what is in them, what they need of a driver and a GPU, and how they get onto one."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

from mixattn import _C, env

FOLDER = Path(__file__).resolve().parent.parent / "cuda_images"
"""Written by setup.py (tools/nvcc.py): a fatbin per image, and manifest.json."""
LIBCUDA = "libcuda.so.1"
BUILT_WITHOUT = "built without CUDA kernels (setup.py found no nvcc, or MIXATTN_BUILD_CUDA was 0)"
EMULATED_IMAGE = b"emulated"
"""What an emulated driver, which has every kernel itself, takes for an image (tests/cuda/emulated_driver.cpp)."""


@dataclass(frozen=True)
class KernelUsage:
    """What a kernel takes on one architecture: registers per thread, the stack, and what is spilled to it."""

    registers: int
    stack_bytes: int
    spilled_bytes: int


@dataclass(frozen=True)
class ImageDescription:
    """One fatbin.

    Args:
        architectures: machine code (``sm_80``) and PTX (``compute_80``), which drivers compile for later GPUs.
        kernels: by name of kernel and architecture; PTX has none.
    """

    name: str
    architectures: tuple[str, ...]
    num_bytes: int
    kernels: dict[str, dict[str, KernelUsage]]


@dataclass(frozen=True)
class Manifest:
    """What the package was built with: the version of CUDA, (major, minor), and the images, by name."""

    cuda: tuple[int, int]
    images: dict[str, ImageDescription]

    @property
    def architectures(self) -> tuple[str, ...]:
        """Of all images."""
        return tuple(sorted({name for image in self.images.values() for name in image.architectures}))

    @property
    def needs(self) -> str:
        """In words, for whoever has no such GPU or driver."""
        return f"kernels for {', '.join(self.architectures)}, made by CUDA {self.cuda[0]}.{self.cuda[1]}"


@functools.cache
def manifest() -> Manifest | None:
    """What the package was built with; None if without CUDA kernels."""
    file = FOLDER / "manifest.json"
    if not file.exists():
        return None
    content = json.loads(file.read_text())
    images = {
        name: ImageDescription(
            name=name,
            architectures=tuple(image["architectures"]),
            num_bytes=image["num_bytes"],
            kernels={
                kernel: {architecture: KernelUsage(**usage) for architecture, usage in by_architecture.items()}
                for kernel, by_architecture in image["kernels"].items()
            },
        )
        for name, image in content["images"].items()
    }
    major, minor = content["cuda"].split(".")
    return Manifest((int(major), int(minor)), images)


@functools.cache
def driver() -> _C.CudaDriver:
    """NVIDIA's driver, or the library that ``MIXATTN_LIBCUDA`` names; opened once.

    Raises:
        RuntimeError: there is none, or it does not start.
    """
    return _C.CudaDriver(env.libcuda() or LIBCUDA)


@functools.cache
def devices() -> tuple[_C.CudaDevice, ...]:
    """The GPUs that the driver sees, in its order, which is torch's."""
    return tuple(driver().devices())


@functools.cache
def image(device_idx: int, name: str) -> _C.CudaImage:
    """An image on a device, loaded once.

    Raises:
        RuntimeError: the driver refuses it.
    """
    data = EMULATED_IMAGE if driver().is_emulation else (FOLDER / f"{name}.fatbin").read_bytes()
    return _C.CudaImage(driver(), device_idx, data)


def why_unavailable() -> str | None:
    """The reason why no kernel can be launched here; None when it can, on some device."""
    made = manifest()
    try:
        found = driver()
        seen = devices()
    except RuntimeError as error:
        if made is None:
            return f"{BUILT_WITHOUT}; triton serves GPUs"
        return f"{made.needs}; no driver: {error}"
    if found.is_emulation:
        return why_device_lacks(0)
    if made is None:
        return f"{BUILT_WITHOUT}; triton serves GPUs"
    if not seen:
        return f"{made.needs}; the driver sees no GPU"
    reasons = [why_device_lacks(idx) for idx in range(len(seen))]
    return None if None in reasons else f"{made.needs}; {reasons[0]}"


@functools.cache
def why_device_lacks(device_idx: int) -> str | None:
    """The reason why this GPU cannot run the images; None when it can."""
    device, made = devices()[device_idx], manifest()
    major, minor = device["capability"]
    if (major, minor) < (8, 0):
        return f"{device['name']} is sm_{major}{minor}, the kernels need sm_80 or later"
    if driver().is_emulation or made is None:
        return None
    # Machine code runs with any driver of its major version of CUDA, PTX needs one that knows its language.
    is_machine_code = any(runs_on(name, (major, minor)) for name in made.architectures)
    least = (made.cuda[0], 0) if is_machine_code else made.cuda
    offered = (driver().version // 1000, driver().version % 1000 // 10)
    if offered < least:
        return (
            f"{device['name']} needs a driver for CUDA {least[0]}.{least[1]} or later, this one is for "
            f"{offered[0]}.{offered[1]}"
        )
    return None


def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether this architecture's machine code runs on a GPU of this capability.

    ``sm_80`` runs on 8.x from 8.0 on, ``sm_90a`` on 9.0 alone; ``compute_80`` is no machine code.
    Source: CUDA C++ Programming Guide 13.0, "Binary Compatibility" and "Feature Set Compiler Targets".
    """
    if not architecture.startswith("sm_"):
        return False
    number = int(architecture.removeprefix("sm_").rstrip("af"))
    major, minor = divmod(number, 10)
    if architecture[-1] == "a":
        return capability == (major, minor)
    return capability[0] == major and capability[1] >= minor


def describe() -> str:
    """The GPU, the images and the driver, in words; once ``why_unavailable`` has found nothing."""
    found, made = driver(), manifest()
    if found.is_emulation:
        return f"emulated on the host by {env.libcuda()}: correct and very slow"
    device = next(devices()[idx] for idx in range(len(devices())) if why_device_lacks(idx) is None)
    major, minor = device["capability"]
    assert made is not None
    return (
        f"{device['name']} (sm_{major}{minor}); {made.needs}; driver for CUDA "
        f"{found.version // 1000}.{found.version % 1000 // 10}"
    )


@dataclass(frozen=True)
class SmLimits:
    """What a streaming multiprocessor holds. Shared memory includes 1 KiB per block that the system keeps."""

    num_warps: int
    num_blocks: int
    num_registers: int
    shared_bytes: int


SM_LIMITS = {
    "sm_80": SmLimits(num_warps=64, num_blocks=32, num_registers=65536, shared_bytes=164 * 1024),
    "sm_90a": SmLimits(num_warps=64, num_blocks=32, num_registers=65536, shared_bytes=228 * 1024),
}
"""Source: CUDA C++ Programming Guide 13.0, "Technical Specifications per Compute Capability"."""
_WARP_SIZE = 32
_REGISTERS_AT_ONCE = 256
"""A warp's registers are handed out in multiples of this."""
_RESERVED_SHARED_BYTES = 1024


def blocks_per_sm(architecture: str, registers: int, num_threads: int, shared_bytes: int) -> int:
    """How many blocks of a kernel an SM of this architecture holds at once."""
    limits, num_warps = SM_LIMITS[architecture], -(-num_threads // _WARP_SIZE)
    warp_registers = -(-registers * _WARP_SIZE // _REGISTERS_AT_ONCE) * _REGISTERS_AT_ONCE
    return min(
        limits.num_blocks,
        limits.num_warps // num_warps,
        limits.num_registers // warp_registers // num_warps,
        limits.shared_bytes // (shared_bytes + _RESERVED_SHARED_BYTES),
    )


def kernel_lines() -> list[str]:
    """Every compiled kernel and what it takes, a line each, by architecture; one line where there are none."""
    made = manifest()
    if made is None:
        return [BUILT_WITHOUT]
    num_bytes = sum(image.num_bytes for image in made.images.values())
    lines = [
        f"{made.needs}; {num_bytes / 1e6:.1f} MB in {len(made.images)} images",
        f"{'kernel':35} {'for':7} {'registers':>9} {'threads':>7} {'shared bytes':>12} {'blocks/SM':>9} {'spilled':>7}",
    ]
    for kernel in _C.cuda_instances():
        by_architecture = made.images[kernel["image"]].kernels[kernel["name"]]
        for architecture, usage in sorted(by_architecture.items()):
            num_threads, shared_bytes = kernel["num_threads"], kernel["shared_bytes"]
            num_blocks = blocks_per_sm(architecture, usage.registers, num_threads, shared_bytes)
            lines.append(
                f"{kernel['name']:35} {architecture:7} {usage.registers:9} {num_threads:7} {shared_bytes:12} "
                f"{num_blocks:9} {usage.spilled_bytes:7}"
            )
    return lines


def forget() -> None:
    """Forgets what was found, for tests that change the driver."""
    for cached in (manifest, driver, devices, image, why_device_lacks):
        cached.cache_clear()
