"""Forms of the weights: what loses nothing and what loses little, on a text that no model has seen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.lib.quality import TEXT, greedy_agreement, perplexity, text_logits
from mixattn.config import EngineConfig
from mixattn.models.loader import LoadedModel, load_model
from tests.models.hf_models import random_model, save_model

NUM_TOKENS = 256


def load(quantization: str, model: str = "smollm2", **options: str) -> LoadedModel:
    return load_model(EngineConfig(model, quantization=quantization, **options), show_progress=False)


@pytest.fixture(scope="module")
def token_ids(smollm2: LoadedModel) -> list[int]:
    return smollm2.tokenizer.encode(TEXT.read_text())[:NUM_TOKENS]


@pytest.fixture(scope="module")
def exact(token_ids: list[int]) -> Tensor:
    return text_logits(load("none"), token_ids)


def test_auto_loses_nothing_of_a_gguf_file(smollm2: LoadedModel, token_ids: list[int], exact: Tensor) -> None:
    """Its blocks as they are: a fifth of float32's bytes, and the same weights (test_smollm2), summed otherwise."""
    assert {matrix.form for _, matrix in smollm2.model.matrices()} == {"q8_0", "q4_1"}
    logits = text_logits(smollm2, token_ids)
    torch.testing.assert_close(logits, exact, rtol=1e-3, atol=2e-3)
    assert greedy_agreement(logits, exact) == 1.0


def test_int8_stays_close_to_exact_weights(token_ids: list[int], exact: Tensor) -> None:
    """Measured, 2026-11-25: 0.969 of the 256 positions prefer the same token."""
    logits = text_logits(load("int8"), token_ids)
    assert not torch.equal(logits, exact)
    assert perplexity(logits, token_ids) < 1.02 * perplexity(exact, token_ids)
    assert greedy_agreement(logits, exact) > 0.94


def test_int4_of_a_file_that_is_int4_loses_nothing(token_ids: list[int], exact: Tensor) -> None:
    """Rounding finds the 16 levels of each group that the file's own rounding made."""
    loaded = load("int4")
    assert {matrix.form for _, matrix in loaded.model.matrices()} == {"q8_0", "q4_1"}
    assert perplexity(text_logits(loaded, token_ids), token_ids) < 1.02 * perplexity(exact, token_ids)


@pytest.mark.parametrize("quantization", ["auto", "int8"])
def test_rounded_activations_stay_close_to_exact_ones(token_ids: list[int], exact: Tensor, quantization: str) -> None:
    loaded = load(quantization, activation_dtype="int8")
    assert all(matrix.packed is not None and matrix.packed.rounds_x for _, matrix in loaded.model.matrices())
    logits = text_logits(loaded, token_ids)
    assert not torch.equal(logits, text_logits(load(quantization), token_ids))
    assert perplexity(logits, token_ids) < 1.02 * perplexity(exact, token_ids)
    assert greedy_agreement(logits, exact) > 0.94


def test_rounded_activations_leave_float_matrices_as_they_are(token_ids: list[int], exact: Tensor) -> None:
    assert torch.equal(text_logits(load("none", activation_dtype="int8"), token_ids), exact)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_auto_keeps_the_dtype_of_a_checkpoint_and_computes_in_float32(tmp_path, dtype: str) -> None:  # type: ignore[no-untyped-def]
    reference = random_model("llama").to(getattr(torch, dtype))
    loaded = load("auto", str(save_model(reference, tmp_path)))
    assert loaded.dtype == torch.float32
    assert {matrix.form for _, matrix in loaded.model.matrices()} == {dtype}
    state = reference.state_dict()
    for name, values in loaded.model.weight_slots():
        assert torch.equal(values, state[name].float()), name


def test_quantization_that_cannot_be_had_names_the_nearest() -> None:
    with pytest.raises(NotImplementedError, match=r"quantization 'int8' needs float32 on the CPU, got torch\.bfloat16"):
        load("int8", "tiny-llama", load_format="dummy", dtype="bfloat16")
    with pytest.raises(ValueError, match="quantization must be one of none, auto, int8, int4, got 'fp8'"):
        EngineConfig("smollm2", quantization="fp8")
    with pytest.raises(NotImplementedError, match=r"activation_dtype 'int8' needs float32 on the CPU, got torch\.bf"):
        load("auto", "tiny-llama", load_format="dummy", dtype="bfloat16", activation_dtype="int8")
    with pytest.raises(ValueError, match="activation_dtype must be one of float32, int8, got 'int4'"):
        EngineConfig("smollm2", activation_dtype="int4")
