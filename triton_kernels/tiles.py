"""Which tiles the Triton attention kernel runs: one pure function from head, element and architecture.

No speed has been measured. The choices rest on what the compilers make of them (bench/static, with the numbers). What
bench/kernels/tune.py measures on a GPU goes before them there: tuned_tiles.py.
"""

from __future__ import annotations

from dataclasses import dataclass

PLAN_BLOCK_ROWS = (128, 64, 16)
"""Packed query rows of the large, medium and small tile kind; what a plan for the kernel is made with.

128 rows are one wgmma of 64 for each of two warpgroups; 16 are the rows of one mma.sync.
"""
MAX_FLOAT32_BLOCK_ROWS = 64
"""A float32 product is three of tf32, from operands split in two: with 128 rows it spills kilobytes."""
MAX_WIDE_BLOCK_ROWS = (64, 32)
"""At v_head_dim 256 on mma.sync, whose operands are in registers; without and with ``has_row_terms``. With 128 rows,
sums and scores alone are 160 of a thread's 255, and what a call asks for besides spills in every tile, hundreds of
bytes."""
NUM_WARPS = 8
"""Two warpgroups: with one, the large tile's sums alone take 128 of a thread's 255 registers at head_dim 128."""

KIB = 1024
SHARED_BYTES = {
    (8, 0): 163 * KIB,
    (8, 6): 99 * KIB,
    (8, 7): 163 * KIB,
    (8, 9): 99 * KIB,
    (9, 0): 227 * KIB,
    (10, 0): 227 * KIB,
    (10, 3): 227 * KIB,
    (12, 0): 99 * KIB,
}
"""The most shared memory of one program by compute capability. Source: CUDA C++ programming guide, table of technical
specifications per compute capability. Others from 8.0 on are taken to have the least of these."""
SM_REGISTERS = 65536
MAX_REGISTERS = 255
"""Of a thread."""
HALF_OF_REGISTERS = 128
"""Per thread, where two programs of 8 warps share an SM's 65,536."""
OTHER_REGISTERS = 32
"""Of a thread, the least that a walk over keys takes besides sums and scores: addresses, maxima, operands."""

MAX_BLOCK_N = (64, 128)
"""Keys per tile of many rows and of few. The few: a turn costs them what their scores hardly matter to, so that twice
the keys are nearly half the instructions; more than 128 would straddle the splits of a plan."""
MAX_TILE_ELEMENTS = 128 * 192
"""Of a K or V tile of 16 bits."""
WIDE_COLUMNS = 128
"""A head of more is wide: sums, and operands in registers, leave room for fewer rows, and K may come in two tiles."""
MIN_BLOCK_N = 16
"""The least that a product of tiles takes."""


@dataclass(frozen=True)
class TileChoice:
    """How one compiled kernel is cut up.

    Args:
        block_m: rows of a tile, descending; an item runs in the smallest that holds its rows.
        block_n: keys of a K or V tile, for each of block_m.
        num_stages: of the software pipeline over K and V tiles, for each of block_m. 2: the next tile is on its way
            while one is in use, its page ids read just before. (With 3 they too would go through the pipeline, and
            shared memory, at the cost of 70 instructions per tile of 128 rows.)
        block_d: columns of the tiles that a head of Q and K is in, as ``key_columns``.
        block_dv: columns of a tile of V: v_head_dim rounded up to a power of two, at least 16.
        num_warps: warps of a program.
        programs_per_sm: how many programs of these share an SM.
        max_registers: per thread, what the compiler must do with; None for no bound.
    """

    block_m: tuple[int, ...]
    block_n: tuple[int, ...]
    num_stages: tuple[int, ...]
    block_d: tuple[int, ...]
    block_dv: int
    num_warps: int
    programs_per_sm: int
    max_registers: int | None


@dataclass(frozen=True)
class TileProblem:
    """What the choice of tiles depends on, besides the GPU.

    Args:
        head_dim: of Q and K. v_head_dim: of V.
        element_bytes: of what the products are made of.
        stored_bits: of an element of K and V in memory.
        kv_format: what K and V are quantised to (int8, float8_e4m3fn, float8_e5m2, int4); None for not at all.
        has_row_terms, has_one_kind: as for ``choose_tiles``.
    """

    head_dim: int
    v_head_dim: int
    element_bytes: int
    stored_bits: int
    kv_format: str | None = None
    has_row_terms: bool = False
    has_one_kind: bool = False

    def choose(self, capability: tuple[int, int]) -> TileChoice:
        """``choose_tiles`` of the problem."""
        return choose_tiles(
            self.head_dim,
            self.element_bytes,
            capability,
            v_head_dim=self.v_head_dim,
            stored_bits=self.stored_bits,
            has_row_terms=self.has_row_terms,
            has_one_kind=self.has_one_kind,
        )


def key_columns(head_dim: int) -> tuple[int, ...]:
    """Columns of the tiles that a head of Q and K is in: powers of two, one or two.

    Past 128 two, where those have fewer columns than one that holds all: 192 are 128 and 64, and not 256. (At head_dim
    96 the second tile's addresses spill on sm_90, and cost more than the columns that are saved.)
    """
    whole = value_columns(head_dim)
    if whole <= WIDE_COLUMNS:
        return (whole,)
    rest = value_columns(head_dim - WIDE_COLUMNS)
    return (WIDE_COLUMNS, rest) if WIDE_COLUMNS + rest < whole else (whole,)


def value_columns(head_dim: int) -> int:
    """head_dim rounded up to a power of two, at least 16, which a product of tiles takes."""
    return max(16, 1 << (head_dim - 1).bit_length())


def why_not(tiles: TileChoice, problem: TileProblem, capability: tuple[int, int]) -> str | None:
    """The reason why the kernel cannot run the problem in these tiles, or has no room for them; None if it can."""
    num_kinds = len(tiles.block_m)
    if not 1 <= num_kinds <= 3 or len(tiles.block_n) != num_kinds or len(tiles.num_stages) != num_kinds:
        return "block_m, block_n and num_stages must have an entry for each of 1 to 3 tiles"
    if problem.has_one_kind and num_kinds != 1:
        return "an invariant call has one tile, so that a row's sums do not depend on its company"
    block_d, block_dv = key_columns(problem.head_dim), value_columns(problem.v_head_dim)
    if (tiles.block_d, tiles.block_dv) != (block_d, block_dv):
        return f"block_d must be {block_d} and block_dv {block_dv}, got {tiles.block_d} and {tiles.block_dv}"
    most_rows = MAX_FLOAT32_BLOCK_ROWS if problem.element_bytes == 4 else PLAN_BLOCK_ROWS[0]
    if list(tiles.block_m) != sorted(set(tiles.block_m), reverse=True) or not all(
        _is_power_of_two(rows) and PLAN_BLOCK_ROWS[-1] <= rows <= most_rows for rows in tiles.block_m
    ):
        return f"block_m must be descending powers of two in [{PLAN_BLOCK_ROWS[-1]}, {most_rows}], got {tiles.block_m}"
    most_keys = min(MAX_BLOCK_N[1], _most_keys(block_d, block_dv, problem.element_bytes))
    if not all(_is_power_of_two(keys) and MIN_BLOCK_N <= keys <= most_keys for keys in tiles.block_n):
        return f"block_n must be powers of two in [{MIN_BLOCK_N}, {most_keys}], got {tiles.block_n}"
    if not all(1 <= stages <= 4 for stages in tiles.num_stages):
        return f"num_stages must be in [1, 4], got {tiles.num_stages}"
    if tiles.num_warps not in (4, 8):
        return f"num_warps must be 4 or 8, got {tiles.num_warps}"
    num_threads = 32 * tiles.num_warps
    registers = MAX_REGISTERS if tiles.max_registers is None else tiles.max_registers
    # They are handed out in eights.
    if tiles.programs_per_sm < 1 or tiles.programs_per_sm * num_threads * -(-registers // 8) * 8 > SM_REGISTERS:
        return f"{tiles.programs_per_sm} programs of {num_threads} threads with {registers} registers do not fit an SM"
    for block_m, block_n in zip(tiles.block_m, tiles.block_n, strict=True):
        sums_and_scores = -(-block_m * (tiles.block_dv + block_n) // num_threads)
        if sums_and_scores + OTHER_REGISTERS > registers:
            return f"sums and scores of {block_m} x {block_n} are {sums_and_scores} of {registers} registers"
    # An SM has what one program may have at most, and for each program a KiB that the system takes.
    limit = SHARED_BYTES.get(capability, min(SHARED_BYTES.values()))
    taken = shared_bytes(tiles, problem.element_bytes, capability, problem.stored_bits)
    if tiles.programs_per_sm * (taken + KIB) > limit + KIB:
        return f"{tiles.programs_per_sm} programs with {taken} bytes of shared memory do not fit {limit}"
    return None


def _most_keys(block_d: tuple[int, ...], block_dv: int, element_bytes: int) -> int:
    """The most keys, a power of two, of tiles within ``MAX_TILE_ELEMENTS``."""
    keys = MAX_TILE_ELEMENTS // max(sum(block_d), block_dv) // (element_bytes // 2)
    return 1 << (keys.bit_length() - 1)


def _is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


def shared_bytes(
    tiles: TileChoice, element_bytes: int, capability: tuple[int, int], stored_bits: int | None = None
) -> int:
    """Shared memory that a program takes, at most: Q, the tiles of K and V in flight and in use, weights, results.

    Args: as for ``choose_tiles``.
    """
    query_row_bytes = sum(tiles.block_d) * element_bytes
    kv_columns = sum(tiles.block_d) + tiles.block_dv
    key_bytes = kv_columns * element_bytes  # of a key's K and V
    stored_key_bytes = key_bytes if stored_bits is None else kv_columns * stored_bits // 8
    most = 0
    for block_m, block_n, num_stages in zip(tiles.block_m, tiles.block_n, tiles.num_stages, strict=True):
        num_tiles = num_stages  # of K, and of V
        if element_bytes == 4 and capability[0] in (9, 10):
            num_tiles += 2  # wgmma and tcgen05 read from shared memory: what is in use, split into two tf32
        if block_m < 64 or capability[0] not in (9, 10):
            num_tiles -= 1  # mma.sync has its operands in registers: a tile in use is in shared memory no more
        walk = block_m * query_row_bytes + num_tiles * block_n * stored_key_bytes
        if stored_key_bytes != key_bytes:
            walk += block_n * key_bytes  # K and V in use are converted, and back in shared memory
        # On their way from one product's layout to the next's; not where the next takes them from where the first left
        # them: wgmma from registers, tcgen05 from tensor memory.
        is_in_place = element_bytes == 2 and block_m >= 64 and capability[0] in (9, 10)
        weights = 0 if is_in_place else block_m * block_n * element_bytes
        float32_result = block_m * tiles.block_dv * 4  # after the walk, on its way to coalesced stores
        most = max(most, walk + weights, float32_result)
    return most + KIB  # tcgen05's barriers and alignment; fewer elsewhere


def choose_tiles(
    head_dim: int,
    element_bytes: int,
    capability: tuple[int, int],
    *,
    v_head_dim: int | None = None,
    stored_bits: int | None = None,
    has_row_terms: bool = False,
    has_one_kind: bool = False,
) -> TileChoice:
    """The tiles for these head sizes and this element size on a GPU of this compute capability.

    Of what shared memory holds: the most rows, then the most keys per tile.

    Args:
        element_bytes: of what the products are made of.
        v_head_dim: None is head_dim.
        stored_bits: of an element of K and V in memory; None: it is in memory as in the products.
        has_row_terms: whether rows take ALiBi slopes or words of a tree mask along: with half of the registers they
            spill (888 bytes on sm_90 at head_dim 128).
        has_one_kind: whether all items are to run in one tile, so that a row's sums do not depend on its company. It is
            the large one, in which decodes wait for memory, too: on an H100 64 keys at head_dim 128 take an SM 2,400
            clocks to read and 800 to issue.
    Raises:
        NotImplementedError: the capability is below 8.0, which has no asynchronous copies, or the head is too large.
    """
    if capability < (8, 0):
        raise NotImplementedError(
            f"compute capability {capability[0]}.{capability[1]} is not supported; the nearest is 8.0 (A100)"
        )
    limit = SHARED_BYTES.get(capability, min(SHARED_BYTES.values()))
    v_head_dim = head_dim if v_head_dim is None else v_head_dim
    block_d, block_dv = key_columns(head_dim), value_columns(v_head_dim)
    # wgmma's operands are in shared memory, which leaves registers for a second program; elsewhere it would spill, and
    # so do K and V that are converted on their way (288 bytes of float8 at head_dim 128).
    is_as_stored = stored_bits in (None, 8 * element_bytes)
    has_shared_operands = capability[0] in (9, 10)  # wgmma, tcgen05
    is_light = element_bytes == 2 and not has_row_terms
    is_narrow = max(sum(block_d), block_dv) <= WIDE_COLUMNS
    is_shared = capability[0] == 9 and is_light and is_narrow and is_as_stored
    # Where K alone is wide, an SM has one program anyway, and sums leave it registers for the scores of twice the keys:
    # three quarters of the instructions (as FlashAttention-3 has it). Words of a tree spill with them, and so do K and
    # V converted for tcgen05.
    is_roomy = capability[0] == 9 or (capability[0] == 10 and is_as_stored)
    has_most_keys = is_roomy and is_light and sum(block_d) > WIDE_COLUMNS >= block_dv
    most_keys = _most_keys(block_d, block_dv, element_bytes)
    for block_m in (128, 64, 32, 16):
        if element_bytes == 4 and block_m > MAX_FLOAT32_BLOCK_ROWS:
            continue
        if not has_shared_operands and block_dv > WIDE_COLUMNS and block_m > MAX_WIDE_BLOCK_ROWS[has_row_terms]:
            continue
        block_n = min(MAX_BLOCK_N[has_most_keys], most_keys)
        while block_n >= MIN_BLOCK_N:
            num_kinds = 1 if has_one_kind else 2
            tiles = TileChoice(
                block_m=(block_m, 16)[:num_kinds],
                block_n=(block_n, min(MAX_BLOCK_N[1], most_keys, 2 * block_n))[:num_kinds],
                num_stages=(2, 2)[:num_kinds],
                block_d=block_d,
                block_dv=block_dv,
                num_warps=NUM_WARPS,
                programs_per_sm=2 if is_shared else 1,
                max_registers=HALF_OF_REGISTERS if is_shared else None,
            )
            # An SM has what one program may have at most, and for each program a KiB that the system takes.
            if (
                tiles.programs_per_sm * (shared_bytes(tiles, element_bytes, capability, stored_bits) + KIB)
                <= limit + KIB
            ):
                return tiles
            block_n //= 2
    raise NotImplementedError(
        f"head_dim {head_dim} and v_head_dim {v_head_dim} with {element_bytes}-byte elements do not fit the "
        f"{limit // KIB} KiB of shared memory of compute capability {capability[0]}.{capability[1]}; the nearest that "
        "do are 256"
    )
