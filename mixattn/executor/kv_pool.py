"""How many pages of KV a machine gets, and the tensors that hold them."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from mixattn.config import CacheConfig, ModelConfig

logger = logging.getLogger(__name__)

KvCache = tuple[Tensor, Tensor]
"""One layer's k_cache and v_cache, each [num_pages, page_size, num_kv_heads, head_dim]."""

_DEFAULT_SHARE_OF_FREE = 0.4
"""The rest is for the weights' page cache, activations and the user's other programs."""
_DEFAULT_MAX_BYTES = 4 << 30


def num_pages(
    cache: CacheConfig, model: ModelConfig, element_bytes: int, max_model_len: int, max_num_seqs: int, free_bytes: int
) -> int:
    """The pages of the pool: as configured, or what memory allows and the running requests can use.

    Args:
        element_bytes: of the KV dtype.
        free_bytes: memory that can be had; counts when neither pages nor bytes are configured.
    Raises:
        ValueError: the memory does not hold a page.
    """
    if cache.num_pages is not None:
        return cache.num_pages
    page_bytes = cache.page_size * model.kv_bytes_per_token(element_bytes)
    if cache.kv_cache_memory_bytes is not None:
        budget_bytes = cache.kv_cache_memory_bytes
    else:
        budget_bytes = min(int(_DEFAULT_SHARE_OF_FREE * free_bytes), _DEFAULT_MAX_BYTES)
    fitting = budget_bytes // page_bytes
    if fitting < 1:
        raise ValueError(
            f"kv_cache_memory_bytes must be >= {page_bytes}, a page of {cache.page_size} tokens, got {budget_bytes}"
        )
    usable = max_num_seqs * -(-max_model_len // cache.page_size)
    return min(fitting, usable)


def allocate(model: ModelConfig, pages: int, page_size: int, dtype: torch.dtype, device: torch.device) -> list[KvCache]:
    """One pair of caches per layer. They are not filled: no key is read before it is written."""
    shape = (pages, page_size, model.num_kv_heads, model.head_dim)
    try:
        return [
            (torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))
            for _ in range(model.num_layers)
        ]
    except RuntimeError as error:
        total_bytes = pages * page_size * model.kv_bytes_per_token(dtype.itemsize)
        raise ValueError(
            f"num_pages ({pages}) of {page_size} tokens need {total_bytes / 2**30:.1f} GiB of memory, "
            f"which {device} does not have"
        ) from error


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
