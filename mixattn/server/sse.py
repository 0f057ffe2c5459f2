"""Server-sent events: one ``data:`` line of JSON per chunk, errors included, and ``data: [DONE]`` at the end.

Source: https://html.spec.whatwg.org/multipage/server-sent-events.html; the ``[DONE]`` line is OpenAI's.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable

import msgspec
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from mixattn.server.errors import APIError, internal_error

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"


def encode_event(chunk: msgspec.Struct) -> bytes:
    """One event. JSON from msgspec holds no line end, so that one ``data:`` line carries it."""
    return b"data: %b\n\n" % msgspec.json.encode(chunk)


async def _events(chunks: AsyncIterator[msgspec.Struct]) -> AsyncIterator[bytes]:
    try:
        async for chunk in chunks:
            yield encode_event(chunk)
    except APIError as error:
        yield encode_event(error.envelope)
    except Exception:
        logger.exception("a stream failed")
        yield encode_event(internal_error().envelope)
    yield DONE


class EventStream(StreamingResponse):
    """A response that streams ``chunks``.

    The status is sent with the first byte, so a later failure can only be told as an event.

    Args:
        chunks: structs, one per event.
        on_end: called once when the stream is over, or its reader has gone; it must not wait.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncIterator[msgspec.Struct], on_end: Callable[[], None]) -> None:
        # Proxies must neither keep nor collect what is worth something only now.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_events(chunks), headers=headers)
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()
