"""The 135M model's real weights, against transformers' reading of the same file."""

from __future__ import annotations

from typing import Any

import torch

from mixattn.models.loader import LoadedModel
from tests.models.hf_models import reference_logits
from tests.models.running import logits_in_steps

PROMPTS = (
    "The three laws of robotics are",
    "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n    return",
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
)


def test_weights_equal_transformers_bit_for_bit(smollm2: LoadedModel, smollm2_reference: Any) -> None:
    state = smollm2_reference.state_dict()
    slots = dict(smollm2.model.weight_slots())
    assert slots.keys() == state.keys() - {"lm_head.weight"}
    for name, slot in slots.items():
        assert torch.equal(slot, state[name]), name


def test_logits_equal_transformers(smollm2: LoadedModel, smollm2_reference: Any) -> None:
    sequences = [smollm2.tokenizer.encode(prompt) for prompt in PROMPTS]
    for ours, sequence in zip(logits_in_steps(smollm2.model, sequences, (5, 6)), sequences, strict=True):
        expected = reference_logits(smollm2_reference, sequence)
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=2e-3)  # logits up to 30 in magnitude, float32
        assert torch.equal(ours.argmax(-1), expected.argmax(-1))


def test_shape_of_the_model_is_that_of_the_metadata(smollm2: LoadedModel, smollm2_reference: Any) -> None:
    ours, config = smollm2.config, smollm2_reference.config
    assert (ours.num_layers, ours.hidden_size, ours.intermediate_size) == (
        config.num_hidden_layers, config.hidden_size, config.intermediate_size,
    )  # fmt: skip
    assert (ours.num_q_heads, ours.num_kv_heads, ours.head_dim) == (9, 3, 64)
    assert ours.rope.theta == config.rope_parameters["rope_theta"] == 100000.0
    assert ours.max_model_len == config.max_position_embeddings == 8192
    assert ours.has_tied_embeddings and ours.window_left == (None,) * 30
