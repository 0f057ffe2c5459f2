"""The tiles that bench/kernels/tune.py has measured to be the best on this GPU, before those of ``choose_tiles``.

They are in a file (``env.tiles_file``), which is read when tiles are first asked for. A choice counts for the GPU, the
version of Triton and the source of the kernel that it was measured with; others are ignored, which the log says once.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mixattn import env
from mixattn.triton_kernels.tiles import TileChoice, TileProblem, why_not

logger = logging.getLogger(__name__)

FORMAT = 2
"""Of the file."""
KERNEL_FILES = ("mixed_attention.py", "_numeric.py", "_pages.py", "_quantized.py", "_softmax.py")


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU. Args: name: the driver's; capability: compute capability, (major, minor)."""

    name: str
    capability: tuple[int, int]


@dataclass(frozen=True)
class TunedChoice:
    """The best tiles of a problem, and what they were measured with.

    Args:
        triton: version of Triton. kernel: ``kernel_hash`` of the source.
        measured_us: by batch, microseconds of these tiles and of ``choose_tiles``'; for people.
    """

    gpu: Gpu
    triton: str
    kernel: str
    problem: TileProblem
    tiles: TileChoice
    measured_us: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def tiles_for(problem: TileProblem, gpu: Gpu) -> TileChoice:
    """The tiles that the kernel runs the problem in on this GPU: the tuned ones, or those of ``choose_tiles``.

    Raises:
        ValueError: the file is malformed; the message names it.
        FileNotFoundError: ``MIXATTN_TILES`` names a file that is not there.
        NotImplementedError: as ``choose_tiles``.
    """
    tuned = _choices_here(gpu).get(problem)
    return problem.choose(gpu.capability) if tuned is None else tuned


@functools.cache
def _choices_here(gpu: Gpu) -> Mapping[TileProblem, TileChoice]:
    """The file's choices for this GPU, this Triton and this kernel, by problem."""
    file, is_asked_for = env.tiles_file()
    if not file.exists():
        if is_asked_for:
            raise FileNotFoundError(f"MIXATTN_TILES names {file}, which is not there; bench.kernels.tune writes it")
        return MappingProxyType({})
    choices = read_choices(file)
    reasons = [_why_ignored(choice, gpu) for choice in choices]
    here = {choice.problem: choice.tiles for choice, why in zip(choices, reasons, strict=True) if why is None}
    ignored = Counter(why for why in reasons if why is not None)
    told = "; ignored: " + ", ".join(f"{count} for {why}" for why, count in sorted(ignored.items())) if ignored else ""
    logger.info("tiles of %s: %d choices for %s%s", file, len(here), gpu.name, told)
    return MappingProxyType(here)


def _why_ignored(choice: TunedChoice, gpu: Gpu) -> str | None:
    if choice.gpu != gpu:
        return "another GPU"
    if choice.triton != triton_version():
        return f"Triton {choice.triton}, this is {triton_version()}"
    if choice.kernel != kernel_hash():
        return "another source of the kernel"
    return None


@functools.cache
def triton_version() -> str:
    """Of the installed package, which is not imported for it."""
    return importlib.metadata.version("triton")


@functools.cache
def kernel_hash() -> str:
    """Of the kernel's source: SHA-256 over ``KERNEL_FILES``."""
    folder = Path(__file__).resolve().parent
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in KERNEL_FILES)).hexdigest()


def read_choices(file: Path) -> list[TunedChoice]:
    """All choices of the file, whatever they were measured with.

    Raises:
        ValueError: it is malformed, or has tiles that no kernel can run; the message names the file and the place.
    """
    place = "the file"
    try:
        content = json.loads(file.read_text())
        if _of(content, "format", int) != FORMAT:
            raise ValueError(f"format must be {FORMAT}, got {content['format']!r}")
        choices = []
        for idx, entry in enumerate(_of(content, "choices", list)):
            place = f"choices[{idx}]"
            choices.append(_choice(entry))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{file} is no file of tiles: {place}: {error}; bench.kernels.tune writes one anew once it is deleted"
        ) from error
    return choices


def write_choices(file: Path, choices: Iterable[TunedChoice]) -> None:
    """Puts the choices in the file, in place of those for the same GPU, Triton, kernel and problem; others stay.

    Raises:
        ValueError: what is there is malformed.
    """
    known = {_key(choice): choice for choice in (read_choices(file) if file.exists() else [])}
    known.update({_key(choice): choice for choice in choices})
    content = {"format": FORMAT, "choices": [asdict(choice) for choice in known.values()]}
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    aside.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(aside, file)  # whoever reads sees the one file or the other


def forget() -> None:
    """Forgets what was read, for whoever has changed the file or the variable."""
    _choices_here.cache_clear()


def _key(choice: TunedChoice) -> tuple[object, ...]:
    return choice.gpu, choice.triton, choice.kernel, choice.problem


def _choice(entry: Any) -> TunedChoice:
    gpu = _of(entry, "gpu", dict)
    capability = _integers(gpu, "capability")
    if len(capability) != 2:
        raise ValueError(f"capability must be [major, minor], got {list(capability)}")
    problem = _problem(_of(entry, "problem", dict))
    tiles = _tiles(_of(entry, "tiles", dict))
    reason = why_not(tiles, problem, (capability[0], capability[1]))
    if reason is not None:
        raise ValueError(f"tiles: {reason}")
    return TunedChoice(
        Gpu(_of(gpu, "name", str), (capability[0], capability[1])),
        _of(entry, "triton", str),
        _of(entry, "kernel", str),
        problem,
        tiles,
        {name: (float(tuned), float(chosen)) for name, (tuned, chosen) in _of(entry, "measured_us", dict).items()},
    )


def _problem(entry: dict[str, Any]) -> TileProblem:
    _check_names(entry, TileProblem)
    element_bytes, stored_bits = _positive(entry, "element_bytes"), _positive(entry, "stored_bits")
    if element_bytes not in (2, 4) or stored_bits not in (4, 8, 16, 32):
        raise ValueError(
            f"element_bytes must be 2 or 4, got {element_bytes}, and stored_bits 4, 8, 16 or 32, got {stored_bits}"
        )
    return TileProblem(
        head_dim=_positive(entry, "head_dim"),
        v_head_dim=_positive(entry, "v_head_dim"),
        element_bytes=element_bytes,
        stored_bits=stored_bits,
        kv_format=None if entry["kv_format"] is None else _of(entry, "kv_format", str),
        has_row_terms=_of(entry, "has_row_terms", bool),
        has_one_kind=_of(entry, "has_one_kind", bool),
    )


def _tiles(entry: dict[str, Any]) -> TileChoice:
    _check_names(entry, TileChoice)
    return TileChoice(
        block_m=_integers(entry, "block_m"),
        block_n=_integers(entry, "block_n"),
        num_stages=_integers(entry, "num_stages"),
        block_d=_integers(entry, "block_d"),
        block_dv=_positive(entry, "block_dv"),
        num_warps=_positive(entry, "num_warps"),
        programs_per_sm=_positive(entry, "programs_per_sm"),
        max_registers=None if entry["max_registers"] is None else _positive(entry, "max_registers"),
    )


def _check_names(entry: dict[str, Any], of: type[TileProblem | TileChoice]) -> None:
    names = [f.name for f in fields(of)]
    if sorted(entry) != sorted(names):
        raise ValueError(f"a {of.__name__} has {', '.join(names)}, got {', '.join(entry) or 'nothing'}")


def _of(entry: Any, name: str, kind: type[Any]) -> Any:
    if not isinstance(entry, dict) or name not in entry:
        raise ValueError(f"{name} is missing")
    value = entry[name]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{name} must be {kind.__name__}, got {value!r}")
    return value


def _positive(entry: Any, name: str) -> int:
    value: int = _of(entry, name, int)
    if value < 1:
        raise ValueError(f"{name} must be >= 1, got {value}")
    return value


def _integers(entry: Any, name: str) -> tuple[int, ...]:
    values = _of(entry, name, list)
    if not all(type(value) is int for value in values):
        raise ValueError(f"{name} must hold integers, got {values!r}")
    return tuple(values)
