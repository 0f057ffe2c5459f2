"""Offline throughput: many prompts of given lengths, all at once. Prints the lines of ``vllm bench throughput``."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

from mixattn.engine.llm import LLM
from mixattn.types import SamplingParams


@dataclass(frozen=True)
class Workload:
    """Random prompts.

    Args:
        num_prompts: how many.
        input_len, output_len: tokens of a prompt and of its output; every output reaches its length.
        range_ratio: lengths are drawn from [length (1 - ratio), length (1 + ratio)]; 0 takes them as they are.
        seed: of lengths and tokens.
    Raises:
        ValueError: naming the field and its bound.
    """

    num_prompts: int
    input_len: int
    output_len: int
    range_ratio: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_prompts", "input_len", "output_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not 0 <= self.range_ratio < 1:
            raise ValueError(f"range_ratio must be in [0, 1), got {self.range_ratio}")

    def draw(self, vocab_size: int) -> tuple[list[list[int]], list[SamplingParams]]:
        """Token ids of the prompts, and greedy parameters with the outputs' lengths."""
        rng = random.Random(self.seed)

        def length(mean: int) -> int:
            low, high = round(mean * (1 - self.range_ratio)), round(mean * (1 + self.range_ratio))
            return max(1, rng.randint(low, high))

        prompts = [[rng.randrange(vocab_size) for _ in range(length(self.input_len))] for _ in range(self.num_prompts)]
        lengths = [length(self.output_len) for _ in prompts]
        return prompts, [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]


@dataclass(frozen=True)
class Throughput:
    """A run's totals."""

    elapsed_s: float
    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int

    def lines(self) -> list[str]:
        """As ``vllm bench throughput`` words them; scripts look for these."""
        num_tokens = self.num_prompt_tokens + self.num_output_tokens
        return [
            f"Throughput: {self.num_requests / self.elapsed_s:.2f} requests/s, "
            f"{num_tokens / self.elapsed_s:.2f} total tokens/s, "
            f"{self.num_output_tokens / self.elapsed_s:.2f} output tokens/s",
            f"Total num prompt tokens:  {self.num_prompt_tokens}",
            f"Total num output tokens:  {self.num_output_tokens}",
        ]

    def record(self) -> dict[str, float]:
        """With the keys of ``vllm bench throughput --output-json``."""
        num_tokens = self.num_prompt_tokens + self.num_output_tokens
        return {
            "elapsed_time": self.elapsed_s,
            "num_requests": self.num_requests,
            "total_num_tokens": num_tokens,
            "requests_per_second": self.num_requests / self.elapsed_s,
            "tokens_per_second": num_tokens / self.elapsed_s,
            "output_tokens_per_second": self.num_output_tokens / self.elapsed_s,
        }


def measure_throughput(llm: LLM, workload: Workload, *, use_tqdm: bool = True) -> Throughput:
    """All prompts of the workload through ``llm``, after one short request that warms it up.

    Raises:
        ValueError: the lengths do not fit the context.
    """
    longest = round((workload.input_len + workload.output_len) * (1 + workload.range_ratio))
    if longest > llm.engine.scheduler_config.max_model_len:
        raise ValueError(
            f"input_len + output_len must be <= {llm.engine.scheduler_config.max_model_len}, the context, got {longest}"
        )
    prompts, sampling = workload.draw(llm.engine.model_config.vocab_size)
    llm.generate([prompts[0][:8]], SamplingParams(temperature=0, max_tokens=2), use_tqdm=False)
    begin_s = time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=use_tqdm)
    elapsed_s = time.perf_counter() - begin_s
    return Throughput(
        elapsed_s,
        len(outputs),
        sum(len(output.prompt_token_ids) for output in outputs),
        sum(len(output.outputs[0].token_ids) for output in outputs),
    )
