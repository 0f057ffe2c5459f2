"""Which class runs which architecture, and the tiny configurations that need no checkpoint."""

from __future__ import annotations

from dataclasses import replace

from mixattn.config import ModelConfig, RopeConfig
from mixattn.models.llama import LlamaModel
from mixattn.models.qwen import Qwen2Model, Qwen3Model

MODEL_CLASSES: dict[str, type[LlamaModel]] = {"llama": LlamaModel, "qwen2": Qwen2Model, "qwen3": Qwen3Model}

_TINY = ModelConfig(
    architecture="llama",
    vocab_size=320,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_model_len=2048,
    rms_norm_eps=1e-5,
    rope=RopeConfig(rotary_dim=16),
)

TINY_CONFIGS: dict[str, ModelConfig] = {
    "tiny-llama": _TINY,
    "tiny-mistral": replace(_TINY, window_left=(31, 31)),
    "tiny-qwen2": replace(_TINY, architecture="qwen2", has_qkv_bias=True, has_tied_embeddings=True),
    "tiny-qwen3": replace(_TINY, architecture="qwen3", has_qk_norm=True, head_dim=32, rope=RopeConfig(rotary_dim=32)),
}
"""Models for tests and benchmarks of everything but the arithmetic: ``load_format="dummy"`` with one of these names.
Their tokenizer is bytes."""


def model_class(config: ModelConfig) -> type[LlamaModel]:
    """The class of ``config.architecture``.

    Raises:
        NotImplementedError: there is none.
    """
    if config.architecture not in MODEL_CLASSES:
        raise NotImplementedError(
            f"architecture {config.architecture!r} is not supported; supported: {', '.join(MODEL_CLASSES)}"
        )
    return MODEL_CLASSES[config.architecture]
