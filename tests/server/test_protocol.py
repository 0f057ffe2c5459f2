"""The API's shapes and errors, with a fake engine behind them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from mixattn.engine.client import EngineDeadError, QueueFullError, RequestsAbortedError
from mixattn.server.protocol import ChatCompletionRequest, CompletionRequest
from mixattn.types import FinishReason
from tests.server.fakes import MODEL, FakeEngine, FakeServer

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HELLO = {"messages": [{"role": "user", "content": "Hi"}]}


def test_chat_whole_answer_has_openais_shape() -> None:
    server = FakeServer()
    answer = server.post(CHAT, {**HELLO, "model": MODEL, "max_completion_tokens": 12, "seed": 3}).json()
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == MODEL
    message = {"role": "assistant", "content": "Hello, world", "refusal": None}
    assert answer["choices"] == [{"index": 0, "message": message, "finish_reason": "length", "logprobs": None}]
    prompt = "user:Hi\nassistant:"
    assert server.engine.prompts() == [prompt]
    assert answer["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": 12,
        "total_tokens": len(prompt) + 12,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    (request,) = server.engine.requests
    assert (request.sampling.max_tokens, request.sampling.seed, request.sampling.temperature) == (12, 3, 1.0)
    assert request.eos_token_ids == {257}


def test_chat_stream_has_role_then_text_then_usage() -> None:
    body = {**HELLO, "stream": True, "stream_options": {"include_usage": True}, "n": 2}
    *events, usage = FakeServer().post(CHAT, body).events
    assert {e["object"] for e in events} == {"chat.completion.chunk"}
    assert all(e["usage"] is None and len(e["choices"]) == 1 for e in events)
    choices = [e["choices"][0] for e in events]
    assert [c["delta"] for c in choices[:2]] == [{"role": "assistant", "content": ""}] * 2
    for index in range(2):
        own = [c for c in choices if c["index"] == index]
        assert "".join(c["delta"]["content"] for c in own) == "Hello, world"
        assert [c["finish_reason"] for c in own[-2:]] == [None, "length"]
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 24


def test_stream_without_usage_option_has_no_usage() -> None:
    events = FakeServer().post(COMPLETIONS, {"prompt": "a", "stream": True}).events
    assert all("usage" not in e and e["choices"] for e in events)


def test_stream_with_continuous_usage_counts_up() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = FakeServer().post(COMPLETIONS, {"prompt": "a", "stream": True, "stream_options": options}).events
    assert [e["usage"]["completion_tokens"] for e in events] == [*range(1, 13), 12]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [[256, 64, 65]]),
        (["ab", "c"], [[256, 64, 65], [256, 66]]),
        ([5, 6], [[5, 6]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
    ],
    ids=["text", "texts", "ids", "lists-of-ids"],
)
def test_completion_prompt_takes_all_four_forms(prompt: Any, expected: list[list[int]]) -> None:
    server = FakeServer()
    answer = server.post(COMPLETIONS, {"prompt": prompt, "n": 2}).json()
    assert [list(r.prompt_token_ids) for r in server.engine.requests] == [ids for ids in expected for _ in range(2)]
    assert [c["index"] for c in answer["choices"]] == list(range(2 * len(expected)))
    assert {c["text"] for c in answer["choices"]} == {"Hello, world"}
    assert answer["object"] == "text_completion"
    assert all(r.sampling.max_tokens == 16 for r in server.engine.requests)


def test_choices_of_one_request_have_seeds_of_their_own() -> None:
    server = FakeServer()
    server.post(COMPLETIONS, {"prompt": "a", "n": 3, "seed": 2**63 - 2})
    assert [r.sampling.seed for r in server.engine.requests] == [2**63 - 2, 2**63 - 1, -(2**63)]
    assert len({r.request_id for r in server.engine.requests}) == 3


@pytest.mark.parametrize("is_stream", [False, True])
def test_echo_puts_the_prompt_first(is_stream: bool) -> None:
    answer = FakeServer().post(COMPLETIONS, {"prompt": ["ab ", [65]], "echo": True}, stream="x")
    assert answer.status == 400  # strings and ids do not mix
    answer = FakeServer().post(COMPLETIONS, {"prompt": ["ab ", "c"], "echo": True, "stream": is_stream})
    choices = [e["choices"][0] for e in answer.events] if is_stream else answer.json()["choices"]
    texts = ["".join(c["text"] for c in choices if c["index"] == index) for index in range(2)]
    assert texts == ["ab Hello, world", "cHello, world"]


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("includes_stop", [False, True])
def test_stop_string_across_tokens_ends_text_and_request(is_stream: bool, includes_stop: bool) -> None:
    server = FakeServer(FakeEngine(finish_reason=None))  # it would go on for ever
    body = {
        **HELLO,
        "stop": ["o, w", "zzz"],
        "stream": is_stream,
        "n": 2,
        "include_stop_str_in_output": includes_stop,
    }
    answer = server.post(CHAT, body)
    if is_stream:
        choices = [e["choices"][0] for e in answer.events]
        texts = ["".join(c["delta"]["content"] for c in choices if c["index"] == i) for i in range(2)]
        reasons = [c["finish_reason"] for c in choices if c["finish_reason"]]
    else:
        choices = answer.json()["choices"]
        texts = [c["message"]["content"] for c in choices]
        reasons = [c["finish_reason"] for c in choices]
    assert texts == ["Hello, w" if includes_stop else "Hell"] * 2
    assert reasons == ["stop", "stop"]
    assert server.engine.stopped == [0, 1]
    assert server.engine.requests[0].sampling.stop == ()


def test_held_back_text_comes_out_at_the_end() -> None:
    answer = FakeServer().post(COMPLETIONS, {"prompt": "a", "stop": "world!"}).json()
    assert answer["choices"][0]["text"] == "Hello, world"
    assert answer["choices"][0]["finish_reason"] == "length"


def test_stop_token_leaves_no_text() -> None:
    answer = FakeServer(FakeEngine(answer="ab.", finish_reason=FinishReason.STOP)).post(COMPLETIONS, {"prompt": "a"})
    assert answer.json()["choices"][0]["text"] == "ab"
    assert answer.json()["usage"]["completion_tokens"] == 3


def test_messages_take_all_roles_and_text_parts() -> None:
    server = FakeServer()
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "user", "content": "c", "name": "x"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}], "refusal": None},
        {"role": "tool", "content": "d", "tool_call_id": "1"},
    ]
    body = {"messages": messages, "add_generation_prompt": False, "chat_template_kwargs": {"suffix": "!"}}
    assert server.post(CHAT, body).status == 200
    assert server.engine.prompts() == ["system:a\nb\nuser:c\nassistant:\ntool:d\n!"]


def test_final_message_is_continued() -> None:
    server = FakeServer()
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert server.post(CHAT, {"messages": messages, "continue_final_message": True}).status == 200
    assert server.engine.prompts() == ["user:a\nassistant:b"]
    body = {"messages": messages, "continue_final_message": True, "add_generation_prompt": True}
    assert "exclude each other" in server.post(CHAT, body).error["message"]


def test_sampling_fields_reach_the_engine() -> None:
    server = FakeServer()
    fields = {
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 1.5,
        "min_tokens": 2,
        "ignore_eos": True,
        "stop_token_ids": [9],
        "skip_special_tokens": False,
    }
    assert server.post(COMPLETIONS, {"prompt": "a", "logit_bias": {"65": -100}, **fields}).status == 200
    sampling = server.engine.requests[0].sampling
    assert {name: getattr(sampling, name) for name in fields} == {**fields, "stop_token_ids": (9,)}
    assert sampling.logit_bias == {65: -100}


def test_fields_without_effect_and_neutral_values_are_taken() -> None:
    fields = {
        "user": "u",
        "metadata": {"a": 1},
        "store": False,
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "tools": [],
        "tool_choice": "none",
        "logprobs": False,
        "response_format": {"type": "text"},
        "best_of": 2,
        "n": 2,
        "temperature": None,
        "stop": None,
        "modalities": ["text"],
    }
    assert FakeServer().post(CHAT, {**HELLO, **fields}).status == 200


@pytest.mark.parametrize(
    ("path", "fields", "param", "code", "words"),
    [
        (CHAT, {"temperature": 101}, "temperature", "invalid_value", "less than or equal to 100, got 101"),
        (CHAT, {"temperature": "hot"}, "temperature", "invalid_value", "valid number, got 'hot'"),
        (CHAT, {"temperature": float("nan")}, "temperature", "invalid_value", "finite"),
        (CHAT, {"top_p": 0}, "top_p", "invalid_value", "greater than 0"),
        (CHAT, {"n": 129}, "n", "invalid_value", "128"),
        (CHAT, {"n": 17}, "n", "invalid_value", "<= 16, got 17"),
        (CHAT, {"n": True}, "n", "invalid_value", "integer"),
        (CHAT, {"max_tokens": 0}, "max_tokens", "invalid_value", "greater than or equal to 1"),
        (CHAT, {"max_tokens": "5"}, "max_tokens", "invalid_value", "integer, got '5'"),
        (CHAT, {"max_tokens": 2, "min_tokens": 3}, "min_tokens", "invalid_value", "max_tokens (2)"),
        (CHAT, {"seed": 2**63}, "seed", "invalid_value", "less than"),
        (CHAT, {"stop": ["a"] * 17}, "stop", "invalid_value", "at most 16"),
        (CHAT, {"stop": ""}, "stop", "invalid_value", "non-empty"),
        (CHAT, {"stop_token_ids": [258]}, "stop_token_ids", "invalid_value", "[0, 257], got 258"),
        (CHAT, {"logit_bias": {"258": 1}}, "logit_bias", "invalid_value", "[0, 257], got 258"),
        (CHAT, {"logit_bias": {"a": 1}}, "logit_bias", "invalid_value", "token ids as keys"),
        (CHAT, {"logit_bias": {"1": 101}}, "logit_bias", "invalid_value", "[-100, 100]"),
        (CHAT, {"messages": []}, "messages", "invalid_value", "at least 1"),
        (CHAT, {"messages": [{"role": "king", "content": ""}]}, "messages[0].role", "invalid_value", "'king'"),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_value", "string"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content",
            "unsupported_parameter",
            "'image_url'",
        ),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 200}]}, "messages", "context_length_exceeded", "128"),
        (CHAT, {"tools": [{"type": "function"}]}, "tools", "unsupported_parameter", "not supported"),
        (CHAT, {"logprobs": True}, "logprobs", "unsupported_parameter", "set it to False"),
        (CHAT, {"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter", "not"),
        (CHAT, {"audio": {}}, "audio", "unsupported_parameter", "not supported"),
        (CHAT, {"best_of": 2}, "best_of", "invalid_value", "must equal n (1), got 2"),
        (CHAT, {"stream_options": {"include_usage": True}}, "stream_options", "invalid_value", "stream is true"),
        (CHAT, {"stream": True, "stream_options": {"a": 1}}, "stream_options.a", "unknown_parameter", "not a param"),
        (CHAT, {"temprature": 1}, "temprature", "unknown_parameter", "not a parameter"),
        (CHAT, {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "invalid_value", "messages"),
        (CHAT, {"prompt": "x"}, "prompt", "unknown_parameter", "not a parameter"),
        (COMPLETIONS, {"prompt": None}, "prompt", "invalid_value", "list of token ids"),
        (COMPLETIONS, {"prompt": [1, "a"]}, "prompt", "invalid_value", "list of token ids"),
        (COMPLETIONS, {"prompt": []}, "prompt", "invalid_value", "list of token ids"),
        (COMPLETIONS, {"prompt": [[]]}, "prompt", "invalid_value", "at least one token"),
        (COMPLETIONS, {"prompt": [-1]}, "prompt", "invalid_value", "[0, 257], got -1"),
        (COMPLETIONS, {"prompt": [5] * 128}, "prompt", "context_length_exceeded", "128 tokens"),
        (COMPLETIONS, {"prompt": ["a"] * 1025}, "prompt", "invalid_value", "1024"),
        (COMPLETIONS, {"prompt": "\ud800"}, "prompt", "invalid_value", "surrogates not allowed"),
        (COMPLETIONS, {"logprobs": 1}, "logprobs", "unsupported_parameter", "not supported"),
        (COMPLETIONS, {"suffix": "x"}, "suffix", "unsupported_parameter", "not supported"),
    ],
)
def test_bad_field_is_400_and_names_it(path: str, fields: dict[str, Any], param: str, code: str, words: str) -> None:
    server = FakeServer()
    answer = server.post(path, {**(HELLO if path == CHAT else {"prompt": "a"}), **fields})
    assert answer.status == 400
    error = answer.error
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert words in error["message"]
    assert not server.engine.requests


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_missing_field_is_named(path: str) -> None:
    error = FakeServer().post(path, {}).error
    assert error["param"] == ("messages" if path == CHAT else "prompt")
    assert error["code"] == "missing_required_parameter"


@pytest.mark.parametrize("body", [b"{", b"[]", b'"x"', b"[" * 100_000, b"\xff"])
def test_body_that_is_no_json_object_is_400(body: bytes) -> None:
    answer = FakeServer().post(CHAT, body)
    assert answer.status == 400
    assert "JSON" in answer.error["message"] or "body" in answer.error["message"]


def test_body_of_another_type_is_400() -> None:
    # A web page may send text/plain anywhere without being asked; it must not reach the engine.
    server = FakeServer()
    answer = server.post(CHAT, json.dumps(HELLO).encode(), **{"content-type": "text/plain"})
    assert answer.status == 400
    assert "application/json" in answer.error["message"]
    assert not server.engine.requests


def test_unknown_model_is_404() -> None:
    for path, body in ((CHAT, HELLO), (COMPLETIONS, {"prompt": "a"}), ("/tokenize", {"prompt": "a"})):
        answer = FakeServer().post(path, {**body, "model": "nope"})
        assert answer.status == 404
        assert (answer.error["code"], answer.error["param"]) == ("model_not_found", "model")
        assert "'nope'" in answer.error["message"]
        assert MODEL in answer.error["message"]


def test_unknown_route_and_method_have_openais_shape() -> None:
    server = FakeServer()
    assert server.get("/v1/nope").status == 404
    assert server.get("/v1/nope").error["code"] == "not_found"
    answer = server.get(CHAT)
    assert answer.status == 405
    assert answer.error["code"] == "method_not_allowed"


def test_models_are_listed_and_described() -> None:
    server = FakeServer()
    listed = server.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [card["id"] for card in listed["data"]] == [MODEL, "alias"]
    assert listed["data"][0]["max_model_len"] == 128
    assert server.get("/v1/models/alias").json()["id"] == "alias"
    assert server.get("/v1/models/a/b").status == 404


def test_tokenize_and_detokenize_are_inverse() -> None:
    server = FakeServer()
    answer = server.post("/tokenize", {"prompt": "abc"}).json()
    assert answer == {"count": 4, "max_model_len": 128, "tokens": [256, 64, 65, 66], "token_strs": None}
    assert server.post("/tokenize", {"prompt": "abc", "add_special_tokens": False}).json()["tokens"] == [64, 65, 66]
    assert server.post("/tokenize", HELLO).json()["count"] == len("user:Hi\nassistant:")
    assert server.post("/detokenize", {"tokens": [64, 65]}).json() == {"prompt": "ab"}
    assert server.post("/detokenize", {"tokens": [258]}).error["param"] == "tokens"
    assert server.post("/tokenize", {}).status == 400


def test_key_is_asked_for_everywhere_but_by_probes() -> None:
    server = FakeServer(api_keys=("one", "two"))
    for path in ("/v1/models", "/metrics", "/version", "/load", "/openapi.json", "/nope"):
        answer = server.get(path)
        assert answer.status == 401
        assert answer.error["code"] == "invalid_api_key"
        assert server.get(path, authorization="Bearer three").status == 401
        assert server.get(path, authorization="Basic one").status == 401
        assert server.get(path, authorization="Bearer two").status in (200, 404)
    for path in ("/health", "/ready", "/ping"):
        assert server.get(path).status == 200


def test_body_above_the_limit_is_413_announced_or_not() -> None:
    server = FakeServer(max_request_bytes=100)
    body = json.dumps({"prompt": "x" * 200}).encode()
    for answer in (server.post(COMPLETIONS, body), server.post(COMPLETIONS, [body[:90], body[90:]])):
        assert answer.status == 413
        assert answer.error["code"] == "request_too_large"
        assert "100 bytes" in answer.error["message"]
    assert server.post(COMPLETIONS, [b'{"prompt":', b'"x"}']).status == 200


def test_request_id_is_kept_only_if_it_is_a_plain_word() -> None:
    server = FakeServer()
    assert server.get("/version", x_request_id="abc-1").headers["x-request-id"] == "abc-1"
    made_up = server.get("/version", x_request_id="a b").headers["x-request-id"]
    assert len(made_up) == 32


def test_full_queue_is_429_with_retry_after() -> None:
    server = FakeServer(FakeEngine(refusal=QueueFullError("max_num_queued_reqs (16) requests are waiting")))
    answer = server.post(CHAT, {**HELLO, "stream": True})
    assert answer.status == 429
    assert answer.headers["retry-after"] == "1"
    assert answer.error["type"] == "rate_limit_error"
    assert 'mixattn:admission_rejections_total{model_name="fake",reason="queue_full"} 1.0' in metrics_of(server)


def test_engines_refusal_is_400() -> None:
    server = FakeServer(FakeEngine(refusal=ValueError("prompt_token_ids holds 9 tokens; the KV pool has 0")))
    answer = server.post(CHAT, HELLO)
    assert (answer.status, answer.error["param"]) == (400, "messages")
    assert "the KV pool has 0" in answer.error["message"]


def test_loading_server_is_alive_but_not_ready() -> None:
    server = FakeServer(is_loaded=False)
    assert [server.get(path).status for path in ("/health", "/ping", "/version", "/metrics", "/load")] == [200] * 5
    for answer in (server.get("/ready"), server.get("/v1/models"), server.post(CHAT, HELLO)):
        assert (answer.status, answer.error["code"]) == (503, "loading")


def test_stopping_server_takes_nothing_new() -> None:
    server = FakeServer()
    server.service.is_draining = True
    assert server.get("/health").status == 200
    for answer in (server.get("/ready"), server.post(CHAT, HELLO)):
        assert (answer.status, answer.error["code"]) == (503, "shutting_down")


def test_dead_engine_is_503() -> None:
    server = FakeServer(FakeEngine(error=EngineDeadError("gone")))
    for answer in (server.get("/health"), server.get("/ping"), server.get("/ready"), server.post(CHAT, HELLO)):
        assert (answer.status, answer.error["code"]) == (503, "engine_dead")


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (EngineDeadError("gone"), 503, "engine_dead"),
        (RequestsAbortedError("The server is stopping"), 503, "shutting_down"),
    ],
)
def test_engines_end_during_a_request_is_told(failure: Exception, status: int, code: str) -> None:
    def server() -> FakeServer:
        return FakeServer(FakeEngine(answer="ab", finish_reason=None, failure=failure))

    answer = server().post(CHAT, HELLO)
    assert (answer.status, answer.error["code"]) == (status, code)
    answer = server().post(CHAT, {**HELLO, "stream": True})
    assert answer.status == 200  # it had been sent before
    assert answer.events[-2]["choices"][0]["delta"]["content"] == "b"
    assert answer.events[-1]["error"]["code"] == code


def test_failed_step_is_500_without_details() -> None:
    answer = FakeServer(FakeEngine(finish_reason=FinishReason.ERROR)).post(CHAT, HELLO)
    assert (answer.status, answer.error["code"]) == (500, "internal_error")


@pytest.mark.parametrize("is_stream", [False, True])
def test_client_that_goes_ends_its_request(is_stream: bool) -> None:
    server = FakeServer(FakeEngine(finish_reason=None))
    body = json.dumps({**HELLO, "stream": is_stream}).encode()
    headers = {"content-type": "application/json"}
    asyncio.run(server.request("POST", CHAT, headers, [body], stays=False))
    assert server.engine.streams[0].is_closed


def test_every_field_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "server.md").read_text()
    fields = CompletionRequest.model_fields.keys() | ChatCompletionRequest.model_fields.keys()
    assert not [name for name in fields if f"`{name}`" not in text]


def test_openapi_schema_names_all_forms_of_prompt() -> None:
    schema = FakeServer().get("/openapi.json").json()
    prompt = schema["components"]["schemas"]["CompletionRequest"]["properties"]["prompt"]
    assert [form["type"] for form in prompt["anyOf"]] == ["string", "array", "array", "array"]


def metrics_of(server: FakeServer) -> str:
    return server.get("/metrics").body.decode()
