# ruff: noqa: N999
"""The compiled half of mixattn. Every ``int`` that stands for an array is its address."""

from collections.abc import Sequence
from typing import Any, TypedDict

PLAN_MAGIC: int
PLAN_HEADER_WORDS: int
WORK_ITEM_WORDS: int
MERGE_WORDS: int

class PlanSpec:
    def __init__(
        self,
        *,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        v_head_dim: int,
        kv_element_bytes: int,
        causal: bool,
        window_left: int,
        num_workers: int,
        block_rows: Sequence[int],
        row_granule: int,
        packing_rows: int,
        split_tokens: int,
        fixed_split_tokens: int,  # 0: no invariant plan
        items_per_worker: int,
        heads_per_bundle: int,
        workers_per_core: int,  # 0: None of Hardware
        max_splits: int,
        separates_small: bool,
        fs_per_kiloflop: int,
        fs_per_kilobyte: int,
        fs_per_item: int,
    ) -> None: ...
    def max_groups(self, num_seqs: int) -> int: ...
    def max_items(self, total_q: int, num_seqs: int, num_groups: int = 0) -> int: ...
    def max_merges(self, num_groups: int = 0) -> int: ...
    def max_partial_rows(self, total_q: int, num_groups: int = 0) -> int: ...

def plan(
    spec: PlanSpec,
    cu_seqlens_q: int,
    seq_lens: int,
    num_seqs: int,
    out: int,
    capacity_items: int,
    capacity_merges: int,
    block_table: int = 0,  # [num_seqs, block_table_stride]; 0: none
    block_table_stride: int = 0,
    page_size: int = 0,
) -> None: ...
def check_slices(cu_seqlens_q: int, seq_lens: int, num_seqs: int) -> None: ...
def fill_positions(
    *,
    cu_seqlens_q: int,
    seq_lens: int,
    num_seqs: int,
    block_table: int,
    max_pages: int,
    page_size: int,
    positions: int,
    slot_mapping: int,
) -> None: ...
def plan_cost(spec: PlanSpec, words: int) -> dict[str, int]: ...

# The CPU kernels (csrc/bindings/cpu.cpp). Strides count elements (of int4 bytes); the last dimension is always
# contiguous. ``dtype`` is "float32", "bfloat16" or "float16"; ``kv_dtype`` one of these, "int8", "float8_e4m3fn",
# "float8_e5m2" or "int4". A scale is the value in its sizes (value, is per token, strides of page, token and head) or,
# unless its address is 0, float32 [num_pages, page_size, num_kv_heads] (per token) or [num_kv_heads]. ``isa`` is one of
# cpu_info()["available"], None the best of them. Everything that the index arrays hold is checked before the first
# write: ValueError names the argument and its bound.

def attention(
    *,
    dtype: str,
    kv_dtype: str,
    q: int,
    k_cache: int,
    v_cache: int,
    k_scale: int,  # 0: the value in k_scale_sizes
    v_scale: int,
    out: int,
    lse: int,  # 0: not wanted
    cu_seqlens_q: int,
    seq_lens: int,
    block_table: int,
    plan: int,
    alibi_slopes: int,  # [num_seqs, num_q_heads] float32; 0: off
    sinks: int,  # [num_q_heads] float32; 0: off
    tree_mask: int,  # [total_q] int64; 0: off
    partial_out: int,  # [num_partial_rows, v_head_dim] float32
    partial_lse: int,  # [num_partial_rows] float32
    tickets: int,  # [num_tickets] int32, zero before the first call and after every call
    total_q: int,
    num_seqs: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int,
    num_pages: int,
    page_size: int,
    max_pages: int,
    plan_words: int,  # length of plan
    num_partial_rows: int,  # at least the plan's
    num_tickets: int,  # at least the plan's num_merges + 1
    q_strides: tuple[int, int],  # token, head
    out_strides: tuple[int, int],  # token, head
    k_strides: tuple[int, int, int],  # page, token, head
    v_strides: tuple[int, int, int],  # page, token, head
    k_scale_sizes: tuple[float, bool, tuple[int, int, int]],
    v_scale_sizes: tuple[float, bool, tuple[int, int, int]],
    lse_stride: int,  # token
    block_table_stride: int,  # sequence
    alibi_seq_stride: int,  # sequence; 0: one set of slopes for all
    softmax_scale: float,
    causal: bool,
    window_left: int,  # -1: no window
    soft_cap: float,  # 0: off
    invariant: bool,
    num_threads: int,
    isa: str | None = None,
) -> None: ...
def append_kv(
    *,
    dtype: str,
    kv_dtype: str,
    k: int,
    v: int,
    k_cache: int,
    v_cache: int,
    k_scale: int,  # 0: the value in k_scale_sizes; written if per token
    v_scale: int,
    slot_mapping: int,  # [num_tokens] int64
    q: int,  # 0: no q
    q_out: int,  # q's place is allowed
    positions: int,  # [num_tokens] int64; 0: no rotation
    rope_cos_sin: int,  # [max_positions, rotary_dim] float32: cosines, then sines; 0: no rotation
    num_tokens: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int,
    num_pages: int,
    page_size: int,
    max_positions: int,
    rotary_dim: int,
    k_strides: tuple[int, int],  # token, head
    v_strides: tuple[int, int],  # token, head
    q_strides: tuple[int, int],  # token, head
    q_out_strides: tuple[int, int],  # token, head
    k_cache_strides: tuple[int, int, int],  # page, token, head
    v_cache_strides: tuple[int, int, int],  # page, token, head
    k_scale_sizes: tuple[float, bool, tuple[int, int, int]],
    v_scale_sizes: tuple[float, bool, tuple[int, int, int]],
    rope_stride: int,  # position
    interleaved: bool,
    num_threads: int,
    isa: str | None = None,
) -> None: ...
def merge_states(
    *,
    dtype: str,
    outs: int,  # [num_states, num_tokens, num_heads, head_dim]
    lses: int,  # [num_states, num_tokens, num_heads] float32
    out: int,  # [num_tokens, num_heads, head_dim], contiguous, in the dtype of outs
    lse: int,  # [num_tokens, num_heads] float32, contiguous
    num_states: int,
    num_tokens: int,
    num_heads: int,
    head_dim: int,
    outs_strides: tuple[int, int, int],  # state, token, head
    lses_strides: tuple[int, int],  # state, token
    num_threads: int,
    isa: str | None = None,
) -> None: ...

# Linear maps (csrc/bindings/linear.cpp). ``form`` is one of ops.linear.WEIGHT_FORMS; floats are float32.

def weight_row_bytes(form: str, depth: int) -> int: ...
def weight_panel_bytes(form: str, depth: int, isa: str | None = None) -> int: ...
def panel_cols(isa: str | None = None) -> int: ...
def pack_weight(
    *,
    form: str,
    rows: int,  # [num_rows, weight_row_bytes]
    num_rows: int,
    depth: int,
    panels: int,  # [ceil(num_rows / panel_cols), weight_panel_bytes]
    num_threads: int,
    isa: str | None = None,
) -> None: ...
def unpack_weight_rows(
    *,
    form: str,
    panels: int,
    num_rows: int,  # of the matrix
    depth: int,
    ids: int,  # [num_ids] int64
    num_ids: int,
    out: int,  # [num_ids, depth]
    num_threads: int,
    isa: str | None = None,
) -> None: ...
def linear(
    *,
    form: str,
    panels: int,
    x: int,  # [num_rows, depth]
    bias: int,  # [num_cols]; 0: none
    residual: int,  # [num_rows, num_cols]; 0: none
    y: int,  # [num_rows, num_cols], or half of the columns if is_gated
    num_rows: int,
    num_cols: int,
    depth: int,
    x_stride: int,
    residual_stride: int,
    y_stride: int,
    is_gated: bool,
    rounds_x: bool,
    num_threads: int,
    isa: str | None = None,
) -> None: ...
def rms_norm(
    *,
    x: int,  # [num_rows, num_groups, size]
    weight: int,  # [size]
    y: int,  # as x, contiguous
    num_rows: int,
    num_groups: int,
    size: int,
    x_row_stride: int,
    x_group_stride: int,
    eps: float,
    num_threads: int,
    isa: str | None = None,
) -> None: ...
def silu_mul(
    *,
    gate_up: int,  # [num_rows, 2 * size]
    y: int,  # [num_rows, size], contiguous
    num_rows: int,
    size: int,
    gate_up_stride: int,
    num_threads: int,
    isa: str | None = None,
) -> None: ...

class Recording:
    """Calls of attention, append_kv and the linear maps, kept to be run again (csrc/bindings/recording.h)."""

    def __init__(self, num_rows: int, num_seqs: int, num_threads: int) -> None: ...  # of the step, at most
    def begin(self) -> None: ...  # from here on this thread's calls are recorded, and not run
    def end(self) -> None: ...
    def run(self, num_rows: int, num_seqs: int) -> None: ...  # in order, on the first rows at the same addresses
    def run_timed(self, num_rows: int, num_seqs: int) -> list[tuple[str, float]]: ...  # each call's name, microseconds
    def __len__(self) -> int: ...

class IsaChoice(TypedDict):
    isa: str  # what a call without ``isa`` gets
    passed_over: str | None  # a better one that was not chosen, and why

class CpuInfo(IsaChoice):
    available: list[str]  # best first
    compiled: list[str]  # best first; the ones not available need another CPU
    emulated: list[str]  # available by emulation, for tests: correct and slow
    model: str
    num_cpus: int
    l1d_bytes: int  # 0 where the system does not say
    l2_bytes: int
    openmp: str | None  # the runtime's file; None while the process has loaded none

def cpu_info() -> CpuInfo: ...
def choose_isa(isas: Sequence[str], bfloat16_s: float, fma_s: float) -> IsaChoice: ...
def measure_roofs(num_threads: int, isa: str | None = None) -> dict[str, float]: ...

# The CUDA kernels (csrc/bindings/cuda.cpp). RuntimeError is the driver's, and names its function and error.

class CudaInstance(TypedDict):
    name: str  # of the kernel
    image: str  # the fatbin that it is in
    num_threads: int
    shared_bytes: int
    workers_per_sm: int  # that draw items of a plan at the same time
    separates_small: bool  # whether it takes only plans with small items apart

class CudaDevice(TypedDict):
    name: str
    capability: tuple[int, int]
    num_sms: int
    shared_bytes_per_block: int

class CudaDriver:
    version: int  # 1000 major + 10 minor of the newest CUDA that it runs
    is_emulation: bool  # runs kernels on the host, in the host's memory
    def __init__(self, path: str) -> None: ...
    def devices(self) -> list[CudaDevice]: ...

class CudaImage:
    def __init__(self, driver: CudaDriver, device_idx: int, data: bytes) -> None: ...
    def num_blocks(
        self, *, kernel: str, num_threads: int, shared_bytes: int
    ) -> int: ...  # that the device holds at once
    def launch_pointers(
        self, *, kernel: str, num_blocks: int, num_threads: int, shared_bytes: int, pointers: Sequence[int], stream: int
    ) -> None: ...

def cuda_instances() -> list[CudaInstance]: ...

# call: what ``attention`` takes, less num_threads and isa. NotImplementedError names the nearest call with a kernel.
def cuda_instance(
    *, capability: tuple[int, int], has_small_apart: bool, **call: Any
) -> CudaInstance: ...  # addresses: only whether 0

# call: what ``append_kv`` takes, less num_threads and isa. NotImplementedError names the nearest call with a kernel.
def cuda_append_kv_kernel(**call: Any) -> CudaInstance: ...
def cuda_append_kv(*, image: CudaImage, stream: int, **call: Any) -> None: ...

# call: what ``merge_states`` takes, less num_threads and isa.
def cuda_merge_states_kernel(**call: Any) -> CudaInstance: ...
def cuda_merge_states(*, image: CudaImage, stream: int, **call: Any) -> None: ...
def cuda_plan_kernel() -> CudaInstance: ...
def cuda_plan_scratch_words(spec: PlanSpec, num_seqs: int, capacity_items: int) -> int: ...
def cuda_plan(
    *,
    spec: PlanSpec,
    image: CudaImage,
    cu_seqlens_q: int,
    seq_lens: int,
    num_seqs: int,
    block_table: int,  # 0: none
    block_table_stride: int,
    page_size: int,
    out: int,
    scratch: int,
    capacity_items: int,
    capacity_merges: int,
    capacity_partial_rows: int,
    num_threads: int,
    stream: int,
) -> None: ...  # every address is of device memory
def cuda_attention(
    *, image: CudaImage, device_plan: int, has_small_apart: bool, num_sms: int, stream: int, **call: Any
) -> None: ...  # plan: on the host; 0: only on the device, and whether the workspace is large enough is not checked
