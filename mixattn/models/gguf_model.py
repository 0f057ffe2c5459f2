"""The decoder in a GGUF file: its ``ModelConfig`` from the metadata, its weights under Hugging Face's names."""

from __future__ import annotations

import re

import gguf
import numpy as np
from torch import Tensor

from mixattn.config import ModelConfig, RopeConfig
from mixattn.models.gguf import GgufFile
from mixattn.ops.linear import QUANTISED_FORMS

_ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""``general.architecture``; the names are ours too."""
_ROPE_FACTORS = "rope_freqs.weight"
"""One divisor per rotated pair, where a converter stores Llama 3's frequency scaling."""

_STEMS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Hugging Face's names to GGUF's, without layer and without ``.weight`` or ``.bias``."""
_STEMS_BACK = {stem: name for name, stem in _STEMS.items()}
_FORMS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", **{form.upper(): form for form in QUANTISED_FORMS}}
"""ggml types to the forms of ``ops.linear``."""
_EOS_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


def gguf_name(name: str) -> str:
    """``model.layers.3.self_attn.q_proj.weight`` as GGUF has it: ``blk.3.attn_q.weight``."""
    stem, kind = name.rsplit(".", 1)
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    if layer:
        return f"blk.{layer[1]}.{_STEMS[layer[2]]}.{kind}"
    return f"{_STEMS[stem]}.{kind}"


def canonical_name(name: str) -> str:
    """The inverse of ``gguf_name``; a name that has no counterpart stays as it is."""
    stem, _, kind = name.rpartition(".")
    layer = re.fullmatch(r"blk\.(\d+)\.(.+)", stem)
    if layer:
        return f"model.layers.{layer[1]}.{_STEMS_BACK[layer[2]]}.{kind}" if layer[2] in _STEMS_BACK else name
    return f"{_STEMS_BACK[stem]}.{kind}" if stem in _STEMS_BACK else name


def gguf_model_config(file: GgufFile) -> ModelConfig:
    """The ``ModelConfig`` that the metadata and the tensors present describe.

    Raises:
        ValueError: a key or a tensor that says so is missing, or a value is out of bounds.
        NotImplementedError: the architecture, or an option of it, is not supported.
    """
    architecture = file.get("general.architecture", str)
    if architecture not in _ARCHITECTURES:
        raise NotImplementedError(
            f"{file.path}: general.architecture {architecture!r} is not supported; supported: "
            f"{', '.join(_ARCHITECTURES)}"
        )
    if file.get(f"{architecture}.expert_count", int, 0):
        raise NotImplementedError(f"{file.path}: mixtures of experts are not supported; supported: dense models")
    num_layers = file.get(f"{architecture}.block_count", int)
    num_q_heads = file.get(f"{architecture}.attention.head_count", int)
    hidden_size = file.get(f"{architecture}.embedding_length", int)
    if min(num_layers, num_q_heads, hidden_size) < 1:
        raise ValueError(
            f"{file.path}: block_count, head_count and embedding_length must be >= 1, got {num_layers}, {num_q_heads} "
            f"and {hidden_size}"
        )
    head_dim = file.get(f"{architecture}.attention.key_length", int, hidden_size // num_q_heads)
    window = file.get(f"{architecture}.attention.sliding_window", int, 0) if architecture == "llama" else 0
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ValueError(f"{file.path}: tensor 'token_embd.weight' is missing")
    eos_ids = (file.metadata.get(f"tokenizer.ggml.{key}") for key in _EOS_KEYS)
    bos_id = file.metadata.get("tokenizer.ggml.bos_token_id")
    try:
        return ModelConfig(
            architecture=architecture,
            vocab_size=embedding.shape[0],
            hidden_size=hidden_size,
            intermediate_size=file.get(f"{architecture}.feed_forward_length", int),
            num_layers=num_layers,
            num_q_heads=num_q_heads,
            num_kv_heads=file.get(f"{architecture}.attention.head_count_kv", int, num_q_heads),
            head_dim=head_dim,
            max_model_len=file.get(f"{architecture}.context_length", int),
            rms_norm_eps=file.get(f"{architecture}.attention.layer_norm_rms_epsilon", float),
            rope=_rope(file, architecture, head_dim),
            has_tied_embeddings="output.weight" not in file.tensors,
            has_qkv_bias="blk.0.attn_q.bias" in file.tensors,
            has_o_bias="blk.0.attn_output.bias" in file.tensors,
            has_qk_norm=architecture == "qwen3",
            window_left=(window - 1,) * num_layers if window else (),
            bos_token_id=bos_id if isinstance(bos_id, int) else None,
            eos_token_ids=frozenset(eos_id for eos_id in eos_ids if isinstance(eos_id, int)),
        )
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}" if str(file.path) not in str(error) else str(error)) from error


def _rope(file: GgufFile, architecture: str, head_dim: int) -> RopeConfig:
    rotary_dim = file.get(f"{architecture}.rope.dimension_count", int, head_dim)
    kind = file.get(f"{architecture}.rope.scaling.type", str, "none")
    factors: tuple[float, ...] | None = None
    if _ROPE_FACTORS in file.tensors:
        tensor = file.tensors[_ROPE_FACTORS]
        if tensor.shape != (rotary_dim // 2,):
            raise ValueError(
                f"{file.path}: tensor {_ROPE_FACTORS!r} must have the shape [{rotary_dim // 2}], "
                f"got {list(tensor.shape)}"
            )
        values = gguf.dequantize(file.packed(_ROPE_FACTORS), tensor.ggml_type)
        factors = tuple(float(value) for value in values)
    elif kind == "linear":
        factors = (file.get(f"{architecture}.rope.scaling.factor", float),) * (rotary_dim // 2)
    elif kind != "none":
        raise NotImplementedError(
            f"{file.path}: rope scaling {kind!r} is not supported; supported: none, linear, and factors in the tensor "
            f"{_ROPE_FACTORS!r}"
        )
    if factors is not None and not all(0 < factor < np.inf for factor in factors):
        raise ValueError(f"{file.path}: the rope scaling's factors must be > 0 and finite")
    return RopeConfig(
        theta=file.get(f"{architecture}.rope.freq_base", float, 10000.0),
        rotary_dim=rotary_dim,
        frequency_factors=factors,
    )


class GgufWeights:
    """The file's tensors as a ``WeightSource``.

    llama.cpp rotates neighbouring dimensions, so converters of the llama architecture interleave the halves of every
    head in the rows of q and k. That is undone here: the weights, and the arithmetic, are the original model's.
    """

    def __init__(self, file: GgufFile, config: ModelConfig) -> None:
        self.location = str(file.path)
        self._file = file
        self._num_heads = (
            {"attn_q": config.num_q_heads, "attn_k": config.num_kv_heads} if config.architecture == "llama" else {}
        )
        self._stored_names = {canonical_name(name): name for name in file.tensors if name != _ROPE_FACTORS}

    def names(self) -> set[str]:
        return set(self._stored_names)

    def stored_name(self, name: str) -> str:
        return self._stored_names.get(name) or gguf_name(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file.tensors[self._stored_names[name]].shape

    def form(self, name: str) -> str:
        return _FORMS.get(self._file.tensors[self._stored_names[name]].ggml_type.name, "float32")

    def read_into(self, name: str, destination: Tensor) -> None:
        stored = self._stored_names[name]
        num_heads = self._num_heads.get(stored.split(".")[-2])
        if num_heads is None:
            self._file.read_into(stored, destination)
            return
        interleaved = destination.new_empty(destination.shape)
        self._file.read_into(stored, interleaved)
        # [heads, pairs, 2, ...] -> [heads, 2, pairs, ...]
        pairs = interleaved.view(num_heads, -1, 2, *destination.shape[1:])
        destination.view(num_heads, 2, -1, *destination.shape[1:]).copy_(pairs.transpose(1, 2))
