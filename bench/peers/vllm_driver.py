"""vLLM's CPU build, in the environment ``vllm``, its engine stepped in this process."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from workloads import main

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_CPU_KVCACHE_SPACE="2",
    VLLM_CPU_NUM_OF_RESERVED_CPU="0",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
)

from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt


class VllmEngine:
    """``Engine`` of workloads.py."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._engine = LLM(
            model=args.model,
            dtype="float32",
            max_model_len=4096,
            max_num_batched_tokens=args.budget,
            max_num_seqs=64,
            enable_prefix_caching=False,
            enforce_eager=not args.compile,
        ).llm_engine
        self._given: dict[str, int] = {}

    def submit(self, request_id: str, prompt: Sequence[int], num_tokens: int) -> None:
        params = SamplingParams(
            temperature=0.0, max_tokens=num_tokens, min_tokens=num_tokens, ignore_eos=True, detokenize=False
        )
        self._given[request_id] = 0
        self._engine.add_request(request_id, TokensPrompt(prompt_token_ids=list(prompt)), params)

    def step(self) -> list[str]:
        given = []
        for output in self._engine.step():
            # The engine adds a suffix of its own to the ids of requests.
            request_id = next(
                name for name in (output.request_id, output.request_id.rpartition("-")[0]) if name in self._given
            )
            num_tokens = len(output.outputs[0].token_ids)
            given.extend([request_id] * (num_tokens - self._given[request_id]))
            self._given[request_id] = num_tokens
        return given

    def is_busy(self) -> bool:
        return bool(self._engine.has_unfinished_requests())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--compile", action="store_true", help="torch.compile, some 100 s at each start")


if __name__ == "__main__":
    main(VllmEngine, add_arguments)
