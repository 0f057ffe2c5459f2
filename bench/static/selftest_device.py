"""The primitives of csrc/cuda/prim.cuh and prim_sm90.cuh on a GPU, against their emulation on random data.

    python -m bench.static.selftest_device               on the first GPU
    python -m bench.static.selftest_device --device 1

The kernels are those of tests/emu/primitives.cuh and, on sm_90, primitives_sm90.cuh, compiled by nvcc and launched by
mixattn's own loader. The tests run them by the emulation only; here both sides of a primitive, its PTX and its
emulation, must say the same. Takes seconds.

Exit status: 0 all agree, 1 some do not, 77 nothing to test with (no driver, no GPU of sm_80 or later, no nvcc).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from mixattn import _C
from mixattn.ops import cuda_images
from tests.emu.build import ROOT, build
from tools.nvcc import find_nvcc

SKIPPED = 77
"""As automake's tests exit when they cannot run."""
FOLDER = ROOT / "tests" / "emu"
Words = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Primitive:
    """One kernel of tests/emu/primitive_entries.h, by name, and how it is run and held against its emulation.

    Args:
        make_input: random words that mean something to it.
        num_out: words that it writes.
        shared_bytes: of a block.
        tolerance: relative to max(1, |value|), of words that are float32; None: every bit must agree.
        boxed: sizes, strides and box of the tensor of 16-bit elements that begins ``BOXED_AT`` words behind the input
            and whose map the kernel also takes; the innermost dimension first, strides of the others.
    """

    name: str
    make_input: Callable[[np.random.Generator], npt.ArrayLike]
    num_out: int
    num_blocks: int = 1
    num_threads: int = 32
    shared_bytes: int = 4096
    tolerance: float | None = None
    boxed: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None = None


BOXED_AT = 16
"""Before it are the coordinates of two boxes."""


def words(*shape: int) -> Callable[[np.random.Generator], Words]:
    """A maker of words of this shape, any bits."""
    return lambda rng: rng.integers(0, 2**32, shape, np.uint32)


def floats(*shape: int) -> Callable[[np.random.Generator], Words]:
    """A maker of standard normal float32."""
    return lambda rng: rng.standard_normal(shape).astype(np.float32).view(np.uint32)


def fragments(dtype: torch.dtype) -> Callable[[np.random.Generator], Words]:
    """A maker of [lane][a0 a1 a2 a3 b0 b1 d0 d1 d2 d3] of standard normal elements: a and b in pairs of this dtype."""

    def make(rng: np.random.Generator) -> Words:
        halves = torch.from_numpy(rng.standard_normal((32, 12))).to(dtype).view(torch.int16).numpy()
        sums = rng.standard_normal((32, 4)).astype(np.float32)
        return np.concatenate([np.ascontiguousarray(halves).view(np.uint32), sums.view(np.uint32)], 1)

    return make


def shuffles(rng: np.random.Generator) -> Words:
    """[lane][source lane, low word, high word]."""
    return np.concatenate([rng.integers(0, 32, (32, 1), np.uint32), words(32, 2)(rng)], 1)


def copies(rng: np.random.Generator) -> Words:
    """[lane][is_valid, 3 unused, 4 words]."""
    made = words(32, 8)(rng)
    made[:, 0] = rng.integers(0, 2, 32)
    return made


def arguments(rng: np.random.Generator) -> Words:
    """Of exp2, log2 and 1 / x: from 2^-20 to 2^6, of both signs, and the ends."""
    x = (np.exp2(rng.uniform(-20, 6, 32)) * rng.choice([-1.0, 1.0], 32)).astype(np.float32)
    x[:5] = 0.0, 1.0, np.inf, -np.inf, -126.5
    return x.view(np.uint32)


def pack_pairs(rng: np.random.Generator, dtype: torch.dtype) -> Words:
    """[lane], two standard normal elements of this dtype each: no NaN, whose bits the ISA leaves open."""
    halves = torch.from_numpy(rng.standard_normal(64)).to(dtype).view(torch.int16).numpy()
    return np.ascontiguousarray(halves).view(np.uint32)


MMA_TOLERANCE = 2.0**-14
"""16 products of standard normal factors, added in an order and with a rounding that the ISA leaves open."""
FUNCTION_TOLERANCE = 2.0**-21
"""Twice the bound of csrc/cuda/prim.cuh: either side may be off."""
PRIMITIVES = [
    Primitive("ldmatrix", words(128), 128),
    Primitive("ldmatrix_trans", words(128), 128),
    Primitive("mma_f16", fragments(torch.float16), 128, tolerance=MMA_TOLERANCE),
    Primitive("mma_bf16", fragments(torch.bfloat16), 128, tolerance=MMA_TOLERANCE),
    Primitive("shuffle_xor", lambda rng: [rng.integers(1, 32), *floats(32)(rng)], 32),
    Primitive("shuffle_idx", shuffles, 64),
    Primitive("any_lane", lambda rng: rng.integers(0, 40, 32) > 38, 32),
    Primitive("copy", copies, 128),
    Primitive("neighbour_sync_threads", words(64), 64, num_threads=64),
    Primitive("neighbour_bar_sync", words(64), 64, num_threads=64),
    Primitive("arrive", words(32), 32, num_threads=64),
    Primitive("lanes", words(32), 32),
    Primitive("message", lambda rng: np.zeros(4 + 128), 128, num_blocks=2, num_threads=64),
    Primitive("store_widths", floats(32), 128),
    Primitive("functions", arguments, 96, tolerance=FUNCTION_TOLERANCE),
    Primitive("pack_f16", floats(64), 32),
    Primitive("pack_bf16", floats(64), 32),
    Primitive("block_size", words(1), 96, num_threads=96),
    Primitive("move_vectors", words(32, 4), 256),
    Primitive("unpack_f16", lambda rng: pack_pairs(rng, torch.float16), 64),
    Primitive("unpack_bf16", lambda rng: pack_pairs(rng, torch.bfloat16), 64),
    Primitive("rounded", floats(32, 4), 96),
    Primitive("shared_vectors", words(32, 4), 128),
    Primitive("permute_bytes", words(32, 3), 32),
    Primitive("fma_pairs", lambda rng: np.stack([pack_pairs(rng, torch.float16)] * 3, 1), 32),
]


MATRIX_BYTES = 48 << 10


def halves(dtype: torch.dtype, num_words: int) -> Callable[[np.random.Generator], Words]:
    """A maker of words of two standard normal elements each."""

    def make(rng: np.random.Generator) -> Words:
        elements = torch.from_numpy(rng.standard_normal(2 * num_words)).to(dtype).view(torch.int16).numpy()
        return np.ascontiguousarray(elements).view(np.uint32)

    return make


def product(name: str, num_columns: int, num_words: int) -> Primitive:
    """A product of a warpgroup of this element, from matrices as they lie in shared memory, fragments before them."""
    dtype = torch.bfloat16 if name.endswith("bf16") else torch.float16
    return Primitive(
        name,
        halves(dtype, num_words),
        64 * num_columns,
        num_threads=128,
        shared_bytes=MATRIX_BYTES,
        tolerance=MMA_TOLERANCE,
    )


def boxes(name: str, box_rows: int) -> Primitive:
    """Two boxes of a tensor of rows of 72 in 80 elements, some of them beside it; strides do not rise."""
    sizes, strides = (72, 3, 70, 4), (71 * 80, 80, 3 * 71 * 80)

    def make(rng: np.random.Generator) -> Words:
        head = rng.integers((0, -1, -20, -1), (2, 4, 80, 5), (BOXED_AT // 4, 4))
        head[:, 0] *= 64
        return np.concatenate([head.astype(np.int32).view(np.uint32).ravel(), words(sizes[3] * strides[2] // 2)(rng)])

    return Primitive(
        name,
        make,
        2 * 32 * box_rows,
        num_threads=128,
        shared_bytes=1024 + 128 * box_rows,
        boxed=(sizes, strides, (64, 1, box_rows, 1)),
    )


SM90_PRIMITIVES = [
    product("wgmma_64_f16", 64, (64 + 64) * 32),
    product("wgmma_128_bf16", 128, (64 + 128) * 32),
    product("wgmma_registers_96_f16", 96, 128 * 4 + 2 * 128 * 32),
    product("wgmma_registers_128_bf16", 128, 128 * 4 + 2 * 128 * 32),
    Primitive("mbarrier", words(64), 64, num_threads=64),
    boxes("box_16", 16),
    boxes("box_64", 64),
]
"""Those that Hopper adds: on a GPU of compute capability 9.0."""
HOPPER = (9, 0)


def primitives_of(capability: tuple[int, int]) -> list[Primitive]:
    """Those that a GPU of this capability has."""
    return PRIMITIVES + (SM90_PRIMITIVES if capability == HOPPER else [])


def difference(primitive: Primitive, device: Words, emulated: Words) -> str | None:
    """Where and how the device's words differ from the emulation's; None where they agree."""
    if primitive.tolerance is None:
        is_equal = device == emulated
    else:
        a, b = (side.view(np.float32).astype(np.float64) for side in (device, emulated))
        with np.errstate(invalid="ignore"):
            is_close = np.abs(a - b) <= primitive.tolerance * np.maximum(1.0, np.abs(b))
        is_equal = is_close | (a == b) | (np.isnan(a) & np.isnan(b))
    if is_equal.all():
        return None
    at = int(np.flatnonzero(~is_equal)[0])
    shown = [
        f"{side[at]:#010x}" if primitive.tolerance is None else f"{side.view(np.float32)[at]:g}"
        for side in (device, emulated)
    ]
    return f"{(~is_equal).sum()} of {is_equal.size} words differ, word {at} is {shown[0]}, emulated {shown[1]}"


def run_on_device(image: _C.CudaImage, device: torch.device, primitive: Primitive, inputs: Words) -> Words:
    """What the kernel writes; unwritten words are all ones."""
    on_device = torch.from_numpy(inputs.view(np.int32)).to(device, copy=True)
    out = torch.full((primitive.num_out,), -1, dtype=torch.int32, device=device)
    image.launch_pointers(
        kernel=f"primitive_{primitive.name}",
        num_blocks=primitive.num_blocks,
        num_threads=primitive.num_threads,
        shared_bytes=primitive.shared_bytes,
        pointers=[on_device.data_ptr(), out.data_ptr()],
        boxed=None if primitive.boxed is None else (on_device.data_ptr() + 4 * BOXED_AT, *primitive.boxed),
        stream=torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0,
    )
    return out.cpu().numpy().view(np.uint32)


def run_emulated(primitive: Primitive, inputs: Words, seed: int) -> Words:
    """The same, by the emulation."""
    out = np.full(primitive.num_out, 2**32 - 1, np.uint32)
    module = build("emulated_primitives", [FOLDER / "primitives.cpp"], [FOLDER])
    copy = aligned(inputs)
    if primitive.boxed is None:
        module.run(
            primitive.name, copy, out, primitive.num_blocks, primitive.num_threads, seed, primitive.shared_bytes
        )  # fmt: skip
    else:
        sizes, strides, box = primitive.boxed
        stride_bytes = [2 * stride for stride in strides]
        module.run_boxed(
            primitive.name, copy, out, sizes, stride_bytes, box, primitive.num_threads, seed, primitive.shared_bytes
        )
    return out


def aligned(values: npt.ArrayLike) -> Words:
    """A copy, flat, that starts at a multiple of 16 bytes."""
    flat = np.asarray(values).astype(np.uint32).ravel()
    buffer = np.zeros(flat.size + 4, np.uint32)
    begin = -(buffer.ctypes.data // 4) % 4
    buffer[begin : begin + flat.size] = flat
    return buffer[begin : begin + flat.size]


def compile_primitives(nvcc: Path, capability: tuple[int, int]) -> bytes:
    """The fatbin of the kernels for GPUs of this capability.

    Raises:
        RuntimeError: nvcc does not compile them; the message is its own.
    """
    source = "primitives_sm90.cu" if capability == HOPPER else "primitives.cu"
    architecture = f"sm_{capability[0]}{capability[1]}" + "a" * (capability >= (9, 0))
    with tempfile.TemporaryDirectory() as folder:
        fatbin = Path(folder) / "primitives.fatbin"
        command = [nvcc, "-std=c++17", "-O3", f"-arch={architecture}", "-fatbin", f"-I{ROOT / 'csrc'}", f"-I{FOLDER}"]
        result = subprocess.run([*command, "-o", fatbin, FOLDER / source], capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise RuntimeError(result.stderr)
        return fatbin.read_bytes()


def load(device_idx: int) -> tuple[_C.CudaImage, torch.device] | str:
    """The kernels on the device, and where its tensors are; or why there is nothing to test with."""
    try:
        driver, devices = cuda_images.driver(), cuda_images.devices()
    except RuntimeError as error:
        return f"no driver: {error}"
    if device_idx >= len(devices):
        return f"the driver sees {len(devices)} GPUs, --device is {device_idx}"
    reason = cuda_images.why_device_lacks(device_idx)
    if reason is not None:
        return reason
    if driver.is_emulation:
        return _C.CudaImage(driver, device_idx, cuda_images.EMULATED_IMAGE), torch.device("cpu")
    nvcc = find_nvcc()
    if nvcc is None:
        return "no nvcc is in CUDA_HOME, on PATH or in the package nvidia-cuda-nvcc"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    image = compile_primitives(nvcc, devices[device_idx]["capability"])
    return _C.CudaImage(driver, device_idx, image), torch.device("cuda", device_idx)


def main() -> int:
    """Prints a line per primitive; returns the exit status."""
    parser = argparse.ArgumentParser(description="The primitives of prim.cuh on a GPU, against their emulation.")
    parser.add_argument("--device", type=int, default=0, help="the GPU (%(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="random inputs of each primitive (%(default)s)")
    options = parser.parse_args()
    loaded = load(options.device)
    if isinstance(loaded, str):
        print(f"not run: {loaded}")
        return SKIPPED
    image, device = loaded
    print(f"{cuda_images.devices()[options.device]['name']}: {options.rounds} random inputs of each primitive")
    num_wrong = 0
    primitives = primitives_of(cuda_images.devices()[options.device]["capability"])
    for primitive in primitives:
        rng = np.random.default_rng(0)
        found = None
        for seed in range(options.rounds):
            inputs = aligned(primitive.make_input(rng))
            on_device = run_on_device(image, device, primitive, inputs)
            found = found or difference(primitive, on_device, run_emulated(primitive, inputs, seed))
        num_wrong += found is not None
        print(f"  {primitive.name:24} {found or 'agrees'}")
    print("all agree" if num_wrong == 0 else f"{num_wrong} of {len(primitives)} differ")
    return 1 if num_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
