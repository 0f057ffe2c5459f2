"""From a request's fields to the engine, and from its tokens to text."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from starlette.requests import Request as HTTPRequest
from tokenizers import Tokenizer

from mixattn.engine.client import Delta, EngineDeadError, QueueFullError, RequestsAbortedError
from mixattn.engine.detokenize import IncrementalDetokenizer
from mixattn.engine.ipc import EngineInfo
from mixattn.server.errors import APIError, bad_request, internal_error, overloaded, unavailable
from mixattn.server.protocol import Usage
from mixattn.types import FinishReason, Request, SamplingParams

T = TypeVar("T")


class TokenStream(Protocol):
    """What the engine's client hands back (``engine.client.DeltaStream``)."""

    def __aiter__(self) -> AsyncIterator[Delta]: ...
    def stop(self, index: int) -> None: ...
    def close(self) -> None: ...


class Engine(Protocol):
    """What the server needs of the engine (``engine.client.EngineClient``)."""

    @property
    def num_in_flight(self) -> int: ...
    async def generate(self, requests: Sequence[Request]) -> TokenStream: ...


@dataclass(frozen=True)
class TextDelta:
    """New text of one choice, or its end, or both."""

    index: int
    text: str
    finish_reason: str | None


class Generation:
    """All choices of one HTTP request as text, counted."""

    def __init__(self, stream: TokenStream, detokenizers: list[IncrementalDetokenizer], num_prompt_tokens: int) -> None:
        self._stream = stream
        self._detokenizers = detokenizers
        self.num_prompt_tokens = num_prompt_tokens
        self.num_completion_tokens = 0

    @property
    def num_choices(self) -> int:
        return len(self._detokenizers)

    @property
    def usage(self) -> Usage:
        total = self.num_prompt_tokens + self.num_completion_tokens
        return Usage(self.num_prompt_tokens, self.num_completion_tokens, total)

    def close(self) -> None:
        """Aborts what still runs."""
        self._stream.close()

    async def __aiter__(self) -> AsyncIterator[TextDelta]:
        """The text as it comes; tokens that let out no text give no delta.

        Raises:
            APIError: the engine died or the server stops.
        """
        try:
            async for delta in self._stream:
                text, reason = self._decode(delta)
                if text or reason is not None:
                    yield TextDelta(delta.index, text, reason)
        except (EngineDeadError, RequestsAbortedError) as error:
            raise as_api_error(error) from error

    def _decode(self, delta: Delta) -> tuple[str, str | None]:
        detokenizer = self._detokenizers[delta.index]
        reason = delta.finish_reason
        if reason in (FinishReason.ABORT, FinishReason.ERROR):
            raise internal_error()
        text = ""
        for position, token_id in enumerate(delta.token_ids, 1):
            is_stop_token = reason is FinishReason.STOP and position == len(delta.token_ids)
            text += detokenizer.push(token_id, is_stop_token)
            self.num_completion_tokens += 1
            if detokenizer.stop_string is not None:
                break
        if reason is not None:
            text += detokenizer.finish()
        if detokenizer.stop_string is not None:
            self._stream.stop(delta.index)
            reason = FinishReason.STOP
        return text, None if reason is None else reason.value

    async def texts(self) -> list[tuple[str, str]]:
        """Each choice's whole text and finish reason."""
        parts: list[list[str]] = [[] for _ in range(self.num_choices)]
        reasons = [""] * self.num_choices
        async for delta in self:
            parts[delta.index].append(delta.text)
            if delta.finish_reason is not None:
                reasons[delta.index] = delta.finish_reason
        return [("".join(text), reason) for text, reason in zip(parts, reasons, strict=True)]


def as_api_error(error: Exception) -> APIError:
    """The answer to a request that the engine could not finish."""
    if isinstance(error, QueueFullError):
        return overloaded(f"{error}.")
    if isinstance(error, RequestsAbortedError):
        return unavailable(f"{error}.", "shutting_down")
    assert isinstance(error, EngineDeadError)
    return unavailable("The engine has ended.", "engine_dead")


async def start_generation(
    engine: Engine,
    info: EngineInfo,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    param: str,
) -> Generation:
    """``sampling.n`` choices for each prompt, once the engine has taken all of them.

    Args:
        param: the request's field that holds the prompts, for errors.
    Raises:
        APIError: 400 if they can never be served, 429 if not now, 503 if the engine is gone.
    """
    num_requests = len(prompts) * sampling.n
    if num_requests > info.max_num_queued_reqs:
        raise bad_request(f"prompts times n must be <= {info.max_num_queued_reqs}, got {num_requests}.", "n")
    for prompt in prompts:
        if not prompt:
            raise bad_request(f"{param} must give at least one token.", param)
        if len(prompt) >= info.max_model_len:
            raise bad_request(
                f"{param} gives {len(prompt)} tokens; it must give fewer than the model's context, "
                f"{info.max_model_len} tokens.",
                param,
                "context_length_exceeded",
            )
    base_id = uuid.uuid4().hex
    now = time.monotonic()
    requests: list[Request] = []
    for prompt in prompts:
        for choice in range(sampling.n):
            seed = None if sampling.seed is None else _wrapped_int64(sampling.seed + choice)
            # The engine knows tokens only: stop strings are found here.
            own = replace(sampling, n=1, seed=seed, stop=())
            requests.append(Request(f"{base_id}-{len(requests)}", prompt, own, now, info.eos_token_ids))
    try:
        stream = await engine.generate(requests)
    except ValueError as error:
        raise bad_request(f"{error}.", param) from error
    except (QueueFullError, EngineDeadError, RequestsAbortedError) as error:
        raise as_api_error(error) from error
    detokenizers = [IncrementalDetokenizer(tokenizer, sampling, r.prompt_token_ids) for r in requests]
    return Generation(stream, detokenizers, sum(map(len, prompts)))


def _wrapped_int64(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


async def until_disconnect(request: HTTPRequest, work: Coroutine[Any, Any, T]) -> T | None:
    """What ``work`` returns, or None, with ``work`` cancelled, when the client has gone before."""
    task = asyncio.ensure_future(work)
    listener = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, listener}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        listener.cancel()


async def _disconnected(request: HTTPRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
