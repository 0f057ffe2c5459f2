"""``POST /v1/chat/completions``: a conversation, through the model's chat template, answered."""

from __future__ import annotations

from collections.abc import Iterator

from fastapi import APIRouter, Request
from starlette.responses import Response

from mixattn.server.answer import Answer
from mixattn.server.generation import TextDelta
from mixattn.server.protocol import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatDelta,
    ChatMessage,
)
from mixattn.server.service import ReadyService

router = APIRouter()


class ChatAnswer(Answer):
    """The assistant's messages."""

    id_prefix = "chatcmpl"

    def opening_chunks(self) -> Iterator[ChatCompletionChunk]:
        for index in range(self.generation.num_choices):
            yield self._chunk(ChatChunkChoice(index, ChatDelta(role="assistant", content=""), None))

    def chunk(self, delta: TextDelta) -> ChatCompletionChunk:
        return self._chunk(ChatChunkChoice(delta.index, ChatDelta(content=delta.text), delta.finish_reason))

    def usage_chunk(self) -> ChatCompletionChunk:
        return ChatCompletionChunk(self.id, self.created, self.model, [], self.generation.usage)

    def whole(self, texts: list[tuple[str, str]]) -> ChatCompletion:
        choices = [ChatChoice(index, ChatMessage(text), reason) for index, (text, reason) in enumerate(texts)]
        return ChatCompletion(self.id, self.created, self.model, choices, self.generation.usage)

    def _chunk(self, choice: ChatChunkChoice) -> ChatCompletionChunk:
        return ChatCompletionChunk(self.id, self.created, self.model, [choice], self.usage_of_chunk())


@router.post("/v1/chat/completions", summary="Answer a conversation")
async def create_chat_completion(body: ChatCompletionRequest, request: Request, service: ReadyService) -> Response:
    service.require_model(body.model)
    prompt = await service.tokenize_chat(body)
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    generation = await service.start(body, [prompt], max_tokens, "messages")
    return await ChatAnswer(body, generation, service.served_model_names[0]).respond(request)
