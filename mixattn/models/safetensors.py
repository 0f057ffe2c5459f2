"""Weights of a folder of safetensors files, read through memory maps. Pickled checkpoints are never opened."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_FLOAT_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Names in the file, and in ``ops.linear``."""
# Buffers that old checkpoints hold and every model computes itself.
_COMPUTED_BUFFERS = re.compile(r"\.rotary_emb\.inv_freq$")


class SafetensorsWeights:
    """The tensors of ``model.safetensors``, or of the shards that ``model.safetensors.index.json`` names.

    Args:
        folder: holds the files.
        has_tied_embeddings: the output matrix is the embedding matrix; a copy in the file is then left alone.
    Raises:
        FileNotFoundError: there is no safetensors file, or a shard is missing.
        ValueError: a file is truncated or corrupt.
    """

    def __init__(self, folder: Path, *, has_tied_embeddings: bool) -> None:
        self.location = str(folder)
        self._shards: dict[str, Any] = {}
        for path in _shard_paths(folder):
            shard = _open(path)
            self._shards.update(dict.fromkeys(shard.keys(), shard))
        ignored = {name for name in self._shards if _COMPUTED_BUFFERS.search(name)}
        if has_tied_embeddings:
            ignored.add("lm_head.weight")
        self._names = self._shards.keys() - ignored

    def names(self) -> set[str]:
        return self._names

    def stored_name(self, name: str) -> str:
        return name

    def shape(self, name: str) -> tuple[int, ...]:
        view = self._shards[name].get_slice(name)
        dtype = view.get_dtype()
        if dtype not in _FLOAT_DTYPES:
            raise NotImplementedError(
                f"{self.location}: tensor {name!r} has the dtype {dtype}; supported: {', '.join(_FLOAT_DTYPES)}"
            )
        return tuple(view.get_shape())

    def form(self, name: str) -> str:
        return _FLOAT_DTYPES[self._shards[name].get_slice(name).get_dtype()]

    def read_into(self, name: str, destination: Tensor) -> None:
        destination.copy_(self._shards[name].get_tensor(name))


def _shard_paths(folder: Path) -> list[Path]:
    """The safetensors files of the checkpoint, all there."""
    index = folder / _INDEX_FILE
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            file_names = sorted(set(weight_map.values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index}: must be JSON with a weight_map from tensor names to file names") from error
    elif (folder / _SINGLE_FILE).is_file():
        file_names = [_SINGLE_FILE]
    else:
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        hint = f"; {pickled[0]} is pickled, which is not loaded: convert it to safetensors" if pickled else ""
        raise FileNotFoundError(f"{folder}: neither {_SINGLE_FILE} nor {_INDEX_FILE} is there{hint}")
    for name in file_names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{index}: weight_map must name files of its own folder, got {name!r}")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: no such file, though {index} names it")
    return [folder / name for name in file_names]


def _open(path: Path) -> Any:
    """The open file. The header is checked against the file's size here: a truncated one does not pass."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or corrupt safetensors file: {error}") from error
