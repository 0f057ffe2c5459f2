"""Offline generation: prompts in, texts out."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

from tqdm import tqdm

from mixattn.config import CacheConfig, EngineConfig, SchedulerConfig
from mixattn.engine.build import Engine, build_engine
from mixattn.engine.detokenize import IncrementalDetokenizer
from mixattn.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from mixattn.models.loader import LoadedModel, load_model
from mixattn.models.tokenizer import Tokenizer
from mixattn.types import FinishReason, Request, SamplingParams, TokenEvent

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, ``{"prompt": text}`` or ``{"prompt_token_ids": ids}``."""
Message = Mapping[str, Any]
"""A turn of a conversation: ``{"role": ..., "content": ...}``."""


@dataclass
class _Running:
    """One output under way: its request, its text so far, when its tokens came."""

    request: Request
    detokenizer: IncrementalDetokenizer
    output: CompletionOutput
    token_times_s: list[float] = field(default_factory=list)

    def take(self, event: TokenEvent) -> None:
        """Adds an event's token and text; its finish reason, or a stop string in the text, is the end.

        Raises:
            RuntimeError: the step failed that was to give the token.
        """
        if event.finish_reason is FinishReason.ERROR:
            raise RuntimeError(f"request {event.request_id} failed: {event.error}")
        if event.token_id is not None:
            self.output.token_ids.append(event.token_id)
            self.token_times_s.append(event.time_s)
            self.detokenizer.push(event.token_id, event.finish_reason is FinishReason.STOP)
        if event.finish_reason is not None:
            self.detokenizer.finish()
            self.output.finish_reason = event.finish_reason.value
            is_stop = event.finish_reason is FinishReason.STOP
            is_named = event.token_id in self.request.sampling.stop_token_ids
            self.output.stop_reason = event.token_id if is_stop and is_named else None
        if self.detokenizer.stop_string is not None:
            self.output.finish_reason = FinishReason.STOP.value
            self.output.stop_reason = self.detokenizer.stop_string
        self.output.text = self.detokenizer.text


class LLM:
    """A model with its engine, in this process; names and defaults are vLLM's where vLLM has them.

    Args:
        model: a folder, a GGUF file, a Hugging Face name, or an alias such as ``smollm2``.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``: weights and activations.
        seed: of the requests that name none; the same prompts in the same order give the same tokens.
        max_model_len: the longest context, prompt and output; None is the model's own.
        max_num_seqs: requests that run at once.
        max_num_batched_tokens: the token budget of a step.
        block_size: tokens per page of KV.
        num_gpu_blocks_override: pages of KV, on whatever device; None sizes the pool from ``kv_cache_memory_bytes``.
        kv_cache_memory_bytes: memory for KV; None takes a share of what is free.
        kv_cache_dtype: what K and V are stored as: ``auto`` (as the model), ``float32``, ``bfloat16``, ``float16``,
            ``int8``, ``fp8_e4m3``, ``fp8_e5m2`` or ``int4``; the last four with a scale per token and head.
        enable_chunked_prefill: False runs whole prompts in steps of their own while decodes wait.
        tbt_slo_ms: milliseconds that a running request may wait for its next token: chunks of prompts are cut so that
            steps keep it, by times learned while serving; None leaves it to the token budget.
        max_slowdown: how many times as long as its decodes alone a step may take, likewise. With either, how a prompt
            is cut depends on the clock, and so may the last bits of logits.
        attention_backend: ``cpu``, ``triton`` or ``reference``; None is the fastest here.
        load_format: ``auto``, ``safetensors``, ``gguf`` or ``dummy``.
        chat_template: Jinja text in place of the model's own.
    Raises:
        ValueError: an argument is out of bounds; the message names it.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        seed: int = 0,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int = SchedulerConfig.max_num_batched_tokens,
        block_size: int = CacheConfig.page_size,
        num_gpu_blocks_override: int | None = None,
        kv_cache_memory_bytes: int | None = None,
        kv_cache_dtype: str = CacheConfig.kv_cache_dtype,
        enable_chunked_prefill: bool = True,
        tbt_slo_ms: float | None = None,
        max_slowdown: float | None = None,
        attention_backend: str | None = None,
        load_format: str = "auto",
        chat_template: str | None = None,
    ) -> None:
        if max_num_seqs is None:
            max_num_seqs = min(SchedulerConfig.max_num_seqs, max_num_batched_tokens)
        config = EngineConfig(
            model=model,
            dtype=dtype,
            seed=seed,
            max_model_len=max_model_len,
            cache=CacheConfig(block_size, num_gpu_blocks_override, kv_cache_memory_bytes, kv_cache_dtype),
            scheduler=SchedulerConfig(
                max_num_batched_tokens=max_num_batched_tokens,
                max_num_seqs=max_num_seqs,
                policy=SchedulerConfig.policy_for(enable_chunked_prefill, tbt_slo_ms, max_slowdown),
                tbt_slo_ms=tbt_slo_ms,
                max_slowdown=max_slowdown,
            ),
            attention_backend=attention_backend,
            load_format=load_format,
            chat_template=chat_template,
        )
        self._start(config, load_model(config))

    @classmethod
    def from_config(cls, config: EngineConfig, loaded: LoadedModel | None = None) -> LLM:
        """An engine as ``config`` says, around weights that are already in memory, or loads them."""
        llm = cls.__new__(cls)
        llm._start(config, load_model(config) if loaded is None else loaded)
        return llm

    def _start(self, config: EngineConfig, loaded: LoadedModel) -> None:
        self._engine: Engine | None = build_engine(config, loaded)
        self._request_numbers = itertools.count()

    @property
    def engine(self) -> Engine:
        """The engine itself: its state, counters and sizes.

        Raises:
            RuntimeError: after ``close``.
        """
        if self._engine is None:
            raise RuntimeError("the LLM is closed")
        return self._engine

    def get_tokenizer(self) -> Tokenizer:
        return self.engine.tokenizer

    def close(self) -> None:
        """Frees weights and KV; no generation is possible after it."""
        self._engine = None

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """The continuations of each prompt, in the prompts' order.

        Args:
            prompts: one or many; text, ``{"prompt": text}``, ``{"prompt_token_ids": ids}``, or ids.
            sampling_params: for all prompts, or one for each.
            use_tqdm: whether a progress bar is shown.
        Raises:
            ValueError: a prompt or its parameters can never be served; nothing was generated.
        """
        prompt_list = [self._tokenize(prompt) for prompt in _as_list(prompts)]
        running: list[list[_Running]] = []
        for prompt, sampling in zip(prompt_list, _per_prompt(sampling_params, len(prompt_list)), strict=True):
            running.append(self._unfold(prompt, sampling))
        with _Progress(running, is_shown=use_tqdm) as progress:
            for one in self._run([one for outputs in running for one in outputs]):
                progress.update(one)
        return [_request_output(prompt, outputs) for prompt, outputs in zip(prompt_list, running, strict=True)]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
    ) -> list[RequestOutput]:
        """The answers to one conversation, or to each of several; arguments as ``generate``.

        Raises:
            ValueError: the model has no chat template, or it refuses the messages.
        """
        is_one = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Any = [messages] if is_one else messages
        prompts = [self.render_chat(one, add_generation_prompt) for one in conversations]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def render_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> dict[str, Any]:
        """The prompt that the model's chat template makes of a conversation, as text and token ids."""
        text = self.get_tokenizer().apply_chat_template(messages, add_generation_prompt=add_generation_prompt)
        return {"prompt": text, "prompt_token_ids": self.get_tokenizer().encode(text, add_special_tokens=False)}

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Generator[RequestOutput, None, None]:
        """The output so far, each time it has grown by a token. Closing the iterator ends the request.

        Raises:
            ValueError: the prompt or its parameters can never be served.
        """
        tokenized = self._tokenize(prompt)
        outputs = self._unfold(tokenized, sampling_params or SamplingParams())
        for _ in self._run(outputs):
            yield _request_output(tokenized, outputs)

    def _tokenize(self, prompt: Prompt) -> _Tokenized:
        if isinstance(prompt, str):
            return _Tokenized(prompt, self.get_tokenizer().encode(prompt))
        if isinstance(prompt, Mapping):
            text = prompt.get("prompt")
            if "prompt_token_ids" in prompt:
                return _Tokenized(text, _checked_ids(prompt["prompt_token_ids"]))
            if isinstance(text, str):
                return _Tokenized(text, self.get_tokenizer().encode(text))
            raise ValueError(f"a prompt must have prompt or prompt_token_ids, got the keys {sorted(prompt)}")
        return _Tokenized(None, _checked_ids(prompt))

    def _unfold(self, prompt: _Tokenized, sampling: SamplingParams) -> list[_Running]:
        """The ``n`` requests of one prompt; each has its own seed and so its own random stream."""
        number, now, running = next(self._request_numbers), time.monotonic(), []
        for idx in range(sampling.n):
            seed = None if sampling.seed is None else _wrap_int64(sampling.seed + idx)
            request = Request(
                request_id=str(number) if sampling.n == 1 else f"{number}-{idx}",
                prompt_token_ids=prompt.token_ids,
                sampling=replace(sampling, n=1, seed=seed),
                arrival_s=now,
                eos_token_ids=self.engine.model_config.eos_token_ids,
            )
            detokenizer = IncrementalDetokenizer(self.get_tokenizer().backend, sampling, prompt.token_ids)
            running.append(_Running(request, detokenizer, CompletionOutput(idx)))
        return running

    def _run(self, requests: Sequence[_Running]) -> Iterator[_Running]:
        """Whichever request has got a token, each time one has, until all have ended.

        Whatever ends the iteration early (an error, Ctrl-C, the caller) aborts what still runs.
        """
        driver = self.engine.driver
        waiting = deque(requests)
        running: dict[str, _Running] = {}
        try:
            while waiting or running:
                while waiting and driver.core.num_waiting < self.engine.scheduler_config.max_num_queued_reqs:
                    driver.add_request(waiting[0].request)
                    one = waiting.popleft()
                    running[one.request.request_id] = one
                for event in driver.step():
                    one = running[event.request_id]
                    one.take(event)
                    if one.output.finished():
                        del running[event.request_id]
                        if event.finish_reason is None:  # a stop string: the engine knows tokens only
                            driver.abort(event.request_id, FinishReason.STOP)
                    yield one
        finally:
            for request_id in running:
                driver.abort(request_id)


@dataclass(frozen=True)
class _Tokenized:
    """A prompt as the engine takes it, and its text if that was given."""

    text: str | None
    token_ids: list[int]


class _Progress:
    """vLLM's progress bar: prompts done, and speed."""

    def __init__(self, running: Sequence[Sequence[_Running]], is_shown: bool) -> None:
        self._left = {one.request.request_id: outputs for outputs in running for one in outputs}
        self._bar = tqdm(
            total=len(running),
            desc="Processed prompts",
            dynamic_ncols=True,
            postfix=f"est. speed input: {0:.2f} toks/s, output: {0:.2f} toks/s",
            disable=not is_shown,
        )
        self._begin_s = time.monotonic()
        self._num_input_tokens = 0
        self._num_output_tokens = 0

    def __enter__(self) -> _Progress:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()

    def update(self, one: _Running) -> None:
        """Counts a prompt when the last of its outputs has finished."""
        outputs = self._left[one.request.request_id]
        if not all(other.output.finished() for other in outputs):
            return
        self._num_input_tokens += len(one.request.prompt_token_ids)
        self._num_output_tokens += sum(len(other.output.token_ids) for other in outputs)
        elapsed_s = max(time.monotonic() - self._begin_s, 1e-9)
        self._bar.postfix = (
            f"est. speed input: {self._num_input_tokens / elapsed_s:.2f} toks/s, "
            f"output: {self._num_output_tokens / elapsed_s:.2f} toks/s"
        )
        self._bar.update(1)


def _request_output(prompt: _Tokenized, outputs: Sequence[_Running]) -> RequestOutput:
    """The state of a prompt's outputs as of now, which goes on without changing it."""
    first = outputs[0]
    return RequestOutput(
        request_id=first.request.request_id.split("-")[0],
        prompt=prompt.text,
        prompt_token_ids=prompt.token_ids,
        outputs=[replace(one.output, token_ids=list(one.output.token_ids)) for one in outputs],
        metrics=RequestMetrics(first.request.arrival_s, tuple(first.token_times_s)),
    )


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many as a list; a flat list of integers is one prompt."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if prompts and all(isinstance(item, int) for item in prompts):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _checked_ids(token_ids: Any) -> list[int]:
    if not isinstance(token_ids, Sequence) or not all(type(item) is int for item in token_ids):
        raise ValueError(f"prompt_token_ids must be a list of integers, got {token_ids!r:.80}")
    return list(token_ids)


def _per_prompt(sampling: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int) -> list[SamplingParams]:
    if sampling is None or isinstance(sampling, SamplingParams):
        return [sampling or SamplingParams()] * num_prompts
    if len(sampling) != num_prompts:
        raise ValueError(f"sampling_params must be one or as many as the {num_prompts} prompts, got {len(sampling)}")
    return list(sampling)


def _wrap_int64(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63
