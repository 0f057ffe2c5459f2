"""What the API process and the engine process say to each other: typed msgpack messages over one zmq pair.

The socket lies in a directory that only its owner may enter (mkdtemp, 0700), a pair accepts one peer, and the directory
is removed as soon as that peer has said hello. A message is decoded into the types below or refused; nothing is ever
unpickled. Both processes read the same clock (CLOCK_MONOTONIC), so times need no translation.
"""

from __future__ import annotations

import msgspec

from mixattn.metrics import SchedulerStats, StepRecord
from mixattn.types import FinishReason, Request, TokenEvent


class AddRequests(msgspec.Struct, tag="add", array_like=True, frozen=True):
    """Serve these requests, all or none; ``Admission`` answers."""

    group_id: int
    requests: list[Request]


class AbortRequests(msgspec.Struct, tag="abort", array_like=True, frozen=True):
    """Forget these requests; ids that have ended meanwhile are no error."""

    request_ids: list[str]
    reason: FinishReason
    """What they count as: ``STOP`` where a stop string was found."""


class Hello(msgspec.Struct, tag="hello", array_like=True, frozen=True):
    """The engine process is connected; it goes on to load the model."""


class TokenizerData(msgspec.Struct, array_like=True, frozen=True):
    """A tokenizer, as ``models.tokenizer.Tokenizer`` takes it: the API process needs no model file and no torch."""

    backend: str
    """tokenizer.json."""
    special_tokens: dict[str, str]
    chat_templates: dict[str, str]


class EngineInfo(msgspec.Struct, tag="ready", array_like=True, frozen=True):
    """The model is loaded and requests are welcome."""

    max_model_len: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    page_size: int
    num_pages: int
    max_num_queued_reqs: int
    max_num_batched_tokens: int
    tokenizer: TokenizerData
    import_s: float
    """From the engine process's first line to the end of its imports."""
    load_s: float
    """From there to ready."""


class Admission(msgspec.Struct, tag="admission", array_like=True, frozen=True):
    """Whether a group of requests was taken."""

    group_id: int
    error: str | None
    is_queue_full: bool = False


class StepStats(msgspec.Struct, array_like=True, frozen=True):
    """The engine after a step, or after requests came or went between steps."""

    scheduler: SchedulerStats
    step: StepRecord | None
    """None when there was none."""
    queue_counts: list[int]
    """Times in the queue since the start, ``counts`` of ``metrics.EngineMetrics.queue_s``."""
    queue_total_s: float


class StepOutputs(msgspec.Struct, tag="step", array_like=True, frozen=True):
    """What a step gave."""

    events: list[TokenEvent]
    stats: StepStats


class Failure(msgspec.Struct, tag="failure", array_like=True, frozen=True):
    """The engine's last words."""

    message: str


Command = AddRequests | AbortRequests
Event = Hello | EngineInfo | Admission | StepOutputs | Failure

encoder = msgspec.msgpack.Encoder()
command_decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
event_decoder: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)
