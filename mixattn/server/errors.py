"""Errors as OpenAI's clients expect them: a status, and ``{"error": {message, type, param, code}}``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

RETRY_AFTER_S = 1
"""What a refused client is told to wait: a step takes milliseconds, and a queue of finite length drains in seconds."""

_CODES = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large", 415: "unsupported_media_type"}
_MAX_INPUT_CHARS = 80


class ErrorBody(msgspec.Struct, frozen=True):
    """The object under ``error``."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(msgspec.Struct, frozen=True):
    """An error as a response's body, or as an event of a stream."""

    error: ErrorBody


class APIError(Exception):
    """A request's failure that its sender is told about.

    Args:
        status: HTTP status.
        message: what is wrong, naming the field and its bound.
        kind: OpenAI's ``error.type``.
        param: the request field at fault.
        code: a word that programs can compare.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.envelope = ErrorEnvelope(ErrorBody(message, kind, param, code))

    def body(self) -> bytes:
        """The JSON of the error."""
        return msgspec.json.encode(self.envelope)

    def response(self) -> Response:
        """The error as a whole response."""
        return Response(self.body(), self.status, self.headers, media_type="application/json")


def bad_request(message: str, param: str | None = None, code: str = "invalid_value") -> APIError:
    """400: the request can never be served as it is."""
    return APIError(400, message, param=param, code=code)


def model_not_found(model: str, served: tuple[str, ...]) -> APIError:
    """404: no such model here."""
    message = f"The model {_shortened(model)} does not exist; served here: {', '.join(served)}."
    return APIError(404, message, param="model", code="model_not_found")


def overloaded(message: str) -> APIError:
    """429: the queue is full now; the client may come back."""
    headers = {"Retry-After": str(RETRY_AFTER_S)}
    return APIError(429, message, kind="rate_limit_error", code="queue_full", headers=headers)


def unavailable(message: str, code: str) -> APIError:
    """503: loading, draining or dead."""
    headers = {"Retry-After": str(RETRY_AFTER_S)}
    return APIError(503, message, kind="service_unavailable_error", code=code, headers=headers)


def internal_error() -> APIError:
    """500: our fault. The details are in the log, not in the answer."""
    return APIError(500, "Internal server error.", kind="server_error", code="internal_error")


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_INPUT_CHARS else text[: _MAX_INPUT_CHARS - 3] + "..."


def _field_name(loc: tuple[Any, ...]) -> str | None:
    """``messages[0].content`` from pydantic's ("body", "messages", 0, "content")."""
    name = ""
    for part in loc[1:]:
        if isinstance(part, int):
            name += f"[{part}]"
        elif part.isidentifier():  # the rest are pydantic's names of a union's branches, as "list[str]"
            name += f".{part}" if name else part
    return name or None


def from_validation(error: RequestValidationError) -> APIError:
    """400 from what FastAPI found wrong, naming the first field at fault, its bound and what was sent."""
    first = error.errors()[0]
    param = _field_name(first["loc"])
    kind = first["type"]
    if kind == "json_invalid":
        return bad_request(f"The body is not valid JSON: {first['ctx']['error']}.")
    if param is None:
        return bad_request("The body must be a JSON object, sent as Content-Type: application/json.")
    if kind == "missing":
        return bad_request(f"{param} is required.", param, "missing_required_parameter")
    if kind == "extra_forbidden":
        return bad_request(f"{param} is not a parameter of this endpoint.", param, "unknown_parameter")
    if kind == "unsupported":
        return bad_request(f"{param} {first['msg']}", param, "unsupported_parameter")
    return bad_request(f"{param}: {first['msg']}, got {_shortened(first['input'])}.", param)


def install_handlers(app: FastAPI) -> None:
    """Makes every error of ``app`` leave in OpenAI's shape, unknown routes and methods included."""

    async def on_api_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, APIError)
        return error.response()

    async def on_invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return from_validation(error).response()

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"{error.detail}: {request.method} {request.url.path}"
        api_error = APIError(error.status_code, message, code=_CODES.get(error.status_code), headers=error.headers)
        return api_error.response()

    async def on_bug(_: Request, error: Exception) -> Response:
        return internal_error().response()

    app.add_exception_handler(APIError, on_api_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_bug)  # Starlette logs it with its traceback
