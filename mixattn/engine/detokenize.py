"""Text from token ids as they come, and stop strings of which no part is ever let out."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from mixattn.types import SamplingParams

_CONTEXT_TOKENS = 6
"""Prompt tokens that the decoder sees first, so that it does not take the first output token for the start of a text
(and strip its space, as SentencePiece decoders do)."""


class StopStringMatcher:
    """Passes text on up to the first stop string; keeps back what may still become the beginning of one.

    The match that ends first wins, and of those the one that begins first: what is found does not depend on how the
    text was cut into pieces.
    """

    def __init__(self, stop: Sequence[str], include_in_output: bool = False) -> None:
        self._stop = tuple(stop)
        self._include_in_output = include_in_output
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The text that can be let out now; what follows a match is dropped."""
        if self.matched is not None:
            return ""
        if not self._stop:
            return text
        text = self._held + text
        found = [(begin + len(stop), begin, stop) for stop in self._stop if (begin := text.find(stop)) >= 0]
        if found:
            end, begin, self.matched = min(found)
            self._held = ""
            return text[: end if self._include_in_output else begin]
        num_held = max(_overlap(text, stop) for stop in self._stop)
        cut = len(text) - num_held
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """What was kept back, once no more text comes."""
        held, self._held = self._held, ""
        return held


class IncrementalDetokenizer:
    """The text of one output.

    Args:
        tokenizer: the model's.
        sampling: for ``stop``, ``include_stop_str_in_output``, ``skip_special_tokens`` and ``min_tokens``.
        prompt_token_ids: what the output continues.
    """

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingParams, prompt_token_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = sampling.skip_special_tokens
        self._include_stop = sampling.include_stop_str_in_output
        self._min_tokens = sampling.min_tokens
        self._num_tokens = 0
        self._pending: list[int] = []  # tokens whose text is not complete, such as the first bytes of a character
        self._parts: list[str] = []
        self._matcher = StopStringMatcher(sampling.stop, sampling.include_stop_str_in_output)
        self._context = list(prompt_token_ids[-_CONTEXT_TOKENS:])
        self._stream: DecodeStream | None = None  # made with the first token: by then the prompt has been accepted

    @property
    def text(self) -> str:
        """All text let out so far."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    @property
    def stop_string(self) -> str | None:
        """The stop string that was found; the request ends there."""
        return self._matcher.matched

    def push(self, token_id: int, is_stop_token: bool = False) -> str:
        """The new text that ``token_id`` lets out.

        Args:
            token_id: the next token of the output.
            is_stop_token: the token ended the request (end of sequence or ``stop_token_ids``); like a stop string it
                is left out of the text, unless ``include_stop_str_in_output``.
        """
        if self.stop_string is not None:
            return ""
        self._num_tokens += 1
        if is_stop_token and not self._include_stop:
            return ""
        if self._stream is None:
            self._stream = self._decode_stream()
        self._pending.append(token_id)
        text = self._stream.step(self._tokenizer, token_id)
        if text is None:
            return ""
        self._pending.clear()
        return self._emit(text)

    def finish(self) -> str:
        """The rest of the text, once no more tokens come: what was kept back, incomplete characters as U+FFFD."""
        if self.stop_string is not None:
            return ""
        rest = self._tokenizer.decode(self._pending, skip_special_tokens=self._skip_special_tokens)
        self._pending.clear()
        new = self._emit(rest)
        if self.stop_string is None:
            held = self._matcher.flush()
            self._parts.append(held)
            new += held
        return new

    def _emit(self, text: str) -> str:
        # Too early to stop: what comes out by then is not searched, as in vLLM.
        new = text if self._num_tokens <= self._min_tokens else self._matcher.push(text)
        self._parts.append(new)
        return new

    def _decode_stream(self) -> DecodeStream:
        """A decoder that has seen the end of the prompt, unless that ends within a character."""
        text = self._tokenizer.decode(self._context, skip_special_tokens=self._skip_special_tokens)
        context = [] if text.endswith("\ufffd") else self._context
        return DecodeStream(ids=context, skip_special_tokens=self._skip_special_tokens)


def _overlap(text: str, stop: str) -> int:
    """Characters of the longest end of ``text`` that begins ``stop`` without being all of it."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
