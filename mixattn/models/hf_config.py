"""``config.json`` and ``generation_config.json`` as a ``ModelConfig``."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from mixattn.config import ModelConfig, RopeConfig

_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""Hugging Face's model_type to ours."""
_MISTRAL_DEFAULT_WINDOW = 4096
_QWEN3_DEFAULT_HEAD_DIM = 128
_DEFAULT_RMS_NORM_EPS = 1e-6
_DEFAULT_ROPE_THETA = 10000.0


def read_json(path: Path) -> dict[str, Any]:
    """The object in this file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not hold a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(value).__name__}")
    return value


def checkpoint_dtype(folder: Path) -> str:
    """The dtype that config.json names (``dtype``, or ``torch_dtype`` before transformers 5); float32 when none."""
    config = read_json(folder / "config.json")
    return str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")


def read_model_config(folder: Path) -> ModelConfig:
    """The ``ModelConfig`` of a folder in Hugging Face's layout.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: a value is missing, of the wrong type or out of bounds.
        NotImplementedError: the architecture, or an option of it, is not supported.
    """
    path = folder / "config.json"
    fields = _Fields(path, read_json(path))
    model_type = fields.text("model_type")
    if model_type not in _ARCHITECTURES:
        raise NotImplementedError(
            f"{path}: model_type {model_type!r} is not supported; supported: {', '.join(_ARCHITECTURES)}"
        )
    _check_options(fields)
    num_layers = fields.integer("num_hidden_layers")
    num_q_heads = fields.integer("num_attention_heads")
    hidden_size = fields.integer("hidden_size")
    head_dim = fields.integer(
        "head_dim", _QWEN3_DEFAULT_HEAD_DIM if model_type == "qwen3" else hidden_size // num_q_heads
    )
    has_attention_bias = fields.boolean("attention_bias")
    eos_ids = _token_ids(fields, "eos_token_id")
    generation_path = folder / "generation_config.json"
    if generation_path.is_file():
        generation_fields = _Fields(generation_path, read_json(generation_path))
        eos_ids = _token_ids(generation_fields, "eos_token_id") or eos_ids
    try:
        return ModelConfig(
            architecture=_ARCHITECTURES[model_type],
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=fields.integer("intermediate_size"),
            num_layers=num_layers,
            num_q_heads=num_q_heads,
            num_kv_heads=fields.integer("num_key_value_heads", num_q_heads),
            head_dim=head_dim,
            max_model_len=fields.integer("max_position_embeddings"),
            rms_norm_eps=fields.number("rms_norm_eps", _DEFAULT_RMS_NORM_EPS),
            rope=_rope(fields, head_dim),
            has_tied_embeddings=fields.boolean("tie_word_embeddings"),
            has_qkv_bias=model_type == "qwen2" or has_attention_bias,
            has_o_bias=model_type != "qwen2" and has_attention_bias,
            has_qk_norm=model_type == "qwen3",
            window_left=_windows(fields, model_type, num_layers),
            bos_token_id=next(iter(_token_ids(fields, "bos_token_id")), None),
            eos_token_ids=eos_ids,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from error


class _Fields:
    """The values of one JSON object by key; wrong types are errors that name the file and the key."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path = path
        self.values = values

    def _get(self, key: str, default: Any, kinds: type | tuple[type, ...], expected: str) -> Any:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise ValueError(f"{self.path}: {key} is missing")
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise ValueError(f"{self.path}: {key} must be {expected}, got {value!r}")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value: int = self._get(key, default, int, "an integer > 0")
        if value <= 0:
            raise ValueError(f"{self.path}: {key} must be an integer > 0, got {value}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        return float(self._get(key, default, (int, float), "a number"))

    def boolean(self, key: str) -> bool:
        return bool(self._get(key, False, bool, "true or false"))

    def text(self, key: str, default: str | None = None) -> str:
        return str(self._get(key, default, str, "a string"))

    def section(self, key: str) -> _Fields | None:
        """The object under ``key``; None when there is none."""
        value = self._get(key, {}, dict, "an object")
        return _Fields(self.path, value) if value else None


def _check_options(fields: _Fields) -> None:
    """Raises for what changes the arithmetic and is not supported."""
    if fields.section("quantization_config") is not None:
        raise NotImplementedError(
            f"{fields.path}: quantization_config is not supported; supported: float32, float16 and bfloat16 "
            "safetensors, or a GGUF file"
        )
    activation = fields.text("hidden_act", "silu")
    if activation != "silu":
        raise NotImplementedError(f"{fields.path}: hidden_act {activation!r} is not supported; supported: silu")
    if fields.boolean("mlp_bias"):
        raise NotImplementedError(f"{fields.path}: mlp_bias true is not supported; supported: false")


def _token_ids(fields: _Fields, key: str) -> frozenset[int]:
    """The ids under ``key``, which holds one, a list or none."""
    value = fields.values.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(not isinstance(token_id, int) or isinstance(token_id, bool) for token_id in ids):
        raise ValueError(f"{fields.path}: {key} must be an integer or a list of integers, got {value!r}")
    return frozenset(ids)


def _windows(fields: _Fields, model_type: str, num_layers: int) -> tuple[int | None, ...]:
    """``window_left`` of each layer. Hugging Face's sliding_window counts the row's own key, ours does not."""
    full: tuple[int | None, ...] = (None,) * num_layers
    if model_type == "llama":
        return full
    if model_type == "mistral":
        if "sliding_window" in fields.values and fields.values["sliding_window"] is None:
            return full
        return (fields.integer("sliding_window", _MISTRAL_DEFAULT_WINDOW) - 1,) * num_layers
    if not fields.boolean("use_sliding_window") or fields.values.get("sliding_window") is None:
        return full
    window_left = fields.integer("sliding_window") - 1
    layer_types = fields.values.get("layer_types")
    if layer_types is None:
        num_full = fields.values.get("max_window_layers")
        if not isinstance(num_full, int):
            raise ValueError(f"{fields.path}: max_window_layers must be an integer, got {num_full!r}")
        return tuple(window_left if layer_idx >= num_full else None for layer_idx in range(num_layers))
    kinds: dict[str, int | None] = {"full_attention": None, "sliding_attention": window_left}
    if not isinstance(layer_types, list) or len(layer_types) != num_layers or not set(layer_types) <= kinds.keys():
        raise ValueError(
            f"{fields.path}: layer_types must hold {num_layers} of {', '.join(kinds)}, got {layer_types!r}"
        )
    return tuple(kinds[layer_type] for layer_type in layer_types)


def _rope(fields: _Fields, head_dim: int) -> RopeConfig:
    """From ``rope_parameters`` (transformers 5), or ``rope_theta`` and ``rope_scaling`` (before)."""
    rope = fields.section("rope_parameters") or fields.section("rope_scaling") or _Fields(fields.path, {})
    if any(isinstance(value, dict) for value in rope.values.values()):
        raise NotImplementedError(
            f"{fields.path}: rope_parameters per layer type are not supported; supported: the same for all layers"
        )
    theta = rope.number("rope_theta", fields.number("rope_theta", _DEFAULT_ROPE_THETA))
    share = rope.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0))
    if share != 1.0:
        raise NotImplementedError(f"{fields.path}: partial_rotary_factor {share} is not supported; supported: 1.0")
    plain = RopeConfig(theta=theta, rotary_dim=head_dim)
    kind = rope.text("rope_type", rope.text("type", "default"))
    factors: tuple[float, ...] | None = None
    if kind == "linear":
        factors = (_scaling_factor(rope),) * (head_dim // 2)
    elif kind == "llama3":
        factors = _llama3_factors(rope, theta, head_dim, fields.integer("max_position_embeddings"))
    elif kind != "default":
        raise NotImplementedError(
            f"{fields.path}: rope type {kind!r} is not supported; supported: default, linear, llama3"
        )
    return replace(plain, frequency_factors=factors)


def _scaling_factor(rope: _Fields) -> float:
    factor = rope.number("factor")
    if not 0 < factor < math.inf:
        raise ValueError(f"{rope.path}: the rope scaling's factor must be > 0 and finite, got {factor}")
    return factor


def _llama3_factors(rope: _Fields, theta: float, rotary_dim: int, max_positions: int) -> tuple[float, ...]:
    """Divisors of the frequencies: 1 for short waves, ``factor`` for long ones, and smoothly between.

    Source: Llama 3.1's reference code, ``apply_scaling``.
    """
    factor = _scaling_factor(rope)
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    original_positions = rope.integer("original_max_position_embeddings", max_positions)
    if not 0 < low < high:
        raise ValueError(
            f"{rope.path}: rope scaling needs 0 < low_freq_factor < high_freq_factor, got {low} and {high}"
        )

    def divisor(pair_idx: int) -> float:
        wavelength = 2 * math.pi * math.pow(theta, 2 * pair_idx / rotary_dim)
        waves = original_positions / wavelength
        if waves > high:
            return 1.0
        if waves < low:
            return factor
        share = (waves - low) / (high - low)
        return 1 / ((1 - share) / factor + share)

    return tuple(divisor(pair_idx) for pair_idx in range(rotary_dim // 2))
