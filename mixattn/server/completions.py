"""``POST /v1/completions``: prompts, as text or token ids, continued."""

from __future__ import annotations

from collections.abc import Iterator

from fastapi import APIRouter, Request
from starlette.responses import Response

from mixattn.server.answer import Answer
from mixattn.server.generation import Generation, TextDelta
from mixattn.server.protocol import Completion, CompletionChoice, CompletionRequest, check_token_id
from mixattn.server.service import ReadyService, Service

router = APIRouter()

_DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""


class CompletionAnswer(Answer):
    """Texts; choice ``i`` continues prompt ``i // n``.

    Args:
        echoed: what each choice's text begins with: nothing, or its prompt.
    """

    id_prefix = "cmpl"

    def __init__(self, body: CompletionRequest, generation: Generation, model: str, echoed: list[str]) -> None:
        super().__init__(body, generation, model)
        self._echoed = echoed

    def opening_chunks(self) -> Iterator[Completion]:
        for index, text in enumerate(self._echoed):
            if text:
                yield self.chunk(TextDelta(index, text, None))

    def chunk(self, delta: TextDelta) -> Completion:
        choice = CompletionChoice(delta.index, delta.text, delta.finish_reason)
        return Completion(self.id, self.created, self.model, [choice], self.usage_of_chunk())

    def usage_chunk(self) -> Completion:
        return Completion(self.id, self.created, self.model, [], self.generation.usage)

    def whole(self, texts: list[tuple[str, str]]) -> Completion:
        choices = [
            CompletionChoice(index, echoed + text, reason)
            for index, (echoed, (text, reason)) in enumerate(zip(self._echoed, texts, strict=True))
        ]
        return Completion(self.id, self.created, self.model, choices, self.generation.usage)


@router.post("/v1/completions", summary="Continue prompts")
async def create_completion(body: CompletionRequest, request: Request, service: ReadyService) -> Response:
    service.require_model(body.model)
    prompts = [await _token_ids(prompt, body, service) for prompt in body.prompt]
    max_tokens = _DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    generation = await service.start(body, prompts, max_tokens, "prompt")
    num_choices = body.n or 1
    if body.echo:
        texts = [_text(prompt, service) for prompt in body.prompt]
        echoed = [text for text in texts for _ in range(num_choices)]
    else:
        echoed = [""] * (len(prompts) * num_choices)
    return await CompletionAnswer(body, generation, service.served_model_names[0], echoed).respond(request)


async def _token_ids(prompt: str | list[int], body: CompletionRequest, service: Service) -> list[int]:
    if isinstance(prompt, str):
        return await service.tokenize(prompt, "prompt", body.add_special_tokens is not False)
    for token_id in prompt:
        check_token_id(token_id, service.require_loaded().info.vocab_size, "prompt")
    return prompt


def _text(prompt: str | list[int], service: Service) -> str:
    """A prompt as the client would write it."""
    if isinstance(prompt, str):
        return prompt
    return service.require_loaded().tokenizer.decode(prompt, skip_special_tokens=False)
