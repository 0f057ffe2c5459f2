"""What the scheduler knows of one request: which of its tokens are known, computed, or under way."""

from __future__ import annotations

from array import array

from mixattn.types import FinishReason, Request, Slice


class Tracked:
    """A request that is waiting, running, or still in an uncommitted plan after its end.

    Attributes:
        arrival_idx: requests accepted before it.
        tokens: prompt and known output.
        max_tokens: the length of ``tokens`` at which it ends.
        stop_ids: tokens that end it.
        page_ids: its pages, in order of position. Replaced when it grows, never changed: plans hold it.
        num_slots: tokens that its pages hold.
        num_tokens: ``tokens``, and those that the uncommitted plans will give.
        num_computed: rows whose K and V are stored, or will be once the uncommitted plans have run.
        last_step_idx: the newest plan with a slice of it; its pages cannot go to others before that is committed.
        is_ended: it gives no more tokens.
    """

    __slots__ = (
        "arrival_idx",
        "is_ended",
        "last_step_idx",
        "max_tokens",
        "num_computed",
        "num_slots",
        "num_tokens",
        "page_ids",
        "prompt_len",
        "request_id",
        "sampling",
        "stop_ids",
        "tokens",
    )

    def __init__(self, request: Request, tokens: list[int], arrival_idx: int, max_context_tokens: int) -> None:
        sampling = request.sampling
        self.request_id = request.request_id
        self.arrival_idx = arrival_idx
        self.tokens = tokens
        self.prompt_len = len(tokens)
        self.sampling = sampling
        self.stop_ids = frozenset(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            self.stop_ids |= request.eos_token_ids
        self.max_tokens = max_context_tokens
        if sampling.max_tokens is not None:
            self.max_tokens = min(max_context_tokens, self.prompt_len + sampling.max_tokens)
        self.page_ids = array("i")
        self.num_slots = 0
        self.num_tokens = len(tokens)
        self.num_computed = 0
        self.last_step_idx = -1
        self.is_ended = False

    def plan_decode(self, step_idx: int) -> Slice:
        """The row of the last token, known or not; it gives the next one."""
        tokens, num_tokens, prompt_len = self.tokens, self.num_tokens, self.prompt_len
        token_ids = tokens[-1:] if num_tokens == len(tokens) else None
        self.num_computed = num_tokens
        self.num_tokens = num_tokens + 1
        self.last_step_idx = step_idx
        output_idx = num_tokens - prompt_len
        # Positional: keywords take three times as long, for every running request in every step.
        return Slice(
            self.request_id,
            1,
            num_tokens,
            token_ids,
            self.page_ids,
            True,
            self.sampling,
            output_idx,
            tokens,
            prompt_len,
        )

    def plan_chunk(self, num_rows: int, step_idx: int) -> Slice:
        """The next ``num_rows`` of the known tokens; the last of them gives a token."""
        begin, num_tokens = self.num_computed, self.num_tokens
        end = begin + num_rows
        is_sampled = end == num_tokens
        self.num_computed = end
        self.num_tokens += is_sampled
        self.last_step_idx = step_idx
        return Slice(
            request_id=self.request_id,
            q_len=num_rows,
            kv_len=end,
            token_ids=self.tokens[begin:end],
            page_ids=self.page_ids,
            is_sampled=is_sampled,
            sampling=self.sampling,
            output_idx=num_tokens - self.prompt_len,
            history=self.tokens,
            prompt_len=self.prompt_len,
        )

    def withdraw(self, part: Slice) -> None:
        """Undoes the newest of its planned slices, which was not executed."""
        self.num_computed -= part.q_len
        self.num_tokens -= part.is_sampled

    def take(self, token_id: int) -> FinishReason | None:
        """Appends a token that a plan gave; the reason if it is the last."""
        self.tokens.append(token_id)
        if token_id in self.stop_ids and len(self.tokens) - self.prompt_len >= self.sampling.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.tokens) >= self.max_tokens else None
