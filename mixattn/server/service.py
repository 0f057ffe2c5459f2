"""What the routes share: the engine, the tokenizer, and whether requests are welcome."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Annotated, Protocol

from fastapi import Depends, Request

from mixattn.engine.ipc import EngineInfo, StepStats
from mixattn.models.tokenizer import Tokenizer
from mixattn.server.errors import APIError, bad_request, model_not_found, unavailable
from mixattn.server.generation import Engine, Generation, start_generation
from mixattn.server.prometheus import ServerMetrics
from mixattn.server.protocol import ChatCompletionRequest, GenerationRequest, TokenizeRequest
from mixattn.types import SamplingParams

_LONG_TEXT_CHARS = 16384
"""Longer texts are tokenised in a thread: about 5 ms, which the other streams need not wait."""
_NO_TEMPLATE_KWARGS = {"self", "messages", "tools", "add_generation_prompt", "continue_final_message"}
"""What a template is given by other fields, or by us."""


class WatchedEngine(Engine, Protocol):
    """An engine whose state is seen (``engine.client.EngineClient``)."""

    @property
    def error(self) -> Exception | None: ...
    @property
    def stats(self) -> StepStats | None: ...


@dataclass(frozen=True)
class LoadedService:
    """What there is once the model is loaded."""

    tokenizer: Tokenizer
    info: EngineInfo


@dataclass
class Service:
    """The server's state. ``engine`` and ``loaded`` are None until they are there."""

    model: str
    """As it was asked for: a name, a folder or a file."""
    served_model_names: tuple[str, ...]
    metrics: ServerMetrics
    engine: WatchedEngine | None = None
    loaded: LoadedService | None = None
    is_draining: bool = False
    created_s: int = field(default_factory=lambda: int(time.time()))

    def require_alive(self) -> None:
        """Raises 503 if the engine has ended."""
        if self.engine is not None and self.engine.error is not None:
            raise unavailable("The engine has ended.", "engine_dead")

    def require_loaded(self) -> LoadedService:
        """The tokenizer and the engine's sizes.

        Raises:
            APIError: 503 while the model is being loaded, the server stops, or the engine has ended.
        """
        self.require_alive()
        if self.is_draining:
            raise unavailable("The server is stopping.", "shutting_down")
        if self.loaded is None:
            raise unavailable("The model is being loaded.", "loading")
        return self.loaded

    def require_model(self, model: str | None) -> None:
        """Raises 404 if ``model`` is not served here; none given means the one that is."""
        if model is not None and model not in self.served_model_names:
            raise model_not_found(model, self.served_model_names)

    async def tokenize(self, text: str, param: str, add_special_tokens: bool) -> list[int]:
        """``text`` as token ids. ``param`` is the request's field it came from."""
        tokenizer = self.require_loaded().tokenizer
        try:
            if len(text) < _LONG_TEXT_CHARS:
                return tokenizer.encode(text, add_special_tokens=add_special_tokens)
            return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens)
        except ValueError as error:  # half of a surrogate pair, which JSON can write and UTF-8 cannot
            raise bad_request(f"{param}: {error}.", param) from error

    async def tokenize_chat(self, request: ChatCompletionRequest | TokenizeRequest) -> list[int]:
        """The prompt that the model's chat template makes of the request's messages, as token ids."""
        tokenizer = self.require_loaded().tokenizer
        template_kwargs = request.chat_template_kwargs or {}
        for name in _NO_TEMPLATE_KWARGS & template_kwargs.keys():
            raise bad_request(f"chat_template_kwargs must not hold {name}.", "chat_template_kwargs")
        if request.add_generation_prompt is None:
            add_generation_prompt = not request.continue_final_message
        else:
            add_generation_prompt = request.add_generation_prompt
        try:
            text = tokenizer.apply_chat_template(
                [message.for_template() for message in request.messages or ()],
                add_generation_prompt=add_generation_prompt,
                continue_final_message=request.continue_final_message,
                **template_kwargs,
            )
        except ValueError as error:  # there is no template, or it refuses these messages
            raise bad_request(f"{error}.", "messages") from error
        # The template writes the special tokens itself, so that none are added unless asked for.
        return await self.tokenize(text, "messages", bool(request.add_special_tokens))

    async def start(
        self, request: GenerationRequest, prompts: list[list[int]], max_tokens: int | None, param: str
    ) -> Generation:
        """The generation that ``request`` asks for.

        Args:
            max_tokens: None goes on to the model's context length.
            param: the request's field that holds the prompts.
        Raises:
            APIError: what is wrong with the request, or with the server.
        """
        loaded = self.require_loaded()
        assert self.engine is not None
        sampling: SamplingParams = request.sampling(max_tokens, loaded.info.vocab_size)
        self.metrics.on_request(sampling.n, max_tokens)
        try:
            return await start_generation(self.engine, loaded.info, loaded.tokenizer.backend, prompts, sampling, param)
        except APIError as error:
            self.metrics.on_rejection(error.envelope.error.code or "invalid")
            raise


async def _any_service(request: Request) -> Service:
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


async def _ready_service(request: Request) -> Service:
    service = await _any_service(request)
    service.require_loaded()
    return service


AnyService = Annotated[Service, Depends(_any_service)]
"""The service of a route that answers at any time."""
ReadyService = Annotated[Service, Depends(_ready_service)]
"""The service of a route that answers 503 unless the model is loaded."""
