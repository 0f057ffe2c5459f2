"""Builds ``mixattn._C`` and the CUDA kernels' images with ninja: per-file flags, only what changed.

Project metadata is in pyproject.toml. ``python setup.py build_ext --inplace`` (``make build``) and an editable install
share one build folder, so that either recompiles only what changed. Where there is no nvcc, the package is built
without the images; MIXATTN_BUILD_CUDA=0 leaves them out, MIXATTN_BUILD_CUDA=1 fails without nvcc.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))

import nvcc  # noqa: E402

MACHINE = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())

# -ffp-contract=off keeps the planner bit-equal with its Python twin and leaves fused multiply-adds to vec.h, where they
# are written out. No -march here: the ISA of a file is its own (below), the rest runs on any CPU of the architecture.
CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
]
# For tests on a CPU without AVX-512: its kernels through SIMDe (Debian's libsimde-dev), correct and slow. Unoptimised,
# because the compiler takes minutes over all that is inlined.
BUILD_SIMDE = os.environ.get("MIXATTN_BUILD_SIMDE") == "1"
AVX512_FLAGS = [
    "-mavx512f",
    "-mavx512bw",
    "-mavx512vl",
    "-mavx512dq",
    "-mavx2",
    "-mfma",
    "-mf16c",
    "-mprefer-vector-width=512",
]
AMX_SOURCE, AVX2_VNNI_SOURCE = "csrc/cpu/kernels_amx.cpp", "csrc/cpu/kernels_avx2_vnni.cpp"
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
AVX512_VNNI_FLAGS = [*AVX512_FLAGS, "-mavx512vnni"]
AVX512_BF16_FLAGS = [*AVX512_VNNI_FLAGS, "-mavx512bf16"]
AMX_FLAGS = [*AVX512_BF16_FLAGS, "-mamx-tile", "-mamx-bf16", "-mamx-int8"]
# Of each architecture, its files alone.
ISA_FLAGS = {
    "x86_64": {
        "csrc/cpu/kernels_avx2.cpp": AVX2_FLAGS,
        AVX2_VNNI_SOURCE: [*AVX2_FLAGS, "-mavxvnni"],
        AMX_SOURCE: AMX_FLAGS,
        "csrc/cpu/kernels_avx512_bf16.cpp": AVX512_BF16_FLAGS,
        "csrc/cpu/kernels_avx512_vnni.cpp": AVX512_VNNI_FLAGS,
        "csrc/cpu/kernels_avx512.cpp": ["-DMIXATTN_SIMDE", "-Wno-psabi", "-O0"] if BUILD_SIMDE else AVX512_FLAGS,
    },
    "aarch64": {
        "csrc/cpu/kernels_neon.cpp": ["-march=armv8.2-a+dotprod"],
        "csrc/cpu/kernels_neon_bf16.cpp": ["-march=armv8.2-a+dotprod+bf16+i8mm"],
    },
}
# For tests on a CPU without an ISA: its kernels over instructions that are emulated, beside the ordinary build in its
# folder; file and flags by what MIXATTN_BUILD_EMULATED_ is followed by. AVX_VNNI's are in AVX512_VNNI, too, in another
# encoding: without -mavxvnni the compiler makes none by itself, which this CPU would not know.
EMULATED = {
    "AMX": (AMX_SOURCE, [*AMX_FLAGS, "-DMIXATTN_EMULATED_AMX"]),
    "AVX_VNNI": (AVX2_VNNI_SOURCE, [*AVX2_FLAGS, "-DMIXATTN_EMULATED_AVX_VNNI"]),
}
BUILD_EMULATED = next((name for name in EMULATED if os.environ.get(f"MIXATTN_BUILD_EMULATED_{name}") == "1"), None)
OTHER_MACHINES = {f for machine, files in ISA_FLAGS.items() if machine != MACHINE for f in files}


def sources() -> list[str]:
    """The C++ files of this architecture, relative to the root, sorted."""
    found = sorted(
        str(p.relative_to(ROOT))
        for folder in ("csrc/cpu", "csrc/cuda", "csrc/bindings")
        for p in (ROOT / folder).glob("*.cpp")
    )
    return [f for f in found if f not in OTHER_MACHINES]


def chosen_nvcc() -> Path | None:
    """The compiler of the CUDA kernels; None where the package is to be built without them."""
    wish = os.environ.get("MIXATTN_BUILD_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"setup.py: MIXATTN_BUILD_CUDA must be 0 or 1, got {wish!r}")
    found = None if wish == "0" else nvcc.find_nvcc()
    if wish == "1" and found is None:
        raise SystemExit(f"setup.py: MIXATTN_BUILD_CUDA=1, and {NO_NVCC}")
    return found


NO_NVCC = "no nvcc is in CUDA_HOME, on PATH or in the package nvidia-cuda-nvcc"


def escape(path: Path) -> str:
    """The path as ninja reads it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def object_file(build_dir: Path, source: str) -> str:
    return escape(build_dir / (source.replace("/", "_") + ".o"))


def ninja_file(build_dir: Path, output: Path, cuda_compiler: Path | None) -> str:
    """The text of build.ninja that makes ``output`` from the sources, and the images beside it."""
    includes = [ROOT / "csrc", pybind11.get_include(), sysconfig.get_paths()["include"]]
    flags = [*CXX_FLAGS, *(f"-I{i}" for i in includes), *os.environ.get("CXXFLAGS", "").split()]
    lines = [
        "ninja_required_version = 1.10",
        f"cxx = {os.environ.get('CXX', 'g++')}",
        f"flags = {' '.join(map(str, flags))}",
        f"ldflags = -shared -ldl -pthread {os.environ.get('LDFLAGS', '')}",
        "rule compile",
        "  command = $cxx -MD -MF $out.d $flags $isa_flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = c++ $in",
        "rule link",
        # Written aside and renamed, so that a process that imports meanwhile never sees half a library.
        "  command = $cxx $in $ldflags -o $out.tmp && mv $out.tmp $out",
        "  description = link $out",
    ]
    objects = []
    isa_flags = ISA_FLAGS.get(MACHINE, {})
    for source in sources():
        objects.append(object_file(build_dir, source))
        lines.append(f"build {objects[-1]}: compile {escape(ROOT / source)}")
        lines.append(f"  isa_flags = {' '.join(isa_flags.get(source, []))}")
    lines.append(f"build {escape(output)}: link {' '.join(objects)}")
    if cuda_compiler is not None:
        lines += nvcc.ninja_lines(cuda_compiler, build_dir, escape)
    return "\n".join(lines) + "\n"


def emulated_file(name: str, build_dir: Path, output: Path) -> str:
    """The text of a file for ninja that makes ``output`` as build.ninja makes the extension, with ``name`` emulated."""
    source, flags = EMULATED[name]
    emulated = object_file(build_dir, f"emulated_{name.lower()}")
    objects = [emulated, *(object_file(build_dir, other) for other in sources() if other != source)]
    lines = [
        "include build.ninja",
        f"build {emulated}: compile {escape(ROOT / source)}",
        f"  isa_flags = {' '.join(flags)}",
        f"build {escape(output)}: link {' '.join(objects)}",
    ]
    return "\n".join(lines) + "\n"


class NinjaBuildExt(build_ext):
    """Runs ninja in ``build/cpp-<python>-<platform>``, whatever temporary folder the front end asked for."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        variant = "-simde" if BUILD_SIMDE else ""
        build_dir = ROOT / "build" / f"cpp-{sys.implementation.cache_tag}-{sysconfig.get_platform()}{variant}"
        build_dir.mkdir(parents=True, exist_ok=True)
        built = build_dir / output.name
        cuda_compiler = chosen_nvcc()
        text = ninja_file(build_dir, built, cuda_compiler)
        file = build_dir / "build.ninja"
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
            if cuda_compiler is None:
                reason = "MIXATTN_BUILD_CUDA=0" if os.environ.get("MIXATTN_BUILD_CUDA") == "0" else NO_NVCC
                print(f"mixattn is built without CUDA kernels: {reason}. On GPUs its Triton kernels serve.", flush=True)
        try:
            from ninja import BIN_DIR

            ninja = str(Path(BIN_DIR) / "ninja")
        except ImportError:
            ninja = "ninja"
        command = [ninja, "-C", str(build_dir)]
        if BUILD_EMULATED is not None:
            built = build_dir / f"emulated_{BUILD_EMULATED.lower()}" / output.name
            file = build_dir / f"emulated_{BUILD_EMULATED.lower()}.ninja"
            file.write_text(emulated_file(BUILD_EMULATED, build_dir, built))
            command += ["-f", file.name, str(built)]
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
        subprocess.run(command, check=True)
        if not output.exists() or output.read_bytes() != built.read_bytes():
            aside = output.with_suffix(".tmp")
            self.copy_file(str(built), str(aside))
            os.replace(aside, output)
        self.cuda_compiler, self.build_dir = cuda_compiler, build_dir
        self.install_images(output.parent)

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        self.install_images(ROOT / "mixattn")

    def install_images(self, package: Path) -> None:
        """Puts the CUDA kernels' images beside the extension."""
        if BUILD_EMULATED is not None:
            return  # they are none of its business
        images = package / "cuda_images"
        if self.cuda_compiler is not None:
            nvcc.install_images(self.cuda_compiler, self.build_dir, images)
        elif images.exists():
            shutil.rmtree(images)  # of sources that may have changed since


setup(
    ext_modules=[Extension("mixattn._C", sources=sources())],
    cmdclass={"build_ext": NinjaBuildExt},
)
