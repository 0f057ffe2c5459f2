"""Whole GGUF models: names, the row order of q and k, rope factors; logits against the model that was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as GgmlType

from mixattn.config import EngineConfig
from mixattn.models.gguf import GgufFile
from mixattn.models.gguf_model import canonical_name, gguf_model_config, gguf_name
from mixattn.models.loader import LoadedModel, load_model
from tests.models.gguf_files import write_model
from tests.models.hf_models import random_model, random_sequences, reference_logits
from tests.models.running import logits_in_steps

SEQUENCE_LENS = (37, 12)
CUTS = (11, 12)


def load(path: Path, **options: Any) -> LoadedModel:
    return load_model(EngineConfig(str(path), **options), show_progress=False)


def check_logits(loaded: LoadedModel, reference: Any, **tolerance: float) -> None:
    sequences = random_sequences(reference.config.vocab_size, SEQUENCE_LENS)
    for ours, sequence in zip(logits_in_steps(loaded.model, sequences, CUTS), sequences, strict=True):
        expected = reference_logits(reference, sequence)
        assert expected.std() > 0.1
        torch.testing.assert_close(ours, expected, **{"rtol": 1e-4, "atol": 2e-5, **tolerance})


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        ("llama", "llama"),
        ("llama-mha-bias-tied", "llama"),
        ("llama-head-dim", "llama"),
        ("qwen2", "qwen2"),
        ("qwen3", "qwen3"),
    ],
)
def test_logits_of_a_gguf_file_equal_the_model_it_was_made_from(tmp_path: Path, name: str, arch: str) -> None:
    reference = random_model(name)
    write_model(tmp_path / "m.gguf", reference, arch=arch)
    check_logits(load(tmp_path / "m.gguf"), reference)


@pytest.mark.parametrize("kind", [GgmlType.F16, GgmlType.BF16, GgmlType.Q8_0, GgmlType.Q4_0, GgmlType.Q4_1])
def test_logits_of_a_quantised_file_equal_the_model_with_the_rounded_weights(tmp_path: Path, kind: GgmlType) -> None:
    reference = random_model("llama")
    rounded = write_model(tmp_path / "m.gguf", reference, arch="llama", ggml_type=kind)
    reference.load_state_dict({name: torch.from_numpy(values.copy()) for name, values in rounded.items()})
    check_logits(load(tmp_path / "m.gguf"), reference)


def test_rope_freqs_tensor_gives_the_frequency_factors(tmp_path: Path) -> None:
    reference = random_model("llama-rope-llama3")
    inverse_frequencies = reference.model.rotary_emb.inv_freq
    plain = 1.0 / 500000.0 ** (torch.arange(0, 16, 2).float() / 16)
    factors = (plain / inverse_frequencies).numpy()
    assert factors.max() > 7.9 and factors.min() < 1.1
    write_model(
        tmp_path / "m.gguf", reference, arch="llama", extra_tensors={"rope_freqs.weight": factors.astype(np.float32)}
    )
    loaded = load(tmp_path / "m.gguf")
    assert loaded.config.rope.frequency_factors == tuple(factors.tolist())
    check_logits(loaded, reference)


def test_linear_rope_scaling_in_the_metadata_is_applied(tmp_path: Path) -> None:
    reference = random_model("llama-rope-linear")
    write_model(
        tmp_path / "m.gguf",
        reference,
        arch="llama",
        metadata={"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    )
    check_logits(load(tmp_path / "m.gguf"), reference)


def test_sliding_window_in_the_metadata_is_applied(tmp_path: Path) -> None:
    reference = random_model("mistral-window")
    write_model(tmp_path / "m.gguf", reference, arch="llama", metadata={"attention.sliding_window": 7})
    check_logits(load(tmp_path / "m.gguf"), reference)


def test_transformers_reads_the_files_of_these_tests_as_meant(tmp_path: Path) -> None:
    """The writer above is the tests' own; transformers' reader vouches for its tensor names and row order."""
    from transformers import AutoModelForCausalLM

    reference = random_model("llama")
    write_model(tmp_path / "m.gguf", reference, arch="llama")
    read = AutoModelForCausalLM.from_pretrained(str(tmp_path), gguf_file="m.gguf", dtype=torch.float32)
    state = read.state_dict()
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=0, msg=name)


def test_names_map_both_ways() -> None:
    pairs = {
        "model.embed_tokens.weight": "token_embd.weight",
        "lm_head.weight": "output.weight",
        "model.norm.weight": "output_norm.weight",
        "model.layers.12.self_attn.q_proj.bias": "blk.12.attn_q.bias",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
    }
    for name, stored in pairs.items():
        assert gguf_name(name) == stored
        assert canonical_name(stored) == name
    assert canonical_name("blk.0.ffn_gate_inp.weight") == "blk.0.ffn_gate_inp.weight"


def test_dtype_on_request_is_that_of_all_weights(tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf", random_model("llama"), arch="llama")
    loaded = load(tmp_path / "m.gguf", dtype="bfloat16")
    assert loaded.dtype == torch.bfloat16
    assert all(slot.dtype == torch.bfloat16 for _, slot in loaded.model.weight_slots())
    assert load(tmp_path / "m.gguf").dtype == torch.float32


@pytest.mark.parametrize(
    ("metadata", "error", "message"),
    [
        ({"block_count": None}, ValueError, r"'llama\.block_count' is missing"),
        ({"block_count": 0}, ValueError, "block_count, head_count and embedding_length must be >= 1, got 0"),
        ({"attention.head_count_kv": 3}, ValueError, r"num_q_heads \(4\) must be a multiple of num_kv_heads \(3\)"),
        ({"embedding_length": "64"}, ValueError, r"'llama\.embedding_length' must be of type int, got '64'"),
        ({"rope.scaling.type": "yarn"}, NotImplementedError, "rope scaling 'yarn' is not supported; supported: none"),
        ({"rope.scaling.type": "linear"}, ValueError, r"'llama\.rope\.scaling\.factor' is missing"),
        (
            {"rope.scaling.type": "linear", "rope.scaling.factor": 0.0},
            ValueError,
            "rope scaling's factors must be > 0 and finite",
        ),
        ({"expert_count": 8}, NotImplementedError, "mixtures of experts"),
        ({"feed_forward_length": 95}, ValueError, r"'blk\.0\.ffn_gate\.weight' must have the shape \[95, 64\]"),
        ({"embedding_length": 32}, ValueError, r"must have the shape \[320, 32\], got \[320, 64\]"),
    ],
)  # fmt: skip
def test_metadata_that_does_not_fit_is_an_error_naming_the_file(
    tmp_path: Path, metadata: dict[str, Any], error: type[Exception], message: str
) -> None:
    path = tmp_path / "m.gguf"
    write_model(path, random_model("llama"), arch="llama", metadata=metadata)
    with pytest.raises(error, match=message) as raised:
        load(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"leave_out": ["blk.1.attn_q.weight"]}, r"'blk\.1\.attn_q\.weight' is missing \(1 of \d+ tensors are\)"),
        ({"leave_out": ["token_embd.weight"]}, r"tensor 'token_embd\.weight' is missing"),
        (
            {"extra_tensors": {"blk.0.ffn_gate_inp.weight": np.zeros((2, 32), np.float32)}},
            r"tensor 'blk\.0\.ffn_gate_inp\.weight' has no place in this architecture",
        ),
        (
            {"extra_tensors": {"rope_freqs.weight": np.ones(4, np.float32)}},
            r"'rope_freqs\.weight' must have the shape \[8\], got \[4\]",
        ),
        (
            {"extra_tensors": {"rope_freqs.weight": np.zeros(8, np.float32)}},
            "rope scaling's factors must be > 0 and finite",
        ),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_errors_naming_file_and_tensor(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    path = tmp_path / "m.gguf"
    write_model(path, random_model("llama"), arch="llama", **options)
    with pytest.raises(ValueError, match=message) as raised:
        load(path)
    assert str(path) in str(raised.value)


def test_unsupported_architecture_names_the_supported_ones(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_model(path, random_model("llama"), arch="gemma2")
    with pytest.raises(NotImplementedError, match="'gemma2' is not supported; supported: llama, qwen2, qwen3"):
        gguf_model_config(GgufFile(path))
