"""What is served, and its tokenizer: ``/v1/models``, ``/tokenize``, ``/detokenize``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from mixattn.server.answer import json_response
from mixattn.server.errors import bad_request
from mixattn.server.protocol import DetokenizeRequest, ModelCard, ModelList, TokenizeRequest, check_token_id
from mixattn.server.service import ReadyService, Service

router = APIRouter()


def _card(service: Service, name: str) -> ModelCard:
    return ModelCard(name, service.created_s, service.model, service.require_loaded().info.max_model_len)


@router.get("/v1/models", summary="List models")
async def list_models(service: ReadyService) -> Response:
    return json_response(ModelList([_card(service, name) for name in service.served_model_names]))


@router.get("/v1/models/{model:path}", summary="Describe a model")
async def retrieve_model(model: str, service: ReadyService) -> Response:
    service.require_model(model)
    return json_response(_card(service, model))


@router.post("/tokenize", summary="Token ids of a text, or of a conversation")
async def tokenize(body: TokenizeRequest, service: ReadyService) -> Response:
    service.require_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("exactly one of prompt and messages must be given.", "prompt")
    if body.messages is not None:
        tokens = await service.tokenize_chat(body)
    else:
        assert body.prompt is not None
        tokens = await service.tokenize(body.prompt, "prompt", body.add_special_tokens is not False)
    answer: dict[str, Any] = {
        "count": len(tokens),
        "max_model_len": service.require_loaded().info.max_model_len,
        "tokens": tokens,
        "token_strs": None,
    }
    return json_response(answer)


@router.post("/detokenize", summary="The text of token ids")
async def detokenize(body: DetokenizeRequest, service: ReadyService) -> Response:
    service.require_model(body.model)
    loaded = service.require_loaded()
    for token_id in body.tokens:
        check_token_id(token_id, loaded.info.vocab_size, "tokens")
    return json_response({"prompt": loaded.tokenizer.decode(body.tokens, skip_special_tokens=False)})
