"""How many pages of KV a machine gets, and the tensors that hold them."""

from __future__ import annotations

import logging
from collections import deque
from pathlib import Path

import torch
from torch import Tensor

from mixattn.config import CacheConfig, ModelConfig
from mixattn.ops.kv_dtypes import QUANTIZED, KvCache

logger = logging.getLogger(__name__)

_KV_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "int4": torch.uint8,
}
"""``config.KV_CACHE_DTYPES``, apart from ``auto``."""
_SCALE_BYTES = 4
_DEFAULT_SHARE_OF_FREE = 0.4
"""The rest is for the weights' page cache, activations and the user's other programs."""
_DEFAULT_MAX_BYTES = 4 << 30
_HUGE_PAGE_BYTES, _SYSTEM_PAGE_BYTES = 2 << 20, 4096
_ROWS_PER_PIECE = 64
"""Of a step, for one huge page of KV to be taken ahead: 2.5 ms beside some 40. 64 rows of SmolLM2 fill 0.7 of one."""


def kv_dtype(name: str, model_dtype: torch.dtype) -> torch.dtype:
    """The dtype of the cache tensors that ``CacheConfig.kv_cache_dtype`` names."""
    return model_dtype if name == "auto" else _KV_DTYPES[name]


def page_bytes(model: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
    """Bytes of K and V of a page over all layers, scales included."""
    row_bytes = _stored_dim(model, dtype) * dtype.itemsize + (_SCALE_BYTES if dtype in QUANTIZED else 0)
    return page_size * model.kv_bytes_per_token(row_bytes)


def _stored_dim(model: ModelConfig, dtype: torch.dtype) -> int:
    """Elements of a cache tensor per row of a head; of int4, a uint8 holds two."""
    return model.head_dim // 2 if dtype == torch.uint8 else model.head_dim


def num_pages(
    cache: CacheConfig, model: ModelConfig, dtype: torch.dtype, max_model_len: int, max_num_seqs: int, free_bytes: int
) -> int:
    """The pages of the pool: as configured, or what memory allows and the running requests can use.

    Args:
        dtype: of the cache tensors.
        free_bytes: memory that can be had; counts when neither pages nor bytes are configured.
    Raises:
        ValueError: the memory does not hold a page.
    """
    if cache.num_pages is not None:
        return cache.num_pages
    bytes_each = page_bytes(model, cache.page_size, dtype)
    if cache.kv_cache_memory_bytes is not None:
        budget_bytes = cache.kv_cache_memory_bytes
    else:
        budget_bytes = min(int(_DEFAULT_SHARE_OF_FREE * free_bytes), _DEFAULT_MAX_BYTES)
    fitting = budget_bytes // bytes_each
    if fitting < 1:
        raise ValueError(
            f"kv_cache_memory_bytes must be >= {bytes_each}, a page of {cache.page_size} tokens, got {budget_bytes}"
        )
    usable = max_num_seqs * -(-max_model_len // cache.page_size)
    return min(fitting, usable)


def allocate(model: ModelConfig, pages: int, page_size: int, dtype: torch.dtype, device: torch.device) -> list[KvCache]:
    """The caches of each layer. They are not filled: no key is read before it is written."""
    rows = (pages, page_size, model.num_kv_heads)

    def rows_of(*row: int, dtype: torch.dtype) -> Tensor:
        return torch.empty((*rows, *row), dtype=dtype, device=device)

    def layer() -> KvCache:
        k_cache, v_cache = (rows_of(_stored_dim(model, dtype), dtype=dtype) for _ in range(2))
        if dtype not in QUANTIZED:
            return KvCache(k_cache, v_cache)
        return KvCache(k_cache, v_cache, rows_of(dtype=torch.float32), rows_of(dtype=torch.float32))

    try:
        return [layer() for _ in range(model.num_layers)]
    except RuntimeError as error:
        total_bytes = pages * page_bytes(model, page_size, dtype)
        raise ValueError(
            f"num_pages ({pages}) of {page_size} tokens need {total_bytes / 2**30:.1f} GiB of memory, "
            f"which {device} does not have"
        ) from error


class Prefault:
    """Takes memory for KV pages from the system ahead of their first use, a little before each step.

    The system clears memory when it is first written to, in huge pages of 2 MiB where it can: 2.5 ms each in a virtual
    Zen 3 (2026-11-30). A decode whose next KV page lies behind those of a prompt that was just admitted is the first
    in many layers' at once: 17 of 60 in SmolLM2, 43 ms in a step of 18. So the first of each tensor are written to at
    once, and the others one after the other, while the KV pages that lie before them come into use. What they hold
    stays.

    Args:
        kv: the caches of each layer, on the CPU, all with the same number of pages.
    """

    def __init__(self, kv: list[KvCache]) -> None:
        pieces: dict[int, list[tuple[int, Tensor]]] = {}  # by the first KV page that they hold a part of
        for tensor in (tensor for cache in kv for tensor in cache if tensor is not None):
            elements = tensor.view(torch.uint8).view(-1)
            page_bytes = len(elements) // len(tensor)
            for begin in range(0, len(elements), _HUGE_PAGE_BYTES):
                piece = elements[begin : begin + _HUGE_PAGE_BYTES : _SYSTEM_PAGE_BYTES]
                pieces.setdefault(begin // page_bytes, []).append((_HUGE_PAGE_BYTES // page_bytes, piece))
        self._due = deque(  # (the KV page whose use makes it due, what is to be written to), in that order
            sorted(
                (
                    (first_page - 1 - pages_before * (len(alike) - 1 - idx) // len(alike), piece)
                    for first_page, alike in pieces.items()
                    for idx, (pages_before, piece) in enumerate(alike)
                ),
                key=lambda due_and_piece: due_and_piece[0],
            )
        )
        self.advance(0, len(self._due) * _ROWS_PER_PIECE)

    def advance(self, page_id: int, num_rows: int) -> None:
        """Before a step of so many rows whose highest KV page is this one; where pages jump ahead it takes several."""
        for _ in range(1 + num_rows // _ROWS_PER_PIECE):
            if not self._due or self._due[0][0] > page_id:
                return
            self._due.popleft()[1].add_(0)


def free_memory_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory this process can still take: what the machine has available, or less where its cgroup ends before.

    Reads /proc/meminfo (MemAvailable) and cgroup v2 (memory.max, memory.current, on the way up from the process's own).
    """
    for line in (proc / "meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
            break
    else:
        raise RuntimeError(f"{proc}/meminfo has no MemAvailable: set kv_cache_memory_bytes")
    for folder in _cgroup_folders(proc, cgroup):
        limit_file, used_file = folder / "memory.max", folder / "memory.current"
        if limit_file.exists() and used_file.exists():
            limit = limit_file.read_text().strip()
            if limit != "max":
                available = min(available, max(0, int(limit) - int(used_file.read_text())))
    return available


def _cgroup_folders(proc: Path, cgroup: Path) -> list[Path]:
    """The cgroup v2 folders of this process, innermost first; a container sees its own as the root."""
    own = next((x[3:] for x in (proc / "self/cgroup").read_text().splitlines() if x.startswith("0::")), "/")
    inner = cgroup / own.lstrip("/") if ".." not in own else cgroup
    folders = [inner, *inner.parents]
    return folders[: folders.index(cgroup) + 1]
