"""A generation on its way out: whole, or as a stream of chunks."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable

import msgspec
from fastapi import Request
from starlette.responses import Response

from mixattn.server.generation import Generation, TextDelta, until_disconnect
from mixattn.server.protocol import GenerationRequest, Usage
from mixattn.server.sse import EventStream

_CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that has gone; nobody reads it, logs show it."""


class Answer(ABC):
    """What ``/v1/completions`` and ``/v1/chat/completions`` have in common; the shapes differ.

    Args:
        body: for ``stream`` and ``stream_options``.
        generation: owned; it is closed when the answer is out or its reader has gone.
        model: the name in the answer.
    """

    id_prefix: str

    def __init__(self, body: GenerationRequest, generation: Generation, model: str) -> None:
        self.id = f"{self.id_prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.model = model
        self.generation = generation
        self._is_stream = bool(body.stream)
        self._has_usage = body.wants_usage
        self._has_usage_in_each_chunk = body.wants_usage_in_each_chunk

    @abstractmethod
    def opening_chunks(self) -> Iterable[msgspec.Struct]:
        """What a stream begins with, before any token."""

    @abstractmethod
    def chunk(self, delta: TextDelta) -> msgspec.Struct:
        """An event of a stream."""

    @abstractmethod
    def usage_chunk(self) -> msgspec.Struct:
        """The event without choices that ends a stream whose usage was asked for."""

    @abstractmethod
    def whole(self, texts: list[tuple[str, str]]) -> msgspec.Struct:
        """All of it, from each choice's text and finish reason."""

    async def respond(self, request: Request) -> Response:
        """The response; when the client goes, the generation ends."""
        if self._is_stream:
            return EventStream(self._chunks(), self.generation.close)
        try:
            texts = await until_disconnect(request, self.generation.texts())
        finally:
            self.generation.close()
        if texts is None:
            return Response(status_code=_CLIENT_CLOSED_REQUEST)
        return json_response(self.whole(texts))

    def usage_of_chunk(self) -> Usage | msgspec.UnsetType | None:
        """The field ``usage`` of a chunk with choices: OpenAI sends null where usage will follow."""
        if not self._has_usage:
            return msgspec.UNSET
        return self.generation.usage if self._has_usage_in_each_chunk else None

    async def _chunks(self) -> AsyncIterator[msgspec.Struct]:
        for chunk in self.opening_chunks():
            yield chunk
        async for delta in self.generation:
            yield self.chunk(delta)
        if self._has_usage:
            yield self.usage_chunk()


def json_response(value: object) -> Response:
    """``value``, made of msgspec structs and plain types, as JSON."""
    return Response(msgspec.json.encode(value), media_type="application/json")
