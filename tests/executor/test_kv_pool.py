"""The pool's size from what is configured, or from what the machine has."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from mixattn.config import KV_CACHE_DTYPES, CacheConfig, ModelConfig, RopeConfig
from mixattn.executor import kv_pool
from mixattn.ops.kv_dtypes import KvCache

MODEL = ModelConfig(
    architecture="llama",
    vocab_size=32,
    hidden_size=64,
    intermediate_size=64,
    num_layers=2,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_model_len=1000,
    rms_norm_eps=1e-5,
    rope=RopeConfig(rotary_dim=16),
)
PAGE_BYTES = 16 * (2 * 2 * 2 * 16) * 4  # tokens, (K and V, layers, heads, head_dim), float32
GIB = 1 << 30


def size(
    cache: CacheConfig, *, dtype: torch.dtype = torch.float32, free_bytes: int = GIB, max_num_seqs: int = 10**6
) -> int:
    return kv_pool.num_pages(cache, MODEL, dtype, max_model_len=1000, max_num_seqs=max_num_seqs, free_bytes=free_bytes)


def test_num_pages_configured_count_is_taken_as_it_is() -> None:
    assert size(CacheConfig(16, num_pages=7), free_bytes=0) == 7


def test_num_pages_configured_bytes_are_filled_with_whole_pages() -> None:
    assert size(CacheConfig(16, kv_cache_memory_bytes=5 * PAGE_BYTES - 1)) == 4


def test_num_pages_by_default_take_a_share_of_free_memory_up_to_a_limit() -> None:
    assert size(CacheConfig(16), free_bytes=GIB) == int(0.4 * GIB) // PAGE_BYTES
    assert size(CacheConfig(16), free_bytes=1000 * GIB) == 4 * GIB // PAGE_BYTES


def test_num_pages_never_more_than_the_running_requests_can_use() -> None:
    assert size(CacheConfig(16), max_num_seqs=3) == 3 * 63


@pytest.mark.parametrize("cache", [CacheConfig(16, kv_cache_memory_bytes=PAGE_BYTES - 1), CacheConfig(16)])
def test_num_pages_less_than_one_page_names_the_bound(cache: CacheConfig) -> None:
    with pytest.raises(ValueError, match=f"kv_cache_memory_bytes must be >= {PAGE_BYTES}, a page of 16 tokens"):
        size(cache, free_bytes=PAGE_BYTES)


def test_allocate_gives_a_pair_per_layer_in_the_agreed_layout() -> None:
    caches = kv_pool.allocate(MODEL, 5, 16, torch.bfloat16, torch.device("cpu"))
    assert len(caches) == 2
    for k_cache, v_cache, k_scale, v_scale in caches:
        assert all(cache.shape == (5, 16, 2, 16) and cache.dtype == torch.bfloat16 for cache in (k_cache, v_cache))
        assert k_scale is None and v_scale is None


QUANTIZED_PAGE_BYTES = {
    "int8": 16 * (2 * 2 * 2) * (16 + 4),  # tokens, (K and V, layers, heads), elements of a row and its scale
    "fp8_e4m3": 16 * (2 * 2 * 2) * (16 + 4),
    "fp8_e5m2": 16 * (2 * 2 * 2) * (16 + 4),
    "int4": 16 * (2 * 2 * 2) * (8 + 4),
}


@pytest.mark.parametrize(("name", "bytes_each"), QUANTIZED_PAGE_BYTES.items())
def test_quantised_pages_have_scales_beside_them_that_the_pool_counts(name: str, bytes_each: int) -> None:
    dtype = kv_pool.kv_dtype(name, torch.float32)
    caches = kv_pool.allocate(MODEL, 3, 16, dtype, torch.device("cpu"))
    assert sum(tensor.nbytes for layer in caches for tensor in layer if tensor is not None) == 3 * bytes_each
    for cache in caches:
        assert cache.k_scale is not None and cache.v_scale is not None
        assert cache.k_scale.shape == cache.v_scale.shape == (3, 16, 2) and cache.k_scale.dtype == torch.float32
    config = CacheConfig(16, kv_cache_memory_bytes=5 * bytes_each - 1, kv_cache_dtype=name)
    assert size(config, dtype=dtype) == 4


def test_kv_dtype_auto_is_the_model_s() -> None:
    assert kv_pool.kv_dtype("auto", torch.bfloat16) == torch.bfloat16


def test_kv_dtype_has_every_name_of_the_configuration() -> None:
    assert len({kv_pool.kv_dtype(name, torch.float64) for name in KV_CACHE_DTYPES}) == len(KV_CACHE_DTYPES)


def test_allocate_more_than_there_is_names_the_pages() -> None:
    with pytest.raises(ValueError, match=r"num_pages \(1000000000000\) of 16 tokens need .* GiB"):
        kv_pool.allocate(MODEL, 10**12, 16, torch.float32, torch.device("cpu"))


def make_machine(root: Path, limits: dict[str, tuple[str, int]], own: str) -> tuple[Path, Path]:
    """/proc with 8 GiB available, and a cgroup tree of {folder: (memory.max, memory.current)}."""
    proc, cgroup = root / "proc", root / "cgroup"
    (proc / "self").mkdir(parents=True)
    cgroup.mkdir()
    (proc / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:   {8 * GIB // 1024} kB\n")
    (proc / "self/cgroup").write_text(f"1:name=systemd:/x\n0::{own}\n")
    for folder, (limit, used) in limits.items():
        (cgroup / folder).mkdir(parents=True, exist_ok=True)
        (cgroup / folder / "memory.max").write_text(f"{limit}\n")
        (cgroup / folder / "memory.current").write_text(f"{used}\n")
    return proc, cgroup


@pytest.mark.parametrize(
    ("limits", "own", "expected"),
    [
        ({}, "/", 8 * GIB),
        ({"a/b": ("max", GIB)}, "/a/b", 8 * GIB),
        ({"a/b": (str(3 * GIB), GIB)}, "/a/b", 2 * GIB),
        ({"a/b": ("max", GIB), "a": (str(5 * GIB), GIB)}, "/a/b", 4 * GIB),
        ({"other": (str(GIB), 0)}, "/a/b", 8 * GIB),
        ({".": (str(2 * GIB), GIB)}, "/host/path/not/seen/here", GIB),
        ({".": (str(2 * GIB), GIB)}, "/../..", GIB),
        ({"a": (str(GIB), 2 * GIB)}, "/a", 0),
    ],
    ids=["no-limit", "max", "own", "parent", "not-ours", "container", "outside-namespace", "over-limit"],
)
def test_free_memory_is_the_least_of_machine_and_cgroups(
    tmp_path: Path, limits: dict[str, tuple[str, int]], own: str, expected: int
) -> None:
    assert kv_pool.free_memory_bytes(*make_machine(tmp_path, limits, own)) == expected


def test_free_memory_of_this_machine_is_plausible() -> None:
    assert 2**26 < kv_pool.free_memory_bytes() < 2**50


def test_prefault_takes_the_memory_of_pages_before_their_use_and_keeps_what_they_hold() -> None:
    """10 layers of 3.5 huge pages: those of one step's worth of KV pages are spread over the steps before."""
    pages = 7 * (1 << 20) // (16 * 2 * 64 * 4)
    kv = [KvCache(torch.full((pages, 16, 2, 64), 7.0), torch.full((pages, 16, 2, 64), 8.0)) for _ in range(10)]
    prefault = kv_pool.Prefault(kv)
    pages_per_piece = (2 << 20) // (16 * 2 * 64 * 4)
    assert len(prefault._due) == 20 * 3, "the first of each tensor are there at once"
    num_left = [len(prefault._due)]
    for page_id in range(pages):
        prefault.advance(page_id, num_rows=1)
        num_left.append(len(prefault._due))
        assert all(due > page_id for due, _ in prefault._due)
        for first in range(pages_per_piece, page_id + 1, pages_per_piece):
            assert num_left[-1] <= 20 * (3 - first // pages_per_piece)
    assert max(before - after for before, after in itertools.pairwise(num_left)) == 1 and num_left[-1] == 0
    assert all((cache.k_cache == 7).all() and (cache.v_cache == 8).all() for cache in kv)


def test_prefault_spreads_a_jump_over_several_steps_and_more_rows_take_more() -> None:
    kv = [KvCache(*torch.zeros(2, 4096, 16, 2, 64)) for _ in range(4)]  # 16 huge pages each
    prefault = kv_pool.Prefault(kv)
    assert len(prefault._due) == 8 * 15
    prefault.advance(4095, num_rows=1)
    assert len(prefault._due) == 8 * 15 - 1
    prefault.advance(4095, num_rows=256)
    assert len(prefault._due) == 8 * 15 - 6
