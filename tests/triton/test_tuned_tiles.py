"""Tuned tiles: the file is read, held to this GPU, Triton and kernel, refused when malformed, and what calls run in."""

from __future__ import annotations

import itertools
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mixattn
from mixattn import env
from mixattn.ops import attention as attention_module
from mixattn.triton_kernels import mixed_attention as triton_attention
from mixattn.triton_kernels import tuned_tiles
from mixattn.triton_kernels.tiles import SHARED_BYTES, TileChoice, TileProblem, why_not
from mixattn.triton_kernels.tuned_tiles import Gpu, TunedChoice, read_choices, tiles_for, write_choices
from tests.cases import AttentionCase, assert_attention_close, make_inputs

GPU = Gpu("NVIDIA H100 80GB HBM3", (9, 0))
PROBLEM = TileProblem(128, 128, 2, 16)
TILES = TileChoice((64, 16), (64, 64), (2, 2), (128,), 128, 4, 2, None)


def tuned(**changes: Any) -> TunedChoice:
    made = TunedChoice(
        GPU, tuned_tiles.triton_version(), tuned_tiles.kernel_hash(), PROBLEM, TILES, {"decodes": (1.0, 2.0)}
    )
    return replace(made, **changes)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What MIXATTN_TILES names; not there yet."""
    path = tmp_path / "folder" / "tiles.json"
    monkeypatch.setenv("MIXATTN_TILES", str(path))
    tuned_tiles.forget()
    yield path
    tuned_tiles.forget()


def test_choices_come_back_from_the_file_as_they_were_written(file: Path) -> None:
    others = [
        tuned(problem=replace(PROBLEM, head_dim=192), tiles=replace(TILES, block_d=(128, 64))), tuned(triton="3.5.0"),
    ]  # fmt: skip
    write_choices(file, [tuned(), *others])
    newer = tuned(tiles=replace(TILES, block_n=(32, 64)))
    write_choices(file, [newer])
    assert read_choices(file) == [newer, *others]
    assert list(file.parent.iterdir()) == [file]


def test_tuned_tiles_are_those_of_this_gpu_triton_and_kernel(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    ignored = [
        tuned(gpu=Gpu("another", (9, 0))), tuned(gpu=Gpu(GPU.name, (8, 0))), tuned(triton="3.5.0"), tuned(kernel="0"),
    ]  # fmt: skip
    write_choices(file, ignored)
    assert tiles_for(PROBLEM, GPU) == PROBLEM.choose((9, 0)) != TILES
    tuned_tiles.forget()
    write_choices(file, [tuned()])
    caplog.clear()
    with caplog.at_level(logging.INFO, logger=tuned_tiles.__name__):
        assert [tiles_for(PROBLEM, GPU) for _ in range(3)] == [TILES] * 3
        assert tiles_for(replace(PROBLEM, has_row_terms=True), GPU).block_m == (128, 16)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == (
        f"tiles of {file}: 1 choices for {GPU.name}; ignored: 1 for Triton 3.5.0, this is "
        f"{tuned_tiles.triton_version()}, 2 for another GPU, 1 for another source of the kernel"
    )


def test_without_a_file_in_the_cache_directory_tiles_are_those_of_choose_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MIXATTN_TILES", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuned_tiles.forget()
    assert env.tiles_file() == (tmp_path / "mixattn" / "tiles.json", False)
    assert tiles_for(PROBLEM, GPU) == PROBLEM.choose((9, 0))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert env.tiles_file() == (Path.home() / ".cache" / "mixattn" / "tiles.json", False)
    tuned_tiles.forget()


def test_named_file_that_is_missing_is_an_error(file: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"MIXATTN_TILES names {file}, which is not there"):
        tiles_for(PROBLEM, GPU)


def changed(path: str, value: Any) -> dict[str, Any]:
    """The file's content with one thing in it changed; a value of ... takes it out."""
    content: Any = json.loads(json.dumps({"format": 2, "choices": [asdict(tuned())]}))
    *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    at = content
    for part in parents:
        at = at[part]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return dict(content)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", 1, "the file: format must be 2, got 1"),
        ("choices", {}, "the file: choices must be list"),
        ("choices/0/problem", ..., r"choices\[0\]: problem is missing"),
        ("choices/0/problem/head_dim", "128", "head_dim must be int, got '128'"),
        ("choices/0/problem/element_bytes", 1, "element_bytes must be 2 or 4, got 1"),
        ("choices/0/problem/other", 1, "a TileProblem has head_dim"),
        ("choices/0/tiles/num_warps", ..., "a TileChoice has block_m"),
        ("choices/0/tiles/block_m", [16, 64], "tiles: block_m must be descending powers of two"),
        ("choices/0/tiles/block_m", [64.0, 16], "block_m must hold integers"),
        ("choices/0/tiles/block_n", [64, 96], "tiles: block_n must be powers of two"),
        ("choices/0/problem/v_head_dim", ..., "a TileProblem has head_dim, v_head_dim"),
        ("choices/0/tiles/block_d", 128, "block_d must be list, got 128"),
        ("choices/0/tiles/block_d", [64], r"tiles: block_d must be \(128,\) and block_dv 128, got \(64,\) and 128"),
        ("choices/0/tiles/block_dv", 64, r"tiles: block_d must be \(128,\) and block_dv 128, got \(128,\) and 64"),
        ("choices/0/tiles/programs_per_sm", 3, "tiles: 3 programs of 128 threads with 255 registers do not fit an SM"),
        ("choices/0/tiles/num_stages", [4, 4], "shared memory do not fit"),
        ("choices/0/gpu/capability", [9], "capability must be"),
        ("choices/0/measured_us", {"decodes": 1}, "choices"),
    ],
)
def test_malformed_file_is_refused_by_its_name_and_place(file: Path, path: str, value: Any, message: str) -> None:
    file.parent.mkdir()
    file.write_text(json.dumps(changed(path, value)))
    for _ in range(2):  # not only at the first call
        with pytest.raises(ValueError, match=message) as caught:
            tiles_for(PROBLEM, GPU)
        assert str(caught.value).startswith(f"{file} is no file of tiles: ")
    with pytest.raises(ValueError, match=message):
        write_choices(file, [tuned()])


def test_file_that_is_no_json_is_refused(file: Path) -> None:
    file.parent.mkdir()
    file.write_text("{")
    with pytest.raises(ValueError, match=f"^{file} is no file of tiles: the file: Expecting"):
        tiles_for(PROBLEM, GPU)


@pytest.mark.parametrize("capability", [*SHARED_BYTES, (11, 0)])
def test_choose_tiles_are_such_as_a_file_may_hold(capability: tuple[int, int]) -> None:
    forms = ((2, 16, None), (4, 32, None), (2, 8, "int8"), (2, 4, "int4"))
    heads = [*((size, size) for size in range(8, 257, 8)), *itertools.product((8, 64, 96, 128, 192, 256), repeat=2)]
    for head, form, terms, one in itertools.product(heads, forms, (False, True), (False, True)):
        problem = TileProblem(*head, *form, terms, one)
        assert why_not(problem.choose(capability), problem, capability) is None


def test_call_runs_in_tuned_tiles_and_plans_for_their_programs(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not env.triton_interpret():
        pytest.skip("observes the launch in the interpreter")
    case = AttentionCase("tuned", (1, 40), (70, 60), num_q_heads=4, head_dim=64)
    tiles = TileChoice((32, 16), (32, 16), (3, 2), (64,), 64, 4, 3, 160)
    interpreter = triton_attention.gpu(torch.device("cpu"))
    write_choices(file, [tuned(gpu=interpreter, problem=TileProblem(64, 64, 2, 16), tiles=tiles)])
    launched: list[Any] = []
    kernel = triton_attention.mixed_attention_kernel

    class Watched:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *a, **k: launched.append((grid, k)) or kernel[grid](*a, **k)

    monkeypatch.setattr(triton_attention, "mixed_attention_kernel", Watched())
    plans = []
    make_plan = attention_module.make_plan
    monkeypatch.setattr(attention_module, "make_plan", lambda *a, **k: plans.append(make_plan(*a, **k)) or plans[-1])
    inputs = make_inputs(case, torch.bfloat16)
    out, lse = mixattn.attention(
        inputs.q, inputs.k_cache, inputs.v_cache, **inputs.index_tensors, **case.options, return_lse=True,
        backend="triton",
    )  # fmt: skip
    assert_attention_close(case, inputs, out, lse)
    ((grid, constants),) = launched
    assert grid == (3,) and plans[0].hardware.num_workers == 3
    assert (constants["BLOCK_M"], constants["BLOCK_N"], constants["NUM_STAGES"]) == ((32, 16), (32, 16), (3, 2))
    assert (constants["num_warps"], constants["maxnreg"]) == (4, 160)


def test_device_hardware_has_the_tuned_programs(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_choices(
        file, [tuned(tiles=replace(TILES, block_n=(32, 32), num_stages=(2, 2), programs_per_sm=3, max_registers=160))]
    )
    properties = SimpleNamespace(name=GPU.name, major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(attention_module, "first_backend", lambda device_type: "triton")
    assert mixattn.device_hardware(torch.device("cuda", 0)).num_workers == 3 * 132
    properties.name = "another"
    assert mixattn.device_hardware(torch.device("cuda", 0)).num_workers == 2 * 132


def test_tuned_tiles_need_neither_torch_nor_triton() -> None:
    script = (
        "import sys; sys.modules['torch'] = sys.modules['triton'] = None\n"
        "from mixattn.triton_kernels.tuned_tiles import Gpu, TileProblem, tiles_for\n"
        "tiles_for(TileProblem(128, 128, 2, 16), Gpu('any', (9, 0)))"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
