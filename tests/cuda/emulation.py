"""The driver that runs CUDA kernels on the host: a library in place of libcuda, and what tests ask of it besides."""

from __future__ import annotations

import contextlib
import ctypes
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mixattn import _C
from tests.emu.build import ROOT, build_library

FOLDER = ROOT / "tests" / "cuda"
NUM_SMS = 3
"""Blocks that are resident at once: enough that splits of one row are finished by different ones, in any order."""
IMAGE = b"emulated"
"""Stands for every image: the library has the kernels of all."""


class Emulation:
    """The emulated driver. Launches run at once, on one thread; its one device is the host."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self._library.mixattn_emulation_configure.argtypes = [ctypes.c_int] * 3 + [ctypes.c_uint64, ctypes.c_int]
        self._library.mixattn_emulation_counts.restype = ctypes.c_char_p
        self._library.mixattn_emulation_replay.restype = ctypes.c_char_p
        self._library.mixattn_emulation_record.argtypes = [ctypes.c_char_p, ctypes.c_int] + 2 * [
            ctypes.POINTER(ctypes.c_uint64)
        ]

    def configure(
        self,
        *,
        driver_version: int = 13000,
        capability: int = 80,
        num_sms: int = NUM_SMS,
        seed: int = 0,
        fault: int = 0,
    ) -> None:
        """What drivers and images that are opened from now on find, and how launches from now on run.

        Args:
            capability: 10 major + minor.
            seed: of the schedule; ``seed % 3`` is its kind (csrc/emu/emu.h).
            fault: of tests/cuda/faults.py, in a library that was built with them; 0 for none.
        """
        self._library.mixattn_emulation_configure(driver_version, capability, num_sms, seed, fault)

    def image(self, **options: int) -> _C.CudaImage:
        """The kernels, on a device as ``configure`` describes it."""
        self.configure(**options)
        return _C.CudaImage(_C.CudaDriver(str(self.path)), 0, IMAGE)

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """Launches in here go into a graph, in the place of the last one, and do not run."""
        self._library.mixattn_emulation_begin_capture()
        try:
            yield
        finally:
            self._library.mixattn_emulation_end_capture()

    def replay(self) -> None:
        """Runs the graph's launches: with their arguments as captured, over what memory holds now."""
        report = self._library.mixattn_emulation_replay()
        assert report is None, report.decode()

    def record(self, path: Path, tensors: Sequence[Tensor]) -> None:
        """Writes the next launch to a file, for replay.cpp; ``tensors`` are all that it reads or writes."""
        spans = [
            (tensor.data_ptr(), tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.element_size())
            for tensor in tensors
        ]
        words = ctypes.c_uint64 * len(spans)
        self._library.mixattn_emulation_record(
            bytes(path), len(spans), words(*(begin for begin, _ in spans)), words(*(size for _, size in spans))
        )

    def counts(self) -> dict[str, Any]:
        """What emu::Stats counted in the last launch."""
        counts: dict[str, Any] = json.loads(self._library.mixattn_emulation_counts())
        return counts


def build_emulation(name: str = "emulated_driver", includes: Sequence[Path] = ()) -> Emulation:
    """The library, with the kernels of csrc/cuda or those that ``includes`` have in their place."""
    sources = [FOLDER / f"emulated_{part}.cpp" for part in ("driver", "attention", "plan", "append_kv", "merge_states")]
    return Emulation(build_library(name, sources, [*includes, FOLDER]))
