"""What happens to a request before its route sees it: its id, its key, the size of its body.

Plain ASGI: a middleware that hands on request and response objects would hide disconnects and hold back streams.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mixattn.server.errors import APIError

OPEN_PATHS = frozenset({"/health", "/ready", "/ping"})
"""What a probe asks, without a key; they tell nothing but a status."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Gate:
    """Refuses requests without a key or with too long a body, and names each answer by ``X-Request-Id``.

    Args:
        app: what is guarded.
        api_keys: any of them opens; none leaves the server open.
        max_request_bytes: of a body, whether its length is announced or not.
    """

    def __init__(self, app: ASGIApp, api_keys: Sequence[str], max_request_bytes: int) -> None:
        self._app = app
        self._key_digests = [_digest(key) for key in api_keys]
        self._max_request_bytes = max_request_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):  # it goes into headers and logs: nothing but a plain word
            request_id = uuid.uuid4().hex

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        error = self._refusal(scope["path"], headers)
        if error is not None:
            await error.response()(scope, receive, send_with_id)
        else:
            await self._app(scope, self._limited(receive), send_with_id)

    def _refusal(self, path: str, headers: Headers) -> APIError | None:
        if self._key_digests and path not in OPEN_PATHS and not self._has_key(headers.get("authorization", "")):
            return APIError(
                401,
                "Missing or wrong API key; send it as Authorization: Bearer KEY.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._max_request_bytes:
            # The connection is closed, as the body is still on its way.
            return APIError(413, self._too_large(), code="request_too_large", headers={"Connection": "close"})
        return None

    def _has_key(self, authorization: str) -> bool:
        """Takes the same time whichever key is wrong, and wherever."""
        scheme, _, key = authorization.partition(" ")
        digest = _digest(key.strip())
        matches = [secrets.compare_digest(digest, known) for known in self._key_digests]
        return scheme.lower() == "bearer" and any(matches)

    def _limited(self, receive: Receive) -> Receive:
        num_bytes = 0

        async def limited() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_request_bytes:
                raise HTTPException(413, self._too_large(), {"Connection": "close"})
            return message

        return limited

    def _too_large(self) -> str:
        return f"The request's body must be at most {self._max_request_bytes} bytes."


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
