"""What a finished (or running) request looks like to the caller; names are vLLM's."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class RequestMetrics:
    """When things happened to a request, in seconds of the engine's clock."""

    arrival_s: float
    token_times_s: tuple[float, ...] = ()
    """When each token of the (first) output was committed."""

    @property
    def time_to_first_token_s(self) -> float | None:
        return self.token_times_s[0] - self.arrival_s if self.token_times_s else None

    @property
    def latency_s(self) -> float | None:
        return self.token_times_s[-1] - self.arrival_s if self.token_times_s else None

    @property
    def inter_token_gaps_s(self) -> list[float]:
        return [b - a for a, b in zip(self.token_times_s, self.token_times_s[1:], strict=False)]


@dataclass
class CompletionOutput:
    """One continuation of a prompt.

    Args:
        index: which of the ``n``.
        text: without the stop string or stop token, unless ``include_stop_str_in_output``.
        token_ids: all generated tokens, a final stop token included.
        finish_reason: None while it runs.
        stop_reason: the stop string, or the id out of ``stop_token_ids``, that ended it; None for the model's own end
            of sequence.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class RequestOutput:
    """A prompt and its ``n`` continuations."""

    request_id: str
    prompt: str | None
    """None when token ids were given."""
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics | None = None

    @property
    def finished(self) -> bool:
        return all(output.finished() for output in self.outputs)
