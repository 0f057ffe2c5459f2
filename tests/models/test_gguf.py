"""Reading GGUF files: every tensor type's values, and errors instead of crashes for whatever a file may hold."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as GgmlType

from mixattn.models.gguf import GgufFile
from tests.models.gguf_files import HALF_OFFSETS, random_blocks, write_model
from tests.models.hf_models import random_model


def write_file(path: Path, tensors: dict[str, tuple[np.ndarray, GgmlType]]) -> Path:
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_float32("llama.rope.freq_base", 1e4)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_token_list(["a", "é", "▁c"])
    writer.add_token_scores([0.0, -1.0, -2.5])
    for name, (packed, kind) in tensors.items():
        writer.add_tensor(name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def small_file(tmp_path: Path) -> Path:
    values = np.arange(96, dtype=np.float32).reshape(3, 32)
    return write_file(tmp_path / "small.gguf", {"x": (values, GgmlType.F32), "y": (values[0], GgmlType.F32)})


def test_metadata_of_every_kind_is_read_as_written(small_file: Path) -> None:
    file = GgufFile(small_file)
    assert file.get("general.architecture", str) == "llama"
    assert file.get("llama.block_count", int) == 2
    assert file.get("llama.rope.freq_base", float) == 1e4
    assert file.get("tokenizer.ggml.add_bos_token", bool) is True
    assert file.get_list("tokenizer.ggml.tokens", str) == ["a", "é", "▁c"]
    assert file.get_list("tokenizer.ggml.scores", float) == [0.0, -1.0, -2.5]
    assert file.get("llama.absent", int, 7) == 7


def test_metadata_and_tensor_table_equal_those_of_the_gguf_package(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_model(path, random_model("llama"), arch="llama", ggml_type=GgmlType.Q4_0)
    file, reader = GgufFile(path), gguf.GGUFReader(path)
    fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert file.metadata.keys() == fields.keys()
    assert all(file.metadata[key] == field.contents() for key, field in fields.items())
    assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        ours = file.tensors[tensor.name]
        assert (ours.shape, ours.offset, ours.num_bytes) == (
            tuple(tensor.shape.tolist()[::-1]), tensor.data_offset, tensor.n_bytes,
        )  # fmt: skip


@pytest.mark.parametrize("kind", [GgmlType.F32, GgmlType.F16, GgmlType.BF16, *HALF_OFFSETS], ids=lambda kind: kind.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tensor_of_each_type_has_the_values_of_the_gguf_package(
    tmp_path: Path, kind: GgmlType, dtype: torch.dtype
) -> None:
    block_size, _ = gguf.GGML_QUANT_SIZES[kind]
    num_rows, num_columns = 700, 512  # several pieces of the reader, the last one not full
    if kind in HALF_OFFSETS:
        packed = random_blocks(kind, num_rows * num_columns // block_size, seed=1)
    else:
        values = np.random.default_rng(1).normal(size=(num_rows, num_columns)).astype(np.float32)
        packed = gguf.quantize(values, kind)
    rows = packed.reshape(num_rows, -1)
    file = GgufFile(write_file(tmp_path / "one.gguf", {"w": (rows, kind)}))
    assert file.tensors["w"].shape == (num_rows, num_columns)
    read = torch.empty(num_rows, num_columns, dtype=dtype)
    file.read_into("w", read)
    expected = torch.from_numpy(gguf.dequantize(rows, kind).reshape(num_rows, num_columns).copy())
    assert expected.isfinite().all() and expected.std() > 0
    torch.testing.assert_close(read, expected.to(dtype), rtol=0, atol=0)


def test_read_into_a_view_of_a_larger_matrix_leaves_the_rest(small_file: Path) -> None:
    fused = torch.full((5, 32), -1.0)
    GgufFile(small_file).read_into("x", fused[1:4])
    assert (fused[[0, 4]] == -1).all()
    assert torch.equal(fused[1:4], torch.arange(96.0).view(3, 32))


def test_every_truncation_of_a_file_is_a_value_error(small_file: Path) -> None:
    whole = small_file.read_bytes()
    cut = small_file.with_name("cut.gguf")
    for size in range(len(whole) - 1):
        cut.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut\.gguf"):
            GgufFile(cut)


def test_every_flipped_byte_of_the_header_is_read_or_a_clear_error(small_file: Path) -> None:
    whole = bytearray(small_file.read_bytes())
    header_size = GgufFile(small_file).tensors["x"].offset
    broken = small_file.with_name("broken.gguf")
    num_errors = 0
    for idx in range(header_size):
        for mask in (0x01, 0x80):
            changed = whole.copy()
            changed[idx] ^= mask
            broken.write_bytes(changed)
            try:
                file = GgufFile(broken)
                for name, tensor in file.tensors.items():
                    if tensor.num_bytes < len(whole):
                        file.read_into(name, torch.empty(tensor.shape))
            except (ValueError, NotImplementedError) as error:
                assert "broken.gguf" in str(error)
                num_errors += 1
    assert num_errors > header_size / 2  # many flips only change a value


def header(*parts: bytes, version: int = 3, num_tensors: int = 0, num_keys: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys) + b"".join(parts)


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def tensor_line(name: bytes, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"", ValueError, "holds 0 bytes"),
        (b"PK\x03\x04 some zip", ValueError, "not a GGUF file"),
        (header(version=1), ValueError, r"version must be one of \(2, 3\), got 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), NotImplementedError, "big-endian"),
        (header(num_keys=2**60), ValueError, "truncated or corrupt"),
        (header(num_tensors=2**60), ValueError, "truncated or corrupt"),
        (header(struct.pack("<Q", 2**63), num_keys=1), ValueError, "takes 9223372036854775816 bytes"),
        (header(string(b"\xff\xfe"), num_keys=1), ValueError, "a metadata key is not UTF-8"),
        (header(string(b"k") + struct.pack("<I", 99), num_keys=1), ValueError, "unknown value type 99"),
        (header(string(b"k") + struct.pack("<IIQ", 9, 9, 1), num_keys=1), ValueError, "array of the unknown type 9"),
        (header(string(b"k") + struct.pack("<IIQ", 9, 5, 2**62), num_keys=1), ValueError, "truncated or corrupt"),
        (header(string(b"k") + struct.pack("<IIQ", 9, 8, 2**62), num_keys=1), ValueError, "truncated or corrupt"),
        (header(*[string(b"k") + struct.pack("<IB", 0, 1)] * 2, num_keys=2), ValueError, "'k' appears twice"),
        (
            header(string(b"general.alignment") + struct.pack("<II", 4, 0), num_keys=1),
            ValueError,
            "general.alignment must be >= 1, got 0",
        ),
        (header(tensor_line(b"w", (32,) * 5, 0, 0), num_tensors=1), ValueError, "1 to 4 dimensions, got 5"),
        (header(tensor_line(b"w", (0,), 0, 0), num_tensors=1), ValueError, "positive multiple of 1"),
        (header(tensor_line(b"w", (33,), 2, 0), num_tensors=1), ValueError, "positive multiple of 32"),
        (header(tensor_line(b"w", (32,), 777, 0), num_tensors=1), NotImplementedError, "unknown ggml type 777"),
        (header(tensor_line(b"w", (2**40, 2**40), 0, 0), num_tensors=1), ValueError, "tensor 'w' ends at byte"),
        (header(tensor_line(b"w", (32,), 0, 2**63), num_tensors=1), ValueError, "tensor 'w' ends at byte"),
        (
            header(*[tensor_line(b"w", (8,), 0, 0)] * 2, bytes(64), num_tensors=2),
            ValueError,
            "tensor 'w' appears twice",
        ),
    ],
)  # fmt: skip
def test_corrupt_header_is_a_clear_error(tmp_path: Path, content: bytes, error: type[Exception], message: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(error, match=message) as raised:
        GgufFile(path)
    assert str(path) in str(raised.value)


def test_missing_file_is_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.gguf"):
        GgufFile(tmp_path / "absent.gguf")


def test_type_that_cannot_be_dequantised_is_named(tmp_path: Path) -> None:
    path = write_file(tmp_path / "q8k.gguf", {"w": (np.zeros((1, 292), dtype=np.uint8), GgmlType.Q8_K)})
    with pytest.raises(NotImplementedError, match=r"q8k\.gguf: tensor 'w' has the type Q8_K"):
        GgufFile(path).read_into("w", torch.empty(1, 256))


def test_metadata_of_another_kind_is_an_error_naming_the_key(small_file: Path) -> None:
    file = GgufFile(small_file)
    with pytest.raises(ValueError, match=r"'llama\.absent' is missing"):
        file.get("llama.absent", int)
    with pytest.raises(ValueError, match=r"'general\.architecture' must be of type int, got 'llama'"):
        file.get("general.architecture", int)
    with pytest.raises(ValueError, match=r"'tokenizer\.ggml\.tokens' must be an array of int"):
        file.get_list("tokenizer.ggml.tokens", int)
    with pytest.raises(ValueError, match=r"'llama\.absent' is missing"):
        file.get_list("llama.absent", int)
