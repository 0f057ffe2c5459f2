"""Tiles of K and V, and the scales of their keys, out of the pages that a block table names."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from mixattn.triton_kernels._numeric import widen
from mixattn.triton_kernels._quantized import pin_layout, read_codes

MAX_RUN = tl.constexpr(16)
"""Keys located through one page id at most. 8 warps hold the rows of a tile of 128 columns 16 apart, so that a thread
has one offset inside a run for all of its rows; with longer runs it has one for each, and spills."""


@triton.constexpr_function
def largest_common_power_of_two(a: int, b: int) -> int:
    """The largest power of two that divides both."""
    return math.gcd(a, b) & -math.gcd(a, b)


@triton.jit
def load_rows(pointers, is_row, HEAD_DIM: tl.constexpr, IS_MASKED: tl.constexpr):
    """[rows, BLOCK_D] from memory; 0 past HEAD_DIM and, with IS_MASKED, where is_row is false."""
    BLOCK_D: tl.constexpr = pointers.shape[1]
    is_dim = (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    if IS_MASKED:
        tile = tl.load(pointers, mask=is_row[:, None] & is_dim, other=0.0)
    elif BLOCK_D != HEAD_DIM:
        tile = tl.load(pointers, mask=is_dim, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def locate_keys(
    block_table_row,
    tile_begin,
    kv_end,
    BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    STRIDES: tl.constexpr,
    IS_EDGE: tl.constexpr,
):
    """[BLOCK_N] int64, where the keys from tile_begin (a multiple of BLOCK_N) on lie in a cache of these STRIDES.

    With IS_EDGE the keys from kv_end on, which may have no page, get any place.
    """
    RUN: tl.constexpr = largest_common_power_of_two(PAGE_SIZE, MAX_RUN)  # keys that are sure to share a page
    run_begin = (tile_begin + tl.arange(0, BLOCK_N // RUN) * RUN).to(tl.uint32)  # never negative: shifts, not divisions
    table_entry = block_table_row + run_begin // PAGE_SIZE
    # Table entries past the last page may be anything: neither they nor pages through them are read.
    page = tl.load(table_entry, mask=run_begin < kv_end, other=0) if IS_EDGE else tl.load(table_entry)
    # int64: caches of more than 2^31 elements are common.
    run_offset = page.to(tl.int64) * STRIDES[0] + (run_begin % PAGE_SIZE).to(tl.int64) * STRIDES[1]
    key_offset = tl.arange(0, RUN).to(tl.int64) * STRIDES[1]
    return tl.reshape(run_offset[:, None] + key_offset[None, :], [BLOCK_N])


@triton.jit
def load_keys(
    head,
    offsets,
    is_key,
    HEAD_DIM: tl.constexpr,
    FIRST_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KV_FORMAT: tl.constexpr,
    CAPABILITY: tl.constexpr,
    IS_PINNED: tl.constexpr,
    IS_MASKED: tl.constexpr,
):
    """[keys, BLOCK_D] as stored, or float16 of what KV_FORMAT stores, from offsets behind head; as ``load_rows``.

    Its columns are the dimensions from FIRST_DIM, an even number, on. What a mask leaves out of a quantised tile is
    finite. With IS_PINNED such a tile is widened as it was loaded.
    """
    NUM_DIMS: tl.constexpr = HEAD_DIM - FIRST_DIM
    if KV_FORMAT is None:
        pointers = (head + FIRST_DIM + offsets[:, None]) + tl.arange(0, BLOCK_D)[None, :]
        tile = load_rows(pointers, is_key, NUM_DIMS, IS_MASKED)
    else:
        PACKED: tl.constexpr = 2 if KV_FORMAT == "int4" else 1
        byte = tl.arange(0, BLOCK_D // PACKED)
        pointers = (head + FIRST_DIM // PACKED + offsets[:, None]) + byte[None, :]
        codes = load_rows(pointers, is_key, NUM_DIMS // PACKED, IS_MASKED)
        tile = read_codes(codes, KV_FORMAT, CAPABILITY)
        if IS_PINNED:
            tile = pin_layout(tile, CAPABILITY)
    return tile


@triton.jit
def load_scales(
    head_scales,
    block_table_row,
    tile_begin,
    kv_end,
    is_key,
    BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    STRIDES: tl.constexpr,
    IS_EDGE: tl.constexpr,
):
    """[BLOCK_N] float32, the scales of the keys from tile_begin on; with IS_EDGE 0 where is_key is false."""
    offsets = locate_keys(block_table_row, tile_begin, kv_end, BLOCK_N, PAGE_SIZE, STRIDES, IS_EDGE)
    return tl.load(head_scales + offsets, mask=is_key, other=0.0) if IS_EDGE else tl.load(head_scales + offsets)


@triton.jit
def convert(tile, dtype: tl.constexpr):
    """The tile in the dtype of the products, exactly: its own, or float32."""
    if tile.dtype != dtype:
        tl.static_assert(dtype == tl.float32)
        tile = widen(tile)
    return tile
