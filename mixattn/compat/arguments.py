"""Between the arguments of other libraries and those of ``mixattn.attention``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixattn.ops.library import DTYPE_NAMES


class Mask(NamedTuple):
    """``causal`` and ``window_left`` of ``mixattn.attention``."""

    causal: bool
    window_left: int | None


def accept_only(function: str, default: object, nearest: str, **arguments: Any) -> None:
    """Raises NotImplementedError naming the first argument that is not ``default``, and the nearest supported one."""
    for name, value in arguments.items():
        is_default = value is default or (not isinstance(value, Tensor) and value == default)
        if not is_default:
            shown = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise NotImplementedError(f"{function}: {name} = {shown} is not supported; {nearest}")


def mask_of(function: str, causal: bool, window_size: Sequence[int | None]) -> Mask:
    """The mask of FlashAttention's ``causal`` and ``window_size`` (left, right), where -1 or None is no bound.

    Raises:
        NotImplementedError: a right bound other than the row's own position.
    """
    if isinstance(causal, Tensor):
        raise NotImplementedError(f"{function}: causal per sequence is not supported; one bool for the batch is")
    left, right = (None if bound is None or bound < 0 else int(bound) for bound in window_size)
    if causal:
        right = 0
    if right:
        raise NotImplementedError(
            f"{function}: window_size = {tuple(window_size)} is not supported; the nearest is a right bound of 0 or -1"
        )
    return Mask(right == 0, left)


def soft_cap_of(softcap: float | None) -> float | None:
    """``soft_cap`` of a cap that is off at 0."""
    return softcap or None


def check_q_descale(function: str, q_descale: Tensor | None) -> None:
    """Raises NotImplementedError if queries are to be scaled; on a GPU the values are not looked at."""
    if q_descale is not None and not _are_ones(q_descale):
        raise NotImplementedError(f"{function}: q_descale other than 1 is not supported; the nearest is q in 16 bits")


def kv_scale(function: str, name: str, cache: Tensor, descale: Tensor | float | None) -> float | Tensor | None:
    """``k_scale`` or ``v_scale`` of ``mixattn.attention``: a float, [num_kv_heads], or None.

    FlashAttention-3 and vLLM read descales for 8-bit tensors alone, and vLLM passes ones for all others.

    Args:
        cache: [..., num_kv_heads, head_dim].
        descale: a number, or a tensor of one, or [num_seqs, num_kv_heads], its rows all the same.
    Raises:
        ValueError: a scale other than 1 for a cache that is not quantised (on a GPU the values are not looked at).
        NotImplementedError: sequences with scales of their own.
    """
    if descale is None:
        return None
    if cache.dtype in DTYPE_NAMES:
        if not _are_ones(descale):
            raise ValueError(f"{function}: {name} must be 1 for {cache.dtype} tensors, which are not scaled")
        return None
    if not isinstance(descale, Tensor):
        return float(descale)
    num_kv_heads = cache.shape[-2]
    if descale.numel() == 1:
        return descale.float().reshape(1).expand(num_kv_heads).contiguous()
    is_one_row = descale.dim() == 1 or descale.stride(0) == 0 or descale.shape[0] == 1
    if not is_one_row and not (descale.device.type == "cpu" and bool((descale == descale[:1]).all())):
        raise NotImplementedError(f"{function}: {name} per sequence is not supported; the nearest is one row for all")
    return (descale if descale.dim() == 1 else descale[0]).float().contiguous()


def _are_ones(descale: Tensor | float) -> bool:
    is_unseen = isinstance(descale, Tensor) and descale.device.type != "cpu"
    return is_unseen or not bool((torch.as_tensor(descale) != 1).any())


def contiguous_rows(x: Tensor) -> Tensor:
    """``x``, copied if the elements of its last dimension are not adjacent."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def token_table(starts: Tensor, max_len: int) -> Tensor:
    """[num_seqs, max_len] int32: a block table of pages of one token, for sequences that lie one after another.

    Args:
        starts: [num_seqs] int32, the token that each sequence begins at.
    """
    return starts.unsqueeze(1) + torch.arange(max_len, dtype=torch.int32, device=starts.device)


class Rows(NamedTuple):
    """Which sequence each row of a batch belongs to, and its position there."""

    seq_idx: Tensor
    positions: Tensor


def rows_of(cu_seqlens: Tensor, first_positions: Tensor, total: int) -> Rows:
    """The rows of slices whose first rows stand at ``first_positions``; both [total] int64.

    Args:
        cu_seqlens: [num_seqs + 1] int32.
        first_positions: [num_seqs] int32.
    """
    num_seqs, device = len(first_positions), cu_seqlens.device
    seq_idx = torch.repeat_interleave(
        torch.arange(num_seqs, device=device), cu_seqlens.diff().long(), output_size=total
    )
    positions = torch.arange(total, device=device) + (first_positions - cu_seqlens[:-1])[seq_idx]
    return Rows(seq_idx, positions)


def slots_of(rows: Rows, block_table: Tensor, page_size: int) -> Tensor:
    """``slot_mapping`` [total] int64 of rows that are to be stored in the pages of ``block_table``."""
    pages = block_table[rows.seq_idx, rows.positions // page_size].long()
    return pages * page_size + rows.positions % page_size
