"""What the images of the CUDA kernels need, and what their kernels take of an SM."""

from __future__ import annotations

import pytest

from mixattn import _C
from mixattn.ops import cuda_images
from mixattn.ops.cuda_images import (
    BUILT_WITHOUT,
    ImageDescription,
    KernelUsage,
    Manifest,
    blocks_per_sm,
    kernel_lines,
    runs_on,
)


@pytest.mark.parametrize(
    ("architecture", "capability", "runs"),
    [
        ("sm_80", (8, 0), True),
        ("sm_80", (8, 9), True),
        ("sm_86", (8, 0), False),
        ("sm_80", (9, 0), False),
        ("sm_90a", (9, 0), True),
        ("sm_90a", (10, 0), False),
        ("sm_120", (12, 1), True),
        ("compute_80", (9, 0), False),
    ],
)
def test_runs_on_is_binary_compatibility(architecture: str, capability: tuple[int, int], runs: bool) -> None:
    assert runs_on(architecture, capability) is runs


@pytest.mark.parametrize(
    ("architecture", "registers", "num_threads", "shared_bytes", "num_blocks"),
    [
        ("sm_80", 255, 128, 69888, 2),  # 2 x 128 x 256 registers are all there are; 2 x 69.25 KiB of 164
        ("sm_80", 128, 128, 69888, 2),  # shared memory
        ("sm_90a", 128, 128, 69888, 3),
        ("sm_90a", 168, 384, 0, 1),  # 12 warps of 168 x 32 rounded to 5,376: 64,512
        ("sm_80", 32, 128, 0, 16),  # warps
        ("sm_80", 16, 32, 0, 32),  # blocks
        ("sm_80", 33, 128, 0, 12),  # 33 x 32 is 1,056, rounded to 1,280: 51 warps
    ],
)
def test_blocks_per_sm_as_worked_out_by_hand(
    architecture: str, registers: int, num_threads: int, shared_bytes: int, num_blocks: int
) -> None:
    assert blocks_per_sm(architecture, registers, num_threads, shared_bytes) == num_blocks


def test_kernel_lines_show_each_kernel_on_each_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    images: dict[str, ImageDescription] = {}
    for kernel in _C.cuda_instances():
        image = ImageDescription(kernel["image"], ("sm_80", "sm_90a", "compute_80"), 500_000, {})
        usage = {"sm_80": KernelUsage(255, 0, 0), "sm_90a": KernelUsage(255, 8, 16)}
        images.setdefault(kernel["image"], image).kernels[kernel["name"]] = usage
    monkeypatch.setattr(cuda_images, "manifest", lambda: Manifest((13, 0), images))
    first, header, *lines = kernel_lines()
    assert first.startswith("kernels for compute_80, sm_80, sm_90a, made by CUDA 13.0; ")
    assert f"{0.5 * len(images):.1f} MB in {len(images)} images" in first
    assert header.split() == ["kernel", "for", "registers", "threads", "shared", "bytes", "blocks/SM", "spilled"]
    assert len(lines) == 2 * len(_C.cuda_instances())
    assert ["mixattn_sm80_bf16_hd128_plain", "sm_90a", "255", "128", "69888", "2", "16"] in [s.split() for s in lines]


def test_kernel_lines_without_images_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_images, "manifest", lambda: None)
    assert kernel_lines() == [BUILT_WITHOUT]


def test_images_that_were_built_are_small_and_their_kernels_fit_as_planned() -> None:
    made = cuda_images.manifest()
    if made is None:
        pytest.skip("built without CUDA kernels: needs nvcc")
    assert sum(image.num_bytes for image in made.images.values()) < 25e6
    for kernel in _C.cuda_instances():
        for architecture, usage in made.images[kernel["image"]].kernels[kernel["name"]].items():
            assert usage.spilled_bytes == usage.stack_bytes == 0
            assert blocks_per_sm(architecture, usage.registers, kernel["num_threads"], kernel["shared_bytes"]) >= 1
