"""The bodies of requests and answers, in OpenAI's shapes.

Requests are pydantic models: strict types, and a field is one of

- used: it has a type and a bound;
- ``Ignored``: clients send it and it changes no output (accounting, routing, hints);
- unsupported (``_only``): it would change the output and is not implemented, so that anything but a neutral value is
  refused by name;
- unknown: refused by name.

Answers are msgspec structs, which encode at about a microsecond per token of a stream.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from mixattn.server.errors import bad_request
from mixattn.types import SamplingParams

MAX_PROMPTS = 1024
MAX_STOP_STRINGS = 16

Ignored = Annotated[Any, Field(description="Accepted, without effect.")]


def _only(*neutral: Any) -> AfterValidator:
    """A validator of a field that is not implemented: null and ``neutral`` pass, the rest is refused."""

    def check(value: Any) -> Any:
        if value is None or value in neutral:
            return None
        allowed = "".join(f" or set it to {value!r}" for value in neutral)
        raise PydanticCustomError("unsupported", "is not supported here; leave it out{allowed}.", {"allowed": allowed})

    return AfterValidator(check)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int for v in value)


def _one_list_of_prompts(value: Any) -> list[str] | list[list[int]]:
    """``prompt`` as a list, whichever of its four forms was sent."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if _is_ids(value):
            return [value]
        if all(isinstance(v, str) for v in value) or all(_is_ids(v) for v in value):
            return value
    raise PydanticCustomError(
        "prompt_type", "must be a string, a list of strings, a list of token ids or a list of lists of token ids"
    )


def _text_of_parts(value: Any) -> str | None:
    """A message's ``content`` as one string; the texts of a list of parts are joined by line ends."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise PydanticCustomError("content_type", "must be a string, a list of text parts or null")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise PydanticCustomError(
                "unsupported", "holds a part of type {kind}; only text parts are supported.", {"kind": repr(kind)}
            )
        if not isinstance(part.get("text"), str):
            raise PydanticCustomError("content_type", "must hold text parts with a string under text")
        texts.append(part["text"])
    return "\n".join(texts)


def _one_list_of_stops(value: Any) -> list[str] | None:
    """``stop`` as a list."""
    if value is None:
        return None
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOP_STRINGS or not all(isinstance(s, str) and s for s in stops):
        raise PydanticCustomError(
            "stop_type",
            "must be a non-empty string or a list of at most {count} of them",
            {"count": MAX_STOP_STRINGS},
        )
    return stops


class RequestModel(BaseModel):
    """What all request bodies share: no coercion of types, no NaN, no unknown field."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(RequestModel):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class StreamOptions(RequestModel):
    """What a stream holds besides tokens."""

    include_usage: bool = False
    """A last chunk without choices carries ``usage``."""
    continuous_usage_stats: bool = False
    """Every chunk carries ``usage`` so far."""
    include_obfuscation: Ignored = None


class GenerationRequest(RequestModel):
    """The fields that completions and chat completions share."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=128)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[str] | None, BeforeValidator(_one_list_of_stops, json_schema_input_type=str | list[str])] = (
        None
    )
    # Extensions, under vLLM's names.
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=1e-3, le=100)
    min_tokens: int | None = Field(None, ge=0)
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = Field(None, max_length=1024)
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    add_special_tokens: bool | None = None

    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    prediction: Ignored = None
    request_id: Ignored = None
    session_id: Ignored = None
    cache_salt: Ignored = None

    best_of: int | None = None
    logprobs: Annotated[Any, _only(False)] = None
    prompt_logprobs: Annotated[Any, _only()] = None
    response_format: Annotated[Any, _only({"type": "text"})] = None
    structured_outputs: Annotated[Any, _only()] = None
    bad_words: Annotated[Any, _only([])] = None
    allowed_token_ids: Annotated[Any, _only()] = None
    use_beam_search: Annotated[Any, _only(False)] = None
    length_penalty: Annotated[Any, _only(1.0)] = None
    priority: Annotated[Any, _only(0)] = None
    return_token_ids: Annotated[Any, _only(False)] = None
    truncate_prompt_tokens: Annotated[Any, _only()] = None
    spaces_between_special_tokens: Annotated[Any, _only(True)] = None
    logits_processors: Annotated[Any, _only([])] = None
    kv_transfer_params: Annotated[Any, _only()] = None

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def wants_usage_in_each_chunk(self) -> bool:
        return self.wants_usage and self.stream_options is not None and self.stream_options.continuous_usage_stats

    def sampling(self, max_tokens: int | None, vocab_size: int) -> SamplingParams:
        """The fields as sampling parameters; ``max_tokens`` None goes on to the model's context length.

        Raises:
            APIError: 400, naming the field and its bound.
        """
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options is only allowed when stream is true.", "stream_options")
        if self.best_of not in (None, self.n or 1):
            raise bad_request(f"best_of must equal n ({self.n or 1}), got {self.best_of}.", "best_of")
        names = SamplingParams.__dataclass_fields__.keys() & type(self).model_fields.keys()
        values = {name: value for name in names if (value := getattr(self, name)) is not None}
        values["max_tokens"] = max_tokens
        if self.logit_bias is not None:
            values["logit_bias"] = {_token_id(key, vocab_size): bias for key, bias in self.logit_bias.items()}
        for token_id in self.stop_token_ids or ():
            check_token_id(token_id, vocab_size, "stop_token_ids")
        try:
            return SamplingParams(**values)
        except ValueError as error:  # its messages begin with the field's name
            param = str(error).replace("[", " ").split()[0]
            raise bad_request(f"{error}.", param) from error


class CompletionRequest(GenerationRequest):
    """Body of ``POST /v1/completions``."""

    prompt: Annotated[
        list[str] | list[list[int]],
        BeforeValidator(_one_list_of_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
    ] = Field(max_length=MAX_PROMPTS)
    echo: bool | None = None
    suffix: Annotated[Any, _only("")] = None


class Message(RequestModel):
    """One message of a chat. ``developer`` is OpenAI's newer name of ``system``."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[
        str | None, BeforeValidator(_text_of_parts, json_schema_input_type=str | list[TextPart] | None)
    ] = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    refusal: Ignored = None
    annotations: Ignored = None
    audio: Annotated[Any, _only()] = None
    function_call: Annotated[Any, _only()] = None

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates read it."""
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": self.content or "",
        }
        for name in ("name", "tool_calls", "tool_call_id"):
            if getattr(self, name) is not None:
                message[name] = getattr(self, name)
        return message


class ChatCompletionRequest(GenerationRequest):
    """Body of ``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    add_generation_prompt: bool | None = None
    """True unless ``continue_final_message``."""
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None

    parallel_tool_calls: Ignored = None

    tools: Annotated[Any, _only([])] = None
    tool_choice: Annotated[Any, _only("none", "auto")] = None
    functions: Annotated[Any, _only([])] = None
    function_call: Annotated[Any, _only("none", "auto")] = None
    top_logprobs: Annotated[Any, _only(0)] = None
    modalities: Annotated[Any, _only(["text"])] = None
    audio: Annotated[Any, _only()] = None
    reasoning_effort: Annotated[Any, _only("none")] = None
    verbosity: Annotated[Any, _only("medium")] = None
    web_search_options: Annotated[Any, _only()] = None
    chat_template: Annotated[Any, _only()] = None
    documents: Annotated[Any, _only([])] = None
    mm_processor_kwargs: Annotated[Any, _only()] = None


class TokenizeRequest(RequestModel):
    """Body of ``POST /tokenize``: a prompt, or messages through the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: Annotated[Any, _only(False)] = None


class DetokenizeRequest(RequestModel):
    """Body of ``POST /detokenize``."""

    model: str | None = None
    tokens: list[int]


def check_token_id(token_id: int, vocab_size: int, param: str) -> None:
    """Raises 400 if the model has no such token."""
    if not 0 <= token_id < vocab_size:
        raise bad_request(f"{param} must hold token ids in [0, {vocab_size - 1}], got {token_id}.", param)


def _token_id(key: str, vocab_size: int) -> int:
    try:
        token_id = int(key)
    except ValueError:
        raise bad_request(f"logit_bias must have token ids as keys, got {key!r}.", "logit_bias") from None
    check_token_id(token_id, vocab_size, "logit_bias")
    return token_id


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """How many of the prompt's tokens were found in a cache."""

    cached_tokens: int = 0


class Usage(msgspec.Struct, frozen=True):
    """Tokens of a request, over all its choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails = PromptTokensDetails()


class CompletionChoice(msgspec.Struct, frozen=True):
    """One completion, or in a stream its next piece."""

    index: int
    text: str
    finish_reason: str | None
    logprobs: None = None


class Completion(msgspec.Struct, frozen=True):
    """The answer of ``/v1/completions``, or a chunk of its stream."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    object: Literal["text_completion"] = "text_completion"


class ChatMessage(msgspec.Struct, frozen=True):
    """The model's message."""

    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True):
    """One answer to a chat."""

    index: int
    message: ChatMessage
    finish_reason: str | None
    logprobs: None = None


class ChatCompletion(msgspec.Struct, frozen=True):
    """The answer of ``/v1/chat/completions``."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"


class ChatDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    """The next piece of the model's message."""

    role: str | msgspec.UnsetType = msgspec.UNSET
    content: str | msgspec.UnsetType = msgspec.UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True):
    """One answer's next piece."""

    index: int
    delta: ChatDelta
    finish_reason: str | None
    logprobs: None = None


class ChatCompletionChunk(msgspec.Struct, frozen=True):
    """An event of a chat's stream."""

    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


class ModelCard(msgspec.Struct, frozen=True):
    """An entry of ``/v1/models``."""

    id: str
    created: int
    root: str
    max_model_len: int
    object: Literal["model"] = "model"
    owned_by: str = "mixattn"
    parent: None = None


class ModelList(msgspec.Struct, frozen=True):
    """The answer of ``/v1/models``."""

    data: list[ModelCard]
    object: Literal["list"] = "list"
