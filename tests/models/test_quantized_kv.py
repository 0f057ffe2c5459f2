"""What a quantised KV cache does to a real model: next-token distributions and greedy text beside float32's.

Bounds stand 3 to 4 times off what was measured over the first 400 tokens of LICENSE and of README.md (2026-11, AVX2).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mixattn.config import CacheConfig, EngineConfig
from mixattn.engine.llm import LLM
from mixattn.executor.kv_pool import kv_dtype
from mixattn.models.loader import LoadedModel
from mixattn.types import SamplingParams
from tests.models.running import PagedRun

TEXT = Path(__file__).resolve().parents[2] / "LICENSE"
NUM_TOKENS = 200
CHUNKS = (100, 1, 1, 1, 97)
"""Decodes read what a chunk has stored, and a chunk reads what decodes have."""

# Mean KL divergence of the next token from float32's (nats), at most; share of positions with the same most likely next
# token, at least. Measured, the worse of both texts: bfloat16 7e-5, 0.998; float16 9e-7, 1; int8 1.7e-3, 0.980;
# fp8_e4m3 1.5e-2, 0.943; fp8_e5m2 5.1e-2, 0.888; int4 0.49, 0.63 (a row of 64 elements on 15 values).
BOUNDS = {
    "bfloat16": (3e-4, 0.98),
    "float16": (5e-6, 0.99),
    "int8": (6e-3, 0.95),
    "fp8_e4m3": (5e-2, 0.88),
    "fp8_e5m2": (0.15, 0.80),
    "int4": (1.5, 0.45),
}


def log_probabilities(loaded: LoadedModel, dtype: torch.dtype) -> Tensor:
    """[NUM_TOKENS, vocab_size]: of the token after each of the text's."""
    token_ids = loaded.tokenizer.encode(TEXT.read_text())[:NUM_TOKENS]
    run = PagedRun(loaded.model, 1, NUM_TOKENS, page_size=16, dtype=dtype)
    rows, begin = [], 0
    for num_tokens in CHUNKS:
        rows += run.step([token_ids[begin : begin + num_tokens]])
        begin += num_tokens
    return torch.cat(rows).log_softmax(-1)


@pytest.fixture(scope="module")
def float32_log_probabilities(smollm2: LoadedModel) -> Tensor:
    return log_probabilities(smollm2, torch.float32)


@pytest.mark.parametrize("name", BOUNDS)
def test_next_tokens_with_kv_stored_otherwise_stay_close_to_float32(
    name: str, smollm2: LoadedModel, float32_log_probabilities: Tensor
) -> None:
    ours = log_probabilities(smollm2, kv_dtype(name, torch.float32))
    divergence = (float32_log_probabilities.exp() * (float32_log_probabilities - ours)).sum(-1).mean()
    same = (ours.argmax(-1) == float32_log_probabilities.argmax(-1)).double().mean()
    most_divergence, least_same = BOUNDS[name]
    assert 0 < float(divergence) <= most_divergence
    assert float(same) >= least_same


def test_greedy_text_with_int8_kv_equals_float32_s(smollm2: LoadedModel) -> None:
    texts = []
    for name in ("auto", "int8"):
        config = EngineConfig("smollm2", max_model_len=256, cache=CacheConfig(num_pages=64, kv_cache_dtype=name))
        llm = LLM.from_config(config, smollm2)
        prompts = ["The capital of France is", "To make bread, mix flour, water, salt and"]
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)
        texts.append([output.outputs[0].text for output in outputs])
    assert texts[0] == texts[1]
