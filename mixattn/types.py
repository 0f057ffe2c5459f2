"""The data that crosses rooms: requests, the slices of a step, what a step returned."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property


class FinishReason(str, Enum):
    """Why a request ended, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


def _check(name: str, value: float, low: float, high: float, bound: str) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or math.isnan(value) or not low <= value <= high:
        raise ValueError(f"{name} must be {bound}, got {value!r}")


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen; names and defaults are vLLM's.

    Args:
        n: completions per prompt.
        temperature: 0 is greedy.
        top_p: keep the smallest set of tokens whose probability reaches this; 1 is off.
        top_k: keep this many tokens; 0 or -1 is off.
        min_p: drop tokens below this share of the most likely one; 0 is off.
        seed: the same seed gives the same tokens, whatever else is in the batch; None draws one.
        max_tokens: tokens to generate at most; None goes on to the model's context length.
        min_tokens: no end-of-sequence or stop token before this many.
        stop: strings that end the output; they are cut off unless ``include_stop_str_in_output``.
        stop_token_ids: ids that end the output, besides the model's own.
        ignore_eos: go on past the model's end-of-sequence tokens.
        presence_penalty, frequency_penalty: subtracted from logits of tokens already generated (OpenAI).
        repetition_penalty: divides positive and multiplies negative logits of tokens seen (arXiv:1909.05858).
        logit_bias: added to the logits of these ids.
        skip_special_tokens: leave special tokens out of the text.
    Raises:
        ValueError: naming the field and its bound.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        if not isinstance(self.n, int) or not 1 <= self.n <= 128:
            raise ValueError(f"n must be an integer in [1, 128], got {self.n!r}")
        _check("temperature", self.temperature, 0.0, 100.0, "in [0, 100]")
        _check("top_p", self.top_p, 1e-9, 1.0, "in (0, 1]")
        _check("min_p", self.min_p, 0.0, 1.0, "in [0, 1]")
        _check("presence_penalty", self.presence_penalty, -2.0, 2.0, "in [-2, 2]")
        _check("frequency_penalty", self.frequency_penalty, -2.0, 2.0, "in [-2, 2]")
        _check("repetition_penalty", self.repetition_penalty, 1e-3, 100.0, "in [0.001, 100]")
        if not isinstance(self.top_k, int) or self.top_k < -1:
            raise ValueError(f"top_k must be an integer >= -1, got {self.top_k!r}")
        if self.max_tokens is not None and (not isinstance(self.max_tokens, int) or self.max_tokens < 1):
            raise ValueError(f"max_tokens must be an integer >= 1 or None, got {self.max_tokens!r}")
        if not isinstance(self.min_tokens, int) or self.min_tokens < 0:
            raise ValueError(f"min_tokens must be an integer >= 0, got {self.min_tokens!r}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens ({self.min_tokens}) must be <= max_tokens ({self.max_tokens})")
        if self.seed is not None and (not isinstance(self.seed, int) or not -(2**63) <= self.seed < 2**63):
            raise ValueError(f"seed must be a 64-bit integer or None, got {self.seed!r}")
        if any(not isinstance(s, str) or s == "" for s in stop):
            raise ValueError("stop must hold non-empty strings")
        if self.logit_bias is not None:
            for token_id, bias in self.logit_bias.items():
                _check(f"logit_bias[{token_id}]", bias, -100.0, 100.0, "in [-100, 100]")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def uses_history(self) -> bool:
        """Whether the choice of a token depends on the tokens before it (beyond the model)."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1


@dataclass(frozen=True)
class Request:
    """One prompt to be continued. ``sampling.n`` is already unfolded: a request has one output."""

    request_id: str
    prompt_token_ids: Sequence[int]
    sampling: SamplingParams
    arrival_s: float = 0.0
    eos_token_ids: frozenset[int] = field(default_factory=frozenset)


@dataclass(slots=True)
class Slice:
    """One request's rows in a step. A decode is a slice with q_len 1; there is no prefill mode of a batch.

    Read only for whoever gets it. It is not frozen because a step makes one per request, and a frozen dataclass of ten
    fields takes six times as long to make (1.5 us against 0.26 us, AMD EPYC, CPython 3.11).

    Args:
        q_len: rows computed this step.
        kv_len: keys including these rows.
        token_ids: the q_len input tokens; None for a decode whose input is the token that the still uncommitted
            plan before this one samples.
        page_ids: array('i') of at least ceil(kv_len / page_size) pages; the scheduler's, read only, theirs until the
            plan is committed. The array itself never changes: a request that grows gets a new one.
        is_sampled: whether the last row's logits give a token (false for all but the last chunk of a prompt).
        output_idx: how many tokens the request has generated before; the counter of its random stream.
        history: prompt and output tokens known so far, for penalties; the scheduler's, read only. It holds
            ``prompt_len + output_idx`` tokens once all plans before this one are committed.
        prompt_len: how many of ``history`` are the prompt.
    """

    request_id: str
    q_len: int
    kv_len: int
    token_ids: Sequence[int] | None
    page_ids: array[int]
    is_sampled: bool
    sampling: SamplingParams
    output_idx: int
    history: Sequence[int]
    prompt_len: int


@dataclass(frozen=True)
class BatchPlan:
    """The slices of one step, running decodes first."""

    step_idx: int
    slices: tuple[Slice, ...]

    @cached_property
    def num_tokens(self) -> int:
        return sum(s.q_len for s in self.slices)

    @cached_property
    def num_decodes(self) -> int:
        """The first so many slices are decodes: one row, which follows a generated token and gives the next."""
        return sum(s.q_len == 1 and s.is_sampled and s.output_idx > 0 for s in self.slices)


@dataclass(frozen=True)
class StepResult:
    """What an executor returns: one token for every sampled slice of the plan, by request id."""

    token_ids: dict[str, int]


@dataclass(slots=True)
class TokenEvent:
    """A token was committed, or (token_id None) a request ended without one. Read only, as ``Slice`` is.

    ``error`` says why a request ended with ``FinishReason.ERROR``.
    """

    request_id: str
    token_id: int | None
    finish_reason: FinishReason | None
    time_s: float
    error: str | None = None
