"""GGUF files: metadata, the table of tensors, and tensors read out of the memory map as plain numbers.

The header is parsed here instead of by ``gguf.GGUFReader``, which makes several numpy arrays per metadata entry
(4.8 s for the 98,000 strings of a 49,000 token vocabulary, against 0.1 s) and does not check lengths against the size
of the file. Blocks are dequantised by the ``gguf`` package.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol, TypeVar

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as GgmlType
from torch import Tensor

_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4  # GGML_MAX_DIMS

_SCALAR_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

# Packed bytes of one "row" handed to gguf.dequantize, which works on 16 rows at a time: large enough that its dozen
# numpy calls per group cost little, small enough that its temporaries are not mapped anew by malloc for every group.
# Measured on the 135M model (AMD EPYC, 1 thread, into pages that are there): its own rows of 360 bytes 2.4 s, rows of
# 1 KiB 1.3 s, 2 KiB 1.0 s, 4 KiB 0.9 s but 76,000 page faults, 8 KiB 1.3 s and 276,000.
_FOLDED_ROW_BYTES = 2048
_ROWS_PER_GROUP = 16
# Below this many elements (ATen's grain size) a torch copy stays on the calling thread: the loader's own threads must
# not each start an OpenMP team.
_SERIAL_COPY_ELEMENTS = 32768

Scalar = int | float | bool | str
_T = TypeVar("_T", int, float, bool, str)


class _FileView(Protocol):
    """What the parser needs of the file's bytes; ``mmap`` is one, ``bytes`` another."""

    def __getitem__(self, index: slice, /) -> bytes: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies in the file."""

    name: str
    shape: tuple[int, ...]
    """Slowest dimension first, as torch has it."""
    ggml_type: GgmlType
    offset: int
    """Of its first byte, from the start of the file."""
    num_bytes: int


class _Parser:
    """Reads the header from front to back; anything past the end of the file is an error that says so."""

    def __init__(self, data: _FileView, path: Path) -> None:
        self.data = data
        self.path = path
        self.position = 0

    def fail(self, message: str) -> ValueError:
        return ValueError(f"{self.path}: corrupt GGUF header at byte {self.position}: {message}")

    def scalars(self, format: str, what: str) -> tuple[Any, ...]:
        size = struct.calcsize(format)
        self.check(size, what)
        values = struct.unpack_from(format, self.data, self.position)  # type: ignore[arg-type]
        self.position += size
        return values

    def check(self, num_bytes: int, what: str) -> None:
        left = len(self.data) - self.position
        if num_bytes > left:
            raise ValueError(
                f"{self.path}: truncated or corrupt GGUF file: {what} at byte {self.position} takes {num_bytes} bytes, "
                f"but the file ends after {left} (file size {len(self.data)})"
            )

    def strings(self, count: int, what: str) -> list[str]:
        """``count`` strings in a row. The loop runs 98,000 times for a vocabulary: nothing else is done in it."""
        data, position, size = self.data, self.position, len(self.data)
        unpack = struct.Struct("<Q").unpack_from
        found = []
        try:
            for _ in range(count):
                end = position + 8 + unpack(data, position)[0]  # type: ignore[arg-type]
                if end > size:
                    self.position = position
                    self.check(end - position, what)
                found.append(data[position + 8 : end].decode("utf-8"))
                position = end
        except struct.error:
            self.position = position
            self.check(8, what)
        except UnicodeDecodeError as error:
            self.position = position
            raise self.fail(f"{what} is not UTF-8") from error
        self.position = position
        return found

    def value(self, value_type: int, key: str) -> Scalar | list[Scalar]:
        if value_type in _SCALAR_FORMATS:
            scalar: Scalar = self.scalars("<" + _SCALAR_FORMATS[value_type], key)[0]
            return scalar
        if value_type == _STRING:
            return self.strings(1, key)[0]
        if value_type != _ARRAY:
            raise self.fail(f"metadata key {key!r} has the unknown value type {value_type}")
        element_type, count = self.scalars("<IQ", key)
        if element_type == _STRING:
            return list(self.strings(count, key))
        if element_type not in _SCALAR_FORMATS:
            raise self.fail(f"metadata key {key!r} is an array of the unknown type {element_type}")
        element = _SCALAR_FORMATS[element_type]
        self.check(count * struct.calcsize("<" + element), key)
        return list(self.scalars(f"<{count}{element}", key))

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """One line of the tensor table: name, shape, type, offset in the data section."""
        name = self.strings(1, "a tensor's name")[0]
        (num_dimensions,) = self.scalars("<I", name)
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise self.fail(f"tensor {name!r} must have 1 to {_MAX_DIMENSIONS} dimensions, got {num_dimensions}")
        dimensions = self.scalars(f"<{num_dimensions}Q", name)
        ggml_type, offset = self.scalars("<IQ", name)
        return name, tuple(reversed(dimensions)), ggml_type, offset


class GgufFile:
    """An open GGUF file.

    Args:
        path: the file; mapped, not read, until a tensor is asked for.
    Attributes:
        metadata: every key, with its int, float, bool, str, or list of these.
        tensors: by name, in the order of the file.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a GGUF file of version 2 or 3, or it is truncated or corrupt.
        NotImplementedError: it was written for the other byte order.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        if path.stat().st_size < 4:
            raise ValueError(f"{path}: not a GGUF file: it holds {path.stat().st_size} bytes")
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._bytes = np.frombuffer(data, dtype=np.uint8)
        parser = _Parser(data, path)
        if parser.scalars("<4s", "the magic bytes")[0] != b"GGUF":
            raise ValueError(f"{path}: not a GGUF file: it does not begin with the bytes GGUF")
        (version,) = parser.scalars("<I", "the version")
        if version & 0xFFFF == 0:
            raise NotImplementedError(f"{path}: big-endian GGUF; supported: little-endian")
        if version not in _VERSIONS:
            raise ValueError(f"{path}: GGUF version must be one of {_VERSIONS}, got {version}")
        num_tensors, num_keys = parser.scalars("<QQ", "the counts of tensors and keys")
        self.metadata = self._read_metadata(parser, num_keys)
        self.tensors = self._read_tensor_table(parser, num_tensors)

    @staticmethod
    def _read_metadata(parser: _Parser, num_keys: int) -> dict[str, Scalar | list[Scalar]]:
        metadata: dict[str, Scalar | list[Scalar]] = {}
        for _ in range(num_keys):
            key = parser.strings(1, "a metadata key")[0]
            (value_type,) = parser.scalars("<I", key)
            if key in metadata:
                raise parser.fail(f"metadata key {key!r} appears twice")
            metadata[key] = parser.value(value_type, key)
        return metadata

    def _read_tensor_table(self, parser: _Parser, num_tensors: int) -> dict[str, GgufTensor]:
        lines = [parser.tensor() for _ in range(num_tensors)]
        alignment = self.get("general.alignment", int, _DEFAULT_ALIGNMENT)
        if alignment < 1:
            raise ValueError(f"{self.path}: general.alignment must be >= 1, got {alignment}")
        data_start = -(-parser.position // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, type_id, offset in lines:
            if name in tensors:
                raise ValueError(f"{self.path}: tensor {name!r} appears twice")
            ggml_type = self._known_type(name, type_id)
            block_size, type_size = gguf.GGML_QUANT_SIZES[ggml_type]
            if shape[-1] % block_size or 0 in shape:
                raise ValueError(
                    f"{self.path}: tensor {name!r} of shape {list(shape)}: {ggml_type.name} rows must be a positive "
                    f"multiple of {block_size} values"
                )
            num_bytes = prod(shape) // block_size * type_size
            start = data_start + offset
            if start + num_bytes > len(self._bytes):
                raise ValueError(
                    f"{self.path}: truncated or corrupt GGUF file: tensor {name!r} ends at byte {start + num_bytes}, "
                    f"the file at {len(self._bytes)}"
                )
            tensors[name] = GgufTensor(name, shape, ggml_type, start, num_bytes)
        return tensors

    def _known_type(self, name: str, type_id: int) -> GgmlType:
        try:
            return GgmlType(type_id)
        except ValueError:
            raise NotImplementedError(
                f"{self.path}: tensor {name!r} has the unknown ggml type {type_id}; known: "
                f"{', '.join(t.name for t in GgmlType)}"
            ) from None

    def get(self, key: str, kind: type[_T], default: _T | None = None) -> _T:
        """The metadata value of ``key``.

        Raises:
            ValueError: the key is missing and there is no default, or its value is not of this kind.
        """
        value = self.metadata.get(key, default)
        if value is None:
            raise ValueError(f"{self.path}: metadata key {key!r} is missing")
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return kind(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ValueError(f"{self.path}: metadata key {key!r} must be of type {kind.__name__}, got {value!r:.80}")
        return value

    def get_list(self, key: str, kind: type[_T]) -> list[_T]:
        """The metadata array of ``key``; ValueError when it is missing or not an array of this kind."""
        value = self.metadata.get(key)
        if value is None:
            raise ValueError(f"{self.path}: metadata key {key!r} is missing")
        if not isinstance(value, list) or not all(isinstance(element, kind) for element in value):
            raise ValueError(f"{self.path}: metadata key {key!r} must be an array of {kind.__name__}")
        return value  # type: ignore[return-value]

    def packed(self, name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The tensor's bytes as they lie in the file: a read-only view of the map."""
        tensor = self.tensors[name]
        return self._bytes[tensor.offset : tensor.offset + tensor.num_bytes]

    def read_into(self, name: str, destination: Tensor) -> None:
        """Writes the tensor's values, in the file's order, rounded to ``destination``'s dtype.

        Args:
            destination: as many elements as the tensor has, contiguous; or uint8, as many as it has bytes, which gets
                its blocks as they are.
        Raises:
            NotImplementedError: the ``gguf`` package cannot dequantise this type.
        """
        flat = destination.view(-1)
        if destination.dtype == torch.uint8:
            np.copyto(flat.numpy(), self.packed(name))
            return
        begin = 0
        for values in self._dequantised_pieces(self.tensors[name]):
            piece = torch.from_numpy(values if values.flags.writeable else values.copy()).view(-1)
            target = flat[begin : begin + len(piece)]
            for part, source in zip(
                torch.split(target, _SERIAL_COPY_ELEMENTS), torch.split(piece, _SERIAL_COPY_ELEMENTS), strict=True
            ):
                part.copy_(source)
            begin += len(piece)

    def _dequantised_pieces(self, tensor: GgufTensor) -> Iterator[np.ndarray[Any, np.dtype[np.float32]]]:
        """The values in order, a cache-sized piece at a time.

        Blocks are independent, so rows of any number of whole blocks give the same values.
        """
        packed = self.packed(tensor.name)
        _, type_size = gguf.GGML_QUANT_SIZES[tensor.ggml_type]
        row_bytes = _FOLDED_ROW_BYTES // type_size * type_size
        group_bytes = row_bytes * _ROWS_PER_GROUP
        try:
            for begin in range(0, len(packed), group_bytes):
                group = packed[begin : begin + group_bytes]
                num_whole = len(group) // row_bytes * row_bytes
                for rows in (group[:num_whole].reshape(-1, row_bytes), group[num_whole:].reshape(1, -1)):
                    if rows.size:
                        yield gguf.dequantize(rows, tensor.ggml_type)
        except NotImplementedError as error:
            raise NotImplementedError(
                f"{self.path}: tensor {tensor.name!r} has the type {tensor.ggml_type.name}, which the gguf package "
                "does not dequantise; supported: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K to Q6_K, IQ types"
            ) from error
