"""Tiny random models of transformers, and our loading of what they save."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from mixattn.models.tokenizer import byte_tokenizer

_SHAPE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # puts one of the eight frequencies between the two regimes
}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 5000.0}),
    "llama-mha-bias-tied": lambda: LlamaConfig(
        **{**_SHAPE, "num_key_value_heads": 4}, attention_bias=True, tie_word_embeddings=True
    ),
    "llama-head-dim": lambda: LlamaConfig(**_SHAPE, head_dim=32),
    "llama-rope-llama3": lambda: LlamaConfig(**_SHAPE, rope_parameters=_LLAMA3_ROPE),
    "llama-rope-linear": lambda: LlamaConfig(
        **_SHAPE, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    ),
    "mistral-window": lambda: MistralConfig(**_SHAPE, sliding_window=7),
    "mistral-full": lambda: MistralConfig(**_SHAPE, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**_SHAPE, tie_word_embeddings=True),
    "qwen2-mixed-windows": lambda: Qwen2Config(
        **_SHAPE, use_sliding_window=True, sliding_window=9, max_window_layers=1
    ),
    "qwen3": lambda: Qwen3Config(**_SHAPE, head_dim=24),
    "qwen3-bias": lambda: Qwen3Config(**_SHAPE, head_dim=16, attention_bias=True),
}


def random_model(name: str) -> PreTrainedModel:
    """The model of ``CONFIGS[name]``: every weight random, norms and biases too, scaled so that logits differ."""
    torch.manual_seed(sum(map(ord, name)))
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.3 if key.endswith("bias") else 0.15)
    return model


def save_model(model: PreTrainedModel, folder: Path, *, max_shard_size: str = "10GB") -> Path:
    """Safetensors and config.json as transformers writes them, with a tokenizer of bytes."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    byte_tokenizer().backend.save(str(folder / "tokenizer.json"))
    return folder


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def to_version_4(config: dict[str, Any]) -> None:
    """Rewrites the keys of a config.json as transformers 4 named them."""
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")


@torch.no_grad()
def reference_logits(model: PreTrainedModel, sequence: list[int]) -> Tensor:
    """[len(sequence), vocab_size], without a cache."""
    logits: Tensor = model(torch.tensor([sequence]), use_cache=False).logits[0]
    return logits.float()


def random_sequences(vocab_size: int, lens: tuple[int, ...], seed: int = 5) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lens]
