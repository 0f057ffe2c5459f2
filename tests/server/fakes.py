"""An engine that says what it is told to, and a client that speaks ASGI: the server without model, process or port."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mixattn.config import ServerConfig
from mixattn.engine.client import Delta
from mixattn.engine.ipc import EngineInfo, StepStats, TokenizerData
from mixattn.models.tokenizer import Tokenizer, byte_tokenizer
from mixattn.server.app import create_app
from mixattn.server.prometheus import ServerMetrics
from mixattn.server.service import LoadedService, Service
from mixattn.types import FinishReason, Request

MODEL = "fake"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}{{ suffix }}"
)


def chat_tokenizer() -> Tokenizer:
    """One token per byte, and a chat template that shows what it is given."""
    tokenizer = byte_tokenizer()
    tokenizer.set_chat_template(CHAT_TEMPLATE)
    return tokenizer


class FakeStream:
    """One delta per byte of the answer, the requests taking turns."""

    def __init__(self, engine: FakeEngine, num_requests: int) -> None:
        self._engine = engine
        self._running = set(range(num_requests))
        self.is_closed = False

    async def __aiter__(self) -> AsyncIterator[Delta]:
        tokens = chat_tokenizer().encode(self._engine.answer, add_special_tokens=False)
        for position, token_id in enumerate(tokens):
            for index in sorted(self._running):
                is_last = position == len(tokens) - 1
                yield Delta(index, [token_id], self._engine.finish_reason if is_last else None)
        if self._engine.failure is not None:
            raise self._engine.failure
        if self._running and self._engine.finish_reason is None:
            await asyncio.Event().wait()

    def stop(self, index: int) -> None:
        self._running.discard(index)
        self._engine.stopped.append(index)

    def close(self) -> None:
        self.is_closed = True


@dataclass
class FakeEngine:
    """Answers every request with ``answer``, then ends with ``finish_reason``, raises ``failure``, or hangs."""

    answer: str = "Hello, world"
    finish_reason: FinishReason | None = FinishReason.LENGTH
    failure: Exception | None = None
    refusal: Exception | None = None
    error: Exception | None = None
    stats: StepStats | None = None
    num_in_flight: int = 0
    requests: list[Request] = field(default_factory=list)
    streams: list[FakeStream] = field(default_factory=list)
    stopped: list[int] = field(default_factory=list)

    async def generate(self, requests: Sequence[Request]) -> FakeStream:
        if self.refusal is not None:
            raise self.refusal
        self.requests += requests
        self.streams.append(FakeStream(self, len(requests)))
        return self.streams[-1]

    def prompts(self) -> list[str]:
        """What it was asked, as text."""
        return [chat_tokenizer().decode(list(request.prompt_token_ids)) for request in self.requests]


def engine_info() -> EngineInfo:
    """Of an engine with a context of 128 tokens."""
    return EngineInfo(
        max_model_len=128,
        vocab_size=258,
        eos_token_ids=frozenset({257}),
        page_size=16,
        num_pages=32,
        max_num_queued_reqs=16,
        max_num_batched_tokens=64,
        tokenizer=TokenizerData("", {}, {}),
        import_s=0.0,
        load_s=0.0,
    )


@dataclass
class Answer:
    """A response."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        value = self.json()["error"]
        assert set(value) == {"message", "type", "param", "code"}
        return value

    @property
    def events(self) -> list[Any]:
        """The chunks of a stream, which ends properly."""
        assert self.headers["content-type"].startswith("text/event-stream")
        lines = self.body.decode().split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


class FakeServer:
    """The application around a fake engine."""

    def __init__(self, engine: FakeEngine | None = None, *, is_loaded: bool = True, **config: Any) -> None:
        self.engine = engine or FakeEngine()
        self.service = Service(MODEL, (MODEL, "alias"), ServerMetrics(MODEL), engine=self.engine)
        if is_loaded:
            self.service.loaded = LoadedService(chat_tokenizer(), engine_info())
        self.app = create_app(self.service, ServerConfig(**config))

    def get(self, path: str, **headers: str) -> Answer:
        return asyncio.run(self.request("GET", path, headers, [b""]))

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        """``body`` is JSON, or bytes, or a list of bytes that are sent without announcing their length."""
        headers = {"content-type": "application/json", **headers}
        if isinstance(body, list) and body and isinstance(body[0], bytes):
            return asyncio.run(self.request("POST", path, headers, body))
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return asyncio.run(self.request("POST", path, {"content-length": str(len(data)), **headers}, [data]))

    async def request(
        self, method: str, path: str, headers: dict[str, str], parts: list[bytes], stays: bool = True
    ) -> Answer:
        """One request; a client that does not stay goes as soon as it has sent it and let the server work a moment."""
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(k.replace("_", "-").lower().encode(), v.encode()) for k, v in headers.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        left = list(parts)
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            if left:
                body = left.pop(0)
                return {"type": "http.request", "body": body, "more_body": bool(left)}
            if stays:
                await asyncio.Event().wait()
            for _ in range(200):  # turns of the event loop, not time
                await asyncio.sleep(0)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        await self.app(scope, receive, send)
        response_headers = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
        return Answer(sent[0]["status"], response_headers, b"".join(m.get("body", b"") for m in sent[1:]))
