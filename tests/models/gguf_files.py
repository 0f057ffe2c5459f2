"""GGUF files as llama.cpp's converters write them, made by the ``gguf`` package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as GgmlType
from torch import Tensor
from transformers import PreTrainedModel

from mixattn.models.gguf_model import gguf_name

CONTROL, NORMAL, USER_DEFINED = 3, 1, 4


def byte_vocabulary() -> tuple[list[str], list[int]]:
    """The tokens and types of a byte-level vocabulary: 256 bytes, then begin, end and a user-defined token."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [*sorted(ByteLevel.alphabet()), "<|begin|>", "<|end|>", "<think>"]
    return tokens, [NORMAL] * 256 + [CONTROL, CONTROL, USER_DEFINED]


def add_byte_level_tokenizer(
    writer: gguf.GGUFWriter,
    *,
    tokens: Sequence[str] | None = None,
    merges: Sequence[str] = (),
    pre: str | None = "gpt-2",
    chat_template: str | None = None,
) -> None:
    own_tokens, types = byte_vocabulary()
    tokens = tokens or [*own_tokens, own_tokens[0] + own_tokens[1]]
    types = types + [NORMAL] * (len(tokens) - len(types))
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(list(merges) or [f"{tokens[0]} {tokens[1]}"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    if chat_template is not None:
        writer.add_chat_template(chat_template)


def interleave_halves(weights: np.ndarray, num_heads: int) -> np.ndarray:
    """The rows of q or k as converters of the llama architecture store them: a head's halves become pairs."""
    halves = weights.reshape(num_heads, 2, -1, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def write_model(
    path: Path,
    model: PreTrainedModel,
    *,
    arch: str,
    ggml_type: GgmlType = GgmlType.F32,
    extra_tensors: Mapping[str, np.ndarray] | None = None,
    leave_out: Sequence[str] = (),
    metadata: Mapping[str, Any] | None = None,
) -> dict[str, np.ndarray]:
    """Writes ``model``; returns each matrix's values after the rounding of ``ggml_type``, by Hugging Face name.

    Args:
        leave_out: GGUF names of tensors that are not written.
        metadata: further keys without the prefix of the architecture; a value None leaves the key out.
    """
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = gguf.GGUFWriter(str(path), arch)
    keys: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "rope.dimension_count": head_dim,
        **(metadata or {}),
    }
    for key, value in keys.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}.get(type(value))
        if add is not None:
            add(f"{arch}.{key}", value)
    add_byte_level_tokenizer(writer)
    rounded = {}
    for name, tensor in unique_tensors(model).items():
        values = tensor.float().numpy()
        kind = ggml_type if values.ndim == 2 else GgmlType.F32
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        stored = interleave_halves(values, heads) if arch == "llama" and heads else values
        packed = gguf.quantize(np.ascontiguousarray(stored), kind)
        rounded[name] = gguf.quantize(values, kind)
        rounded[name] = gguf.dequantize(rounded[name], kind).reshape(values.shape)
        if gguf_name(name) not in leave_out:
            writer.add_tensor(gguf_name(name), packed, raw_dtype=kind)
    for name, values in (extra_tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return rounded


def unique_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's tensors by name, without the output matrix where it is the embedding matrix."""
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return tensors


def random_blocks(ggml_type: GgmlType, num_blocks: int, seed: int) -> np.ndarray:
    """Packed blocks with random quants and finite scales: [num_blocks * type_size] uint8.

    Every field of these formats that is a float16 is given a small value of its own; all other bits are random.
    """
    _, type_size = gguf.GGML_QUANT_SIZES[ggml_type]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, size=(num_blocks, type_size), dtype=np.uint8)
    for offset in HALF_OFFSETS[ggml_type]:
        scales = rng.uniform(-0.1, 0.1, num_blocks).astype(np.float16)
        blocks[:, offset : offset + 2] = scales.view(np.uint8).reshape(num_blocks, 2)
    return blocks.reshape(-1)


HALF_OFFSETS = {
    GgmlType.Q8_0: (0,),
    GgmlType.Q4_0: (0,),
    GgmlType.Q4_1: (0, 2),
    GgmlType.Q5_0: (0,),
    GgmlType.Q5_1: (0, 2),
    GgmlType.Q2_K: (80, 82),
    GgmlType.Q3_K: (108,),
    GgmlType.Q4_K: (0, 2),
    GgmlType.Q5_K: (0, 2),
    GgmlType.Q6_K: (208,),
}
"""Bytes at which a block's float16 scales begin. Source: ggml/src/ggml-common.h."""
