"""Every family's logits against transformers' own model, from the files that transformers saves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mixattn.config import EngineConfig
from mixattn.models.hf_config import read_model_config
from mixattn.models.loader import LoadedModel, load_model
from tests.models.hf_models import (
    CONFIGS,
    edit_json,
    random_model,
    random_sequences,
    reference_logits,
    save_model,
    to_version_4,
)
from tests.models.running import PagedRun, logits_in_steps

SEQUENCE_LENS = (61, 40, 1, 18)
CUTS = (13, 14, 15, 40, 41)  # a prefill chunk, two single rows beside the others' ends, a long chunk, ...
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}  # float32, logits of magnitude 1


def load(folder: Path, **options: Any) -> LoadedModel:
    return load_model(EngineConfig(str(folder), **options), show_progress=False)


def check_logits(logits: list[Tensor], expected: list[Tensor]) -> None:
    for ours, reference in zip(logits, expected, strict=True):
        assert reference.std() > 0.1  # a comparison of noise would pass anything
        torch.testing.assert_close(ours, reference, **TOLERANCE)


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_over_chunks_and_decodes_equal_transformers(tmp_path: Path, name: str, version: int) -> None:
    reference = random_model(name)
    folder = save_model(reference, tmp_path)
    if version == 4:
        edit_json(folder / "config.json", to_version_4)
    sequences = random_sequences(reference.config.vocab_size, SEQUENCE_LENS)
    expected = [reference_logits(reference, sequence) for sequence in sequences]
    loaded = load(folder)
    assert loaded.dtype == torch.float32
    check_logits(logits_in_steps(loaded.model, sequences, CUTS), expected)
    check_logits(logits_in_steps(loaded.model, sequences, ()), expected)


def test_logits_of_single_row_decodes_equal_transformers(tmp_path: Path) -> None:
    reference = random_model("mistral-window")
    loaded = load(save_model(reference, tmp_path))
    (sequence,) = random_sequences(320, (30,))
    run = PagedRun(loaded.model, 1, 30, page_size=1)
    rows = [run.step([[token]])[0] for token in sequence]
    check_logits([torch.cat(rows)], [reference_logits(reference, sequence)])


def test_sharded_checkpoint_loads_as_the_whole_one(tmp_path: Path) -> None:
    reference = random_model("qwen3")
    whole = load(save_model(reference, tmp_path / "whole"))
    folder = save_model(reference, tmp_path / "shards", max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    sharded = load(folder)
    for (name, ours), (_, other) in zip(sharded.model.weight_slots(), whole.model.weight_slots(), strict=True):
        assert torch.equal(ours, other), name


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_logits_stay_close_to_transformers_float32(tmp_path: Path, name: str, dtype: str) -> None:
    """No worse than twice transformers' own error in that dtype, row by row, plus a floor of one rounding."""
    reference = random_model(name)
    folder = save_model(reference, tmp_path)
    loaded = load(folder, dtype=dtype)
    assert loaded.dtype == getattr(torch, dtype)
    assert all(slot.dtype == loaded.dtype for _, slot in loaded.model.weight_slots())
    sequences = random_sequences(320, (33, 20))
    run = PagedRun(loaded.model, 2, 33, dtype=loaded.dtype)
    expected = [reference_logits(reference, sequence) for sequence in sequences]
    half = reference.to(loaded.dtype)
    for ours, truth, sequence in zip(run.step(sequences), expected, sequences, strict=True):
        error = (ours - truth).abs().amax(-1)
        eager_error = (reference_logits(half, sequence) - truth).abs().amax(-1)
        floor = 2 * torch.finfo(loaded.dtype).eps * truth.abs().amax(-1)
        assert (error <= 2 * eager_error + floor).all()


def test_config_of_each_family_has_its_options(tmp_path: Path) -> None:
    configs = {}
    for name, make in CONFIGS.items():
        make().save_pretrained(tmp_path / name)
        edit_json(tmp_path / name / "config.json", lambda values: values.update(model_type=values["model_type"]))
        configs[name] = read_model_config(tmp_path / name)
    assert configs["llama-mha-bias-tied"].has_qkv_bias and configs["llama-mha-bias-tied"].has_o_bias
    assert configs["llama-mha-bias-tied"].has_tied_embeddings and not configs["llama"].has_tied_embeddings
    assert configs["mistral-window"].window_left == (6, 6, 6)
    assert configs["mistral-full"].window_left == (None, None, None)
    assert configs["mistral-window"].architecture == "llama"
    assert configs["qwen2"].has_qkv_bias and not configs["qwen2"].has_o_bias
    assert configs["qwen2-mixed-windows"].window_left == (None, 8, 8)
    assert configs["qwen3"].has_qk_norm and configs["qwen3"].head_dim == 24
    assert configs["llama-rope-linear"].rope.frequency_factors == (4.0,) * 8
    assert configs["llama"].max_model_len == 256
    factors = configs["llama-rope-llama3"].rope.frequency_factors
    assert factors is not None and factors[0] == 1.0 and 1.0 < factors[1] < 8.0 and factors[2:] == (8.0,) * 6


def write_config(folder: Path, **changes: Any) -> Path:
    CONFIGS["llama"]().save_pretrained(folder)
    edit_json(folder / "config.json", lambda values: values.update(changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model_type": "gpt2"}, NotImplementedError, "model_type 'gpt2' is not supported; supported: llama, mistral"),
        ({"model_type": None}, ValueError, "model_type is missing"),
        ({"hidden_size": None}, ValueError, "hidden_size is missing"),
        ({"hidden_size": "64"}, ValueError, "hidden_size must be an integer > 0, got '64'"),
        ({"num_hidden_layers": 0}, ValueError, "num_hidden_layers must be an integer > 0, got 0"),
        ({"num_key_value_heads": 3}, ValueError, r"num_q_heads \(4\) must be a multiple of num_kv_heads \(3\)"),
        ({"rms_norm_eps": "x"}, ValueError, "rms_norm_eps must be a number"),
        ({"tie_word_embeddings": 1}, ValueError, "tie_word_embeddings must be true or false, got 1"),
        ({"hidden_act": "gelu"}, NotImplementedError, "hidden_act 'gelu' is not supported; supported: silu"),
        ({"mlp_bias": True}, NotImplementedError, "mlp_bias"),
        ({"quantization_config": {"quant_method": "gptq"}}, NotImplementedError, "quantization_config"),
        ({"eos_token_id": ["2"]}, ValueError, "eos_token_id must be an integer or a list of integers"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}},
            NotImplementedError,
            "rope type 'yarn' is not supported; supported: default, linear, llama3",
        ),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, NotImplementedError, "per layer type"),
        ({"partial_rotary_factor": 0.5}, NotImplementedError, "partial_rotary_factor 0.5 is not supported"),
        ({"rope_parameters": {"rope_type": "linear"}}, ValueError, "factor is missing"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, ValueError, "factor must be > 0 and finite, got 0"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}},
            ValueError,
            "0 < low_freq_factor < high_freq_factor, got 4.0 and 1.0",
        ),
        ({"rope_parameters": {"rope_theta": -1}}, ValueError, "rope theta must be > 0, got -1.0"),
    ],
)
def test_config_out_of_bounds_is_an_error_naming_file_and_key(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    write_config(tmp_path, **changes)
    with pytest.raises(error, match=message) as raised:
        read_model_config(tmp_path)
    assert str(tmp_path / "config.json") in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 8, "max_window_layers": "x"}, "max_window_layers must be an integer, got 'x'"),
        ({"sliding_window": 8, "layer_types": ["full_attention"]}, "layer_types must hold 3 of"),
        (
            {"sliding_window": 8, "layer_types": ["full_attention", "chunked", "full_attention"]},
            "layer_types must hold",
        ),
        ({"sliding_window": 0}, "sliding_window must be an integer > 0, got 0"),
    ],
)
def test_qwen_windows_out_of_bounds_are_errors(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    CONFIGS["qwen2"]().save_pretrained(tmp_path)
    edit_json(
        tmp_path / "config.json",
        lambda values: values.update({"layer_types": None, "use_sliding_window": True} | changes),
    )
    with pytest.raises(ValueError, match=message):
        read_model_config(tmp_path)


def test_eos_ids_come_from_generation_config_before_config(tmp_path: Path) -> None:
    write_config(tmp_path, eos_token_id=2, bos_token_id=1)
    assert read_model_config(tmp_path).eos_token_ids == {2}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    config = read_model_config(tmp_path)
    assert config.eos_token_ids == {7, 9} and config.bos_token_id == 1


def test_config_that_is_no_json_object_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[1, 2")
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"config\.json: must hold a JSON object, got list"):
        read_model_config(tmp_path)
