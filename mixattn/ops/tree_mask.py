"""The mask of a draft tree, as ``attention`` takes it; ``mixattn.tree_mask``."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from mixattn.ops.reference import TREE_MASK_BITS


def tree_mask(parents: Sequence[int | None]) -> Tensor:
    """The ``tree_mask`` words of one slice whose rows are the nodes of a tree: each row sees itself and its ancestors.

    The rows' keys lie in the cache in the order of the rows, so parents come before their children. A batch's mask is
    the slices' words one after another (``torch.cat``), -1 for every row that is plain causal.

    Args:
        parents: of each row the row it follows, an earlier one of the slice; None: it follows the context alone.
    Returns:
        [len(parents)] int64 on the CPU; bit d of row r's word is set if row r - d is r itself or its ancestor.
    Raises:
        ValueError: more rows than a word has bits (64), or a parent that is no earlier row.
    Source: tree attention, arXiv:2305.09781, section 4.
    """
    if len(parents) > TREE_MASK_BITS:
        raise ValueError(f"parents must be at most {TREE_MASK_BITS} rows, got {len(parents)}")
    words: list[int] = []
    for row, parent in enumerate(parents):
        word = 1
        if parent is not None:
            parent_row = operator.index(parent)
            if not 0 <= parent_row < row:
                raise ValueError(f"parents[{row}] must be None or in [0, {row}), got {parent_row}")
            word |= words[parent_row] << (row - parent_row)
        words.append(word)
    # A word with bit 63 is a negative int64.
    return torch.tensor([word - (word >> 63 << 64) for word in words], dtype=torch.int64)
