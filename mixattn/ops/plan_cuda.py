"""Plans made on a GPU, from lengths that are there, without a copy to the host; ``mixattn.DevicePlan``."""

from __future__ import annotations

import torch
from torch import Tensor

from mixattn import _C
from mixattn.ops import cuda_images
from mixattn.ops.attention_call import DevicePlanTerms, new_workspace
from mixattn.ops.backends import choose_backend
from mixattn.ops.checks import check_index_layout, check_tensor, layout_of
from mixattn.ops.plan import DTYPE_BYTES, Hardware, WorkPlan, make_spec

_INT32_MAX = 2**31 - 1
_WHY_NO_PLAN = {
    0: "update has not been called",
    1: "cu_seqlens_q must not decrease, seq_lens must be >= 0, a slice must have at most 2^31 - 1 rows x group_size",
    2: "the batch needs more items, merges or partial rows than max_num_seqs, max_total_q and, if it is invariant, "
    "max_kv_len leave room for",
    3: "seq_lens: the predicted cost of the batch must be at most 2^62 fs (77 minutes of one worker)",
}
"""By PlanStatus of csrc/common/plan.h, which is then the header's first word."""


class DevicePlan:
    """The plan of one step after the other, in the same buffer, written on the GPU by one block.

    Its words are those of ``mixattn.plan`` for the same lengths, block table and room, bit by bit. ``attention`` takes
    it as ``plan``, and reads it in its kernels alone. Both only launch: a CUDA graph can capture ``update`` and the
    ``attention`` of all layers, and be replayed with other lengths in the same tensors. Call them once before, for what
    is loaded or compiled at the first call. A replay with fewer slices has empty ones behind them: equal cu_seqlens_q,
    seq_lens 0.

    Launches share the plan's workspace: calls that may overlap, on several streams, need a plan each.

    Args:
        max_num_seqs, max_total_q: slices and rows of the largest step. With more than there is room for a plan has no
            items, and its header says so; nothing is written past the buffer, and ``attention`` writes nothing.
        num_q_heads, num_kv_heads, head_dim, v_head_dim, dtype, kv_element_bytes, causal, window_left, invariant: as
            for ``mixattn.plan``.
        hardware: whose workers to balance over (``mixattn.device_hardware``, or ``with_workers`` of ``H100`` or
            ``A100``).
        max_kv_len: keys of the longest sequence; an invariant plan has room for all of them, others need none.
        page_size: tokens per page, >= 1; ``update`` then takes a block table, and slices that share a prefix are
            grouped as by ``mixattn.plan``. None: none are.
        device: where the lengths are, and the plan.
    Attributes:
        buffer: [num_words] int32 on the device: header, items, merges (work_item.h). Words that a plan has no items or
            merges for hold anything.
        workspace: what ``attention`` needs besides, for any plan that fits: 4 (v_head_dim + 1) bytes for each partial
            row that the planner may need. An invariant plan may need max_total_q num_q_heads ceil(max_kv_len /
            ``hardware.invariant_split_tokens``) of them; others a number that depends on ``hardware`` more than on the
            step (csrc/common/plan.h): 139 MB for an H100 at v_head_dim 128.
        terms: what the plans are made for.
    Raises:
        ValueError: naming the argument, its value and the bound.
        NotImplementedError: the device has no CUDA kernels; ``mixattn.plan`` plans on the host.
    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_total_q: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        v_head_dim: int | None = None,
        dtype: str = "bfloat16",
        kv_element_bytes: int | None = None,
        causal: bool = True,
        window_left: int | None = None,
        invariant: bool = False,
        hardware: Hardware,
        max_kv_len: int | None = None,
        page_size: int | None = None,
        device: torch.device | str = "cuda",
    ) -> None:
        for name, value in (("max_num_seqs", max_num_seqs), ("max_total_q", max_total_q)):
            if not 1 <= value <= _INT32_MAX:
                raise ValueError(f"{name} must be in [1, {_INT32_MAX}], got {value}")
        self.device = torch.device(device)
        choose_backend(self.device.type, "cuda")
        self._spec = make_spec(
            num_q_heads, num_kv_heads, head_dim, v_head_dim, dtype, kv_element_bytes, causal, window_left, invariant,
            hardware,
        )  # fmt: skip
        if page_size is not None and not 1 <= page_size <= _INT32_MAX:
            raise ValueError(f"page_size must be in [1, {_INT32_MAX}] or None, got {page_size}")
        self._hardware, self._max_num_seqs, self._page_size = hardware, max_num_seqs, page_size
        num_groups = 0 if page_size is None else self._spec.max_groups(max_num_seqs)
        items = self._spec.max_items(max_total_q, max_num_seqs, num_groups)
        merges = self._spec.max_merges(num_groups)
        partial_rows = self._spec.max_partial_rows(max_total_q, num_groups)
        if invariant:
            if max_kv_len is None or max_kv_len < 1:
                raise ValueError(f"max_kv_len must be >= 1 for an invariant plan, got {max_kv_len}")
            group_size = num_q_heads // num_kv_heads
            merges = num_kv_heads * (max_num_seqs + max_total_q * group_size // hardware.block_rows[0])
            splits = -(-max_kv_len // hardware.invariant_split_tokens)
            items, partial_rows = merges * splits, max_total_q * num_q_heads * splits if splits > 1 else 0
        self._capacity_items, self._capacity_merges = items, merges
        num_words = _C.PLAN_HEADER_WORDS + items * _C.WORK_ITEM_WORDS + merges * _C.MERGE_WORDS
        if num_words > _INT32_MAX:
            raise ValueError(
                f"max_num_seqs {max_num_seqs} and max_total_q {max_total_q} can need {items} items, too many"
            )
        if partial_rows > _INT32_MAX:
            raise ValueError(
                f"max_total_q {max_total_q} and max_kv_len {max_kv_len} can need {partial_rows} partial rows, too many"
            )
        self._scratch = torch.empty(
            _C.cuda_plan_scratch_words(self._spec, max_num_seqs, items), dtype=torch.int64, device=self.device
        )
        self.buffer = torch.empty(num_words, dtype=torch.int32, device=self.device)
        self.buffer[: _C.PLAN_HEADER_WORDS] = 0  # no items
        self.device = self.buffer.device
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        self.workspace = new_workspace(partial_rows, merges, v_head_dim, self.device)
        self.terms = DevicePlanTerms(
            max_num_seqs=max_num_seqs,
            max_total_q=max_total_q,
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            v_head_dim=v_head_dim,
            kv_element_bytes=DTYPE_BYTES[dtype] if kv_element_bytes is None else kv_element_bytes,
            causal=int(causal),
            window_left=-1 if window_left is None else window_left,
            fixed_split_tokens=hardware.invariant_split_tokens if invariant else 0,
            large_rows=hardware.block_rows[0],
            medium_rows=hardware.block_rows[1],
            small_rows=hardware.block_rows[2],
            separates_small=int(hardware.separates_small),
            page_size=page_size or 0,
            max_groups=num_groups,
        )
        self._kernel = _C.cuda_plan_kernel()
        self._image = cuda_images.image(self.device.index or 0, self._kernel["image"])
        # Makes the kernel ready, which must not happen while a graph is captured.
        self._image.num_blocks(
            kernel=self._kernel["name"],
            num_threads=self._kernel["num_threads"],
            shared_bytes=self._kernel["shared_bytes"],
        )

    def update(self, cu_seqlens_q: Tensor, seq_lens: Tensor, block_table: Tensor | None = None) -> None:
        """Puts the planner on torch's current stream; nothing is waited for, allocated or copied to the host.

        Args:
            cu_seqlens_q: [num_seqs + 1] int32 on the device, from 0, not decreasing. Read when the stream comes to it.
            seq_lens: [num_seqs] int32 on the device: the keys of each sequence, this step's included.
            block_table: [num_seqs, max_pages] int32 on the device, for as many pages as the sequences have: the one
                that ``attention`` will be called with; of each sequence only the entries of pages that it has are read.
                With ``page_size``, and only then.
        Raises:
            ValueError: shape, dtype or device is out of bounds. What the tensors hold is not looked at here: a batch
                that has no plan gets one without items, for which ``read`` gives the reason.
        """
        buffer = layout_of(self.buffer)
        for name, tensor in (("cu_seqlens_q", cu_seqlens_q), ("seq_lens", seq_lens)):
            check_tensor(name, tensor)
            if tensor.dim() != 1:
                raise ValueError(f"{name} must have 1 dimension, got shape {list(tensor.shape)}")
            check_index_layout(name, layout_of(tensor), torch.int32, "the plan", buffer)
        num_seqs = seq_lens.shape[0]
        if num_seqs > self._max_num_seqs:
            raise ValueError(f"seq_lens must have at most max_num_seqs = {self._max_num_seqs} elements, got {num_seqs}")
        if cu_seqlens_q.shape[0] != num_seqs + 1:
            raise ValueError(
                f"cu_seqlens_q must be [num_seqs + 1] = [{num_seqs + 1}] as seq_lens is [{num_seqs}], got "
                f"[{cu_seqlens_q.shape[0]}]"
            )
        if (block_table is None) != (self._page_size is None):
            raise ValueError(
                "block_table must be given, as the plan has a page_size"
                if block_table is None
                else "block_table must be None, as the plan was made without page_size"
            )
        if block_table is not None:
            check_tensor("block_table", block_table)
            if block_table.dim() != 2 or block_table.shape[0] != num_seqs:
                raise ValueError(
                    f"block_table must be [num_seqs, max_pages] = [{num_seqs}, max_pages], got shape "
                    f"{list(block_table.shape)}"
                )
            check_index_layout("block_table", layout_of(block_table), torch.int32, "the plan", buffer)
        _C.cuda_plan(
            spec=self._spec,
            image=self._image,
            cu_seqlens_q=cu_seqlens_q.data_ptr(),
            seq_lens=seq_lens.data_ptr(),
            num_seqs=num_seqs,
            block_table=0 if block_table is None else block_table.data_ptr(),
            block_table_stride=0 if block_table is None else block_table.stride(0),
            page_size=self._page_size or 0,
            out=self.buffer.data_ptr(),
            scratch=self._scratch.data_ptr(),
            capacity_items=self._capacity_items,
            capacity_merges=self._capacity_merges,
            capacity_partial_rows=self.workspace.partial_lse.shape[0],
            num_threads=self._kernel["num_threads"],
            stream=torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0,
        )

    def read(self) -> WorkPlan:
        """The plan as of the last ``update``, on the host; waits for the device.

        Raises:
            ValueError: the lengths had no plan; the message says why.
        """
        words = self.buffer.cpu().numpy().copy()
        if words[0] in _WHY_NO_PLAN:
            raise ValueError(_WHY_NO_PLAN[int(words[0])])
        return WorkPlan(
            buffer=words,
            num_items=int(words[1]),
            num_merges=int(words[2]),
            num_partial_rows=int(words[3]),
            hardware=self._hardware,
            spec=self._spec,
            capacity_items=self._capacity_items,
        )
