"""The offline API on a model of random weights: what goes in, what comes out, and that no page stays behind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from mixattn.config import KV_CACHE_DTYPES, CacheConfig, EngineConfig, PolicyName, SchedulerConfig
from mixattn.engine.llm import LLM
from mixattn.models.loader import LoadedModel, load_model
from mixattn.types import BatchPlan, SamplingParams, StepResult

MODEL = EngineConfig("tiny-llama", load_format="dummy")
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PROMPTS = ["a", "some words", "another prompt, a little longer than the others", "x" * 40]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(MODEL)


def make_llm(loaded: LoadedModel, *, num_pages: int = 64, **scheduler: Any) -> LLM:
    fields = {"max_num_batched_tokens": 64, "max_num_seqs": 16, **scheduler}
    cache, limits = CacheConfig(16, num_pages), SchedulerConfig(**fields)
    config = EngineConfig("tiny-llama", max_model_len=256, cache=cache, scheduler=limits)
    return LLM.from_config(config, loaded)


@pytest.fixture
def llm(loaded: LoadedModel) -> Iterator[LLM]:
    """An engine that must have all its pages back, and nothing to do, when the test is over."""
    llm = make_llm(loaded)
    yield llm
    check_idle(llm)


def check_idle(llm: LLM) -> None:
    core = llm.engine.driver.core
    assert core.stats().num_pages_used == 0
    assert core.stats().num_pages_free == llm.engine.num_pages
    assert not core.has_work


def tokens(llm: LLM, prompts: Any, sampling: Any) -> list[list[int]]:
    return [one.outputs[0].token_ids for one in llm.generate(prompts, sampling, use_tqdm=False)]


def test_generate_every_form_of_a_prompt_gives_the_same(llm: LLM) -> None:
    text = "some words"
    ids = llm.get_tokenizer().encode(text)
    forms = [text, [text], ids, [ids], {"prompt": text}, {"prompt_token_ids": ids}, [{"prompt_token_ids": ids}]]
    results = [llm.generate(form, GREEDY, use_tqdm=False) for form in forms]
    assert all(len(result) == 1 for result in results)
    assert len({tuple(result[0].outputs[0].token_ids) for result in results}) == 1
    assert [result[0].prompt for result in results] == [text, text, None, None, text, None, None]
    assert all(result[0].prompt_token_ids == ids for result in results)


def test_generate_many_prompts_come_back_in_order_with_all_fields(llm: LLM) -> None:
    results = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert [result.prompt for result in results] == PROMPTS
    assert len({result.request_id for result in results}) == len(PROMPTS)
    for result in results:
        (output,) = result.outputs
        assert result.finished
        assert (output.index, output.finish_reason, output.stop_reason) == (0, "length", None)
        assert len(output.token_ids) == 8
        assert output.text == llm.get_tokenizer().decode(output.token_ids)
        assert result.metrics is not None
        assert len(result.metrics.token_times_s) == 8
        assert result.metrics.time_to_first_token_s > 0
        assert all(gap > 0 for gap in result.metrics.inter_token_gaps_s)


def test_generate_one_sampling_per_prompt_is_kept_apart(llm: LLM) -> None:
    sampling = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (1, 5, 3, 2)]
    assert [len(ids) for ids in tokens(llm, PROMPTS, sampling)] == [1, 5, 3, 2]


def test_generate_seeded_requests_draw_the_same_alone_and_in_any_batch(loaded: LoadedModel) -> None:
    sampling = [
        SamplingParams(seed=11, max_tokens=24, ignore_eos=True),
        SamplingParams(seed=12, max_tokens=24, ignore_eos=True, temperature=1.4, top_k=30),
        SamplingParams(seed=13, max_tokens=24, ignore_eos=True, top_p=0.9),
        SamplingParams(seed=14, max_tokens=24, ignore_eos=True, min_p=0.02, frequency_penalty=0.5),
    ]
    together = tokens(make_llm(loaded), PROMPTS, sampling)
    alone = [tokens(make_llm(loaded), p, s)[0] for p, s in zip(PROMPTS, sampling, strict=True)]
    backwards = tokens(make_llm(loaded, max_num_batched_tokens=16), PROMPTS[::-1], sampling[::-1])
    assert together == alone == backwards[::-1]
    assert tokens(make_llm(loaded), PROMPTS[0], SamplingParams(seed=99, max_tokens=24, ignore_eos=True)) != [
        together[0]
    ]


def test_generate_without_seeds_is_reproducible_by_the_engine_s(loaded: LoadedModel) -> None:
    def run(seed: int) -> list[list[int]]:
        scheduler = SchedulerConfig(max_num_batched_tokens=64, max_num_seqs=16)
        llm = LLM.from_config(EngineConfig("tiny-llama", seed=seed, scheduler=scheduler), loaded)
        return tokens(llm, PROMPTS, SamplingParams(max_tokens=8, ignore_eos=True))

    assert run(0) == run(0) != run(1)


def test_generate_n_gives_different_outputs_that_their_seed_fixes(llm: LLM) -> None:
    sampling = SamplingParams(n=3, seed=5, max_tokens=8, ignore_eos=True)
    first, second = (llm.generate(PROMPTS[:2], sampling, use_tqdm=False) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert [output.index for output in one.outputs] == [0, 1, 2]
        assert len({tuple(output.token_ids) for output in one.outputs}) == 3
        assert [o.token_ids for o in one.outputs] == [o.token_ids for o in other.outputs]


def test_generate_stop_string_ends_the_request_and_is_cut_off(llm: LLM) -> None:
    sampling = SamplingParams(seed=1, max_tokens=40, ignore_eos=True)
    whole = llm.generate("a", sampling, use_tqdm=False)[0].outputs[0].text
    stop = whole[10:12]
    sampling = SamplingParams(seed=1, max_tokens=40, ignore_eos=True, stop=stop)
    (output,) = llm.generate("a", sampling, use_tqdm=False)[0].outputs
    assert output.text == whole[: whole.index(stop)]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert len(output.token_ids) < 40


def test_generate_stop_token_ends_the_request_and_is_named(llm: LLM) -> None:
    whole = tokens(llm, "a", GREEDY)[0]
    stop = whole[3]
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, stop_token_ids=[stop])
    (output,) = llm.generate("a", sampling, use_tqdm=False)[0].outputs
    assert output.token_ids == whole[: whole.index(stop) + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)


def test_generate_logit_bias_and_min_tokens_reach_the_sampler(llm: LLM) -> None:
    sampling = SamplingParams(temperature=0, max_tokens=6, logit_bias={65: 100.0}, stop_token_ids=[65], min_tokens=3)
    ids = tokens(llm, "a", sampling)[0]
    assert 65 not in ids[:3]
    assert ids[3:] == [65]


def test_generate_to_the_context_s_end_stops_there(llm: LLM) -> None:
    sampling = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    (result,) = llm.generate("a" * 250, sampling, use_tqdm=False)
    assert len(result.prompt_token_ids) + len(result.outputs[0].token_ids) == 256
    assert result.outputs[0].finish_reason == "length"


def test_generate_more_prompts_than_may_wait_are_all_served(loaded: LoadedModel) -> None:
    llm = make_llm(loaded, max_num_queued_reqs=3, max_num_seqs=2)
    assert [len(ids) for ids in tokens(llm, PROMPTS * 4, GREEDY)] == [8] * 16
    check_idle(llm)


def test_generate_unchunked_policy_gives_the_same_tokens(loaded: LoadedModel) -> None:
    unchunked = make_llm(loaded, policy=PolicyName.PREFILL_FIRST)
    assert tokens(unchunked, PROMPTS, GREEDY) == tokens(make_llm(loaded), PROMPTS, GREEDY)


def test_generate_with_limits_of_time_gives_the_same_tokens(loaded: LoadedModel) -> None:
    llm = make_llm(loaded, policy=PolicyName.TIME_BUDGET, tbt_slo_ms=1e-3)
    assert tokens(llm, PROMPTS, GREEDY) == tokens(make_llm(loaded), PROMPTS, GREEDY)
    with LLM("tiny-llama", load_format="dummy", max_slowdown=3.0, tbt_slo_ms=20.0) as other:
        limits = other.engine.scheduler_config
    assert (limits.policy, limits.max_slowdown, limits.tbt_slo_ms) == (PolicyName.TIME_BUDGET, 3.0, 20.0)


@pytest.mark.parametrize("name", KV_CACHE_DTYPES)
def test_generate_with_kv_of_any_dtype_gives_the_same_tokens_however_prompts_are_batched(
    loaded: LoadedModel, name: str
) -> None:
    def run(budget: int) -> list[list[int]]:
        cache = CacheConfig(16, 64, kv_cache_dtype=name)
        limits = SchedulerConfig(max_num_batched_tokens=budget, max_num_seqs=8)
        llm = LLM.from_config(EngineConfig("tiny-llama", max_model_len=256, cache=cache, scheduler=limits), loaded)
        results = tokens(llm, PROMPTS, GREEDY)
        check_idle(llm)
        return results

    results = run(8)
    assert all(len(result) == GREEDY.max_tokens for result in results)
    assert results == run(64)


def test_stream_grows_token_by_token_to_what_generate_gives(llm: LLM) -> None:
    outputs = list(llm.stream("some words", GREEDY))
    assert [len(one.outputs[0].token_ids) for one in outputs] == list(range(1, 9))
    assert outputs[-1].finished
    assert outputs[-1].outputs[0].token_ids == tokens(llm, "some words", GREEDY)[0]


def test_stream_closed_early_gives_its_pages_back(llm: LLM) -> None:
    stream = llm.stream("some words", SamplingParams(temperature=0, max_tokens=100, ignore_eos=True))
    next(stream)
    assert llm.engine.driver.core.stats().num_pages_used > 0
    stream.close()
    check_idle(llm)


def test_chat_without_a_template_says_so(llm: LLM) -> None:
    with pytest.raises(ValueError, match="chat template"):
        llm.chat([{"role": "user", "content": "hi"}])


def test_chat_renders_one_or_several_conversations(loaded: LoadedModel) -> None:
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
    )
    config = EngineConfig("tiny-llama", load_format="dummy", max_model_len=256, chat_template=template)
    llm = LLM.from_config(config)
    messages = [{"role": "user", "content": "hi"}]
    (one,) = llm.chat(messages, GREEDY, use_tqdm=False)
    assert one.prompt == "<user>hi<bot>"
    two = llm.chat([messages, messages], GREEDY, use_tqdm=False)
    assert [result.outputs[0].token_ids for result in two] == [one.outputs[0].token_ids] * 2
    (bare,) = llm.chat(messages, GREEDY, use_tqdm=False, add_generation_prompt=False)
    assert bare.prompt == "<user>hi"


def test_generate_progress_bar_reads_as_vllm_s(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(PROMPTS, GREEDY)
    shown = capsys.readouterr().err
    assert "Processed prompts: 100%" in shown
    assert "est. speed input: " in shown
    assert "4/4" in shown
    llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ([[]], {}, "prompt_token_ids must hold at least one token"),
        ([1] * 256, {}, "256 tokens.*max_model_len 256"),
        ([1, 2, 320], {}, r"prompt_token_ids must be in \[0, 320\).*320"),
        ([1, -1], {}, r"prompt_token_ids must be in \[0, 320\).*-1"),
        ([1.5], {}, "prompt_token_ids must be a list of integers"),
        ({"text": "a"}, {}, r"prompt or prompt_token_ids, got the keys \['text'\]"),
        ("a", {"logit_bias": {320: 1.0}}, r"logit_bias must be in \[0, 320\)"),
        ("a", {"stop_token_ids": [400]}, r"stop_token_ids must be in \[0, 320\)"),
    ],
)
def test_generate_bad_prompt_is_refused_and_nothing_stays_behind(
    llm: LLM, prompt: Any, sampling: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        llm.generate(["fine", *(prompt if prompt == [[]] else [prompt])], SamplingParams(**sampling), use_tqdm=False)
    check_idle(llm)
    assert len(tokens(llm, "a", GREEDY)[0]) == 8


def test_generate_prompt_larger_than_the_pool_names_both(loaded: LoadedModel) -> None:
    llm = make_llm(loaded, num_pages=3)
    with pytest.raises(ValueError, match=r"100 tokens, which take 7 pages.*KV pool has 3"):
        llm.generate([1] * 100, GREEDY)
    check_idle(llm)


def test_generate_wrong_number_of_samplings_is_refused(llm: LLM) -> None:
    with pytest.raises(ValueError, match="as many as the 4 prompts, got 2"):
        llm.generate(PROMPTS, [GREEDY, GREEDY])


def test_stream_n_of_two_streams_both(llm: LLM) -> None:
    last = list(llm.stream("a", SamplingParams(n=2, seed=3, max_tokens=4, ignore_eos=True)))[-1]
    assert [len(output.token_ids) for output in last.outputs] == [4, 4]


class _Failing:
    """An executor whose third step raises."""

    def __init__(self, inner: Any, error: BaseException) -> None:
        self._inner = inner
        self._error = error
        self._num_steps = 0

    def execute(self, plan: BatchPlan) -> StepResult:
        self._num_steps += 1
        if self._num_steps == 3:
            raise self._error
        return self._inner.execute(plan)


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (KeyboardInterrupt("Ctrl-C"), KeyboardInterrupt, "Ctrl-C"),
        (RuntimeError("device lost"), RuntimeError, "failed: .*device lost"),
    ],
)
def test_generate_step_that_fails_or_is_interrupted_gives_its_pages_back(
    llm: LLM, error: BaseException, raised: type[BaseException], message: str
) -> None:
    driver = llm.engine.driver
    inner = driver._executor
    driver._executor = _Failing(inner, error)
    with pytest.raises(raised, match=message):
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    check_idle(llm)
    driver._executor = inner
    assert len(tokens(llm, "a", GREEDY)[0]) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_model_len": 4096}, "max_model_len must be .*2048"),
        ({"num_gpu_blocks_override": 0}, "num_pages must be >= 1"),
        ({"kv_cache_dtype": "fp16"}, "kv_cache_dtype must be one of auto, float32, .*, int4, got 'fp16'"),
        ({"kv_cache_memory_bytes": 1000}, "kv_cache_memory_bytes must be >= 8192, a page of 16 tokens, got 1000"),
        ({"block_size": 0}, "page_size must be >= 1"),
        ({"max_num_seqs": 32, "max_num_batched_tokens": 16}, r"max_num_batched_tokens \(16\) must be >= max_num_seqs"),
        ({"dtype": "int8"}, "dtype must be"),
        ({"attention_backend": "magic"}, "magic"),
    ],
)
def test_init_bad_argument_is_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM("tiny-llama", load_format="dummy", **arguments)


def test_init_unknown_model_is_refused_by_name() -> None:
    with pytest.raises(FileNotFoundError, match="no-such-model"):
        LLM("no-such-model")


def test_init_small_budget_lowers_the_default_of_max_num_seqs() -> None:
    with LLM("tiny-llama", load_format="dummy", max_num_batched_tokens=16) as llm:
        assert llm.engine.scheduler_config.max_num_seqs == 16


def test_close_frees_the_engine(loaded: LoadedModel) -> None:
    with make_llm(loaded) as llm:
        pass
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate("a")
