"""tools/nvcc.py: where nvcc is found, and what is read from ptxas' words."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tools import build_backend, nvcc

LOG = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'one' for 'sm_80'
ptxas info    : Function properties for one
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 211 registers, used 1 barriers, 792 bytes cmem[0]
ptxas info    : Compile time = 263.854 ms
ptxas info    : Compiling entry function 'two' for 'sm_80'
ptxas info    : Function properties for two
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
ptxas info    : Compiling entry function 'one' for 'sm_90a'
ptxas info    : Function properties for one
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 220 registers, used 1 barriers
"""


def test_kernel_usage_is_read_by_kernel_and_architecture() -> None:
    assert nvcc.kernel_usage(LOG) == {
        "one": {
            "sm_80": {"registers": 211, "stack_bytes": 0, "spilled_bytes": 0},
            "sm_90a": {"registers": 220, "stack_bytes": 0, "spilled_bytes": 0},
        },
        "two": {"sm_80": {"registers": 255, "stack_bytes": 16, "spilled_bytes": 20}},
    }


def test_kernel_usage_of_a_log_that_tells_no_registers_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="does not tell what two takes"):
        nvcc.kernel_usage(LOG.replace("Used 255 registers", "Used some"))


def make_nvcc(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "nvcc").write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.2, V13.2.1'\n")
    (folder / "nvcc").chmod(0o755)
    return folder / "nvcc"


def test_find_nvcc_takes_cuda_home_then_path_then_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    assert nvcc.find_nvcc() is None
    packaged = make_nvcc(tmp_path / "site" / "nvidia" / "cu13" / "bin")
    assert nvcc.find_nvcc() == packaged
    on_path = make_nvcc(tmp_path / "bin")
    assert nvcc.find_nvcc() == on_path
    at_home = make_nvcc(tmp_path / "home" / "bin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert nvcc.find_nvcc() == at_home
    assert nvcc.cuda_version(at_home) == "13.2"


def test_images_are_packed_where_nvcc_and_the_drivers_that_take_its_images_can() -> None:
    assert nvcc.packing_flags("13.0") == ["--compress-mode=size"]
    assert nvcc.packing_flags("12.9") == []


def test_install_images_writes_a_manifest_and_removes_what_is_no_image_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler, built, target = make_nvcc(tmp_path / "bin"), tmp_path / "built", tmp_path / "images"
    for folder in (built, target):
        folder.mkdir()
    (built / "sm80_a.fatbin").write_bytes(b"data")
    (built / "sm80_a.fatbin.log").write_text(LOG)
    (target / "sm80_gone.fatbin").write_bytes(b"old")
    monkeypatch.setattr(nvcc, "image_sources", lambda: {"sm80_a": tmp_path / "sm80" / "a.cu"})
    nvcc.install_images(compiler, built, target)
    assert sorted(file.name for file in target.iterdir()) == ["manifest.json", "sm80_a.fatbin"]
    manifest = json.loads((target / "manifest.json").read_text())
    assert manifest["cuda"] == "13.2"
    image = manifest["images"]["sm80_a"]
    assert (image["architectures"], image["num_bytes"]) == (["sm_80", "sm_90a", "compute_80"], 4)
    assert image["kernels"] == nvcc.kernel_usage(LOG)
    before = (target / "sm80_a.fatbin").stat().st_mtime_ns
    nvcc.install_images(compiler, built, target)
    assert (target / "sm80_a.fatbin").stat().st_mtime_ns == before


def test_build_backend_asks_for_the_packages_only_where_nvcc_is_wanted_and_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH", "MIXATTN_BUILD_CUDA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(sys, "path", [])
    assert build_backend._compiler() == ()
    monkeypatch.setenv("MIXATTN_BUILD_CUDA", "1")
    assert build_backend._compiler() == nvcc.PACKAGES
    make_nvcc(tmp_path / "bin")
    assert build_backend._compiler() == ()


def test_gencode_names_the_virtual_architecture_of_each() -> None:
    assert nvcc.gencode(["sm_90a", "compute_80"]) == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_80,code=compute_80",
    ]
