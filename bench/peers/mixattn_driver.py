"""mixattn's engine, in the environment of this repository."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from workloads import main

from mixattn import env

env.prepare_process()

from mixattn.config import CacheConfig, EngineConfig, SchedulerConfig  # noqa: E402
from mixattn.engine.build import build_engine  # noqa: E402
from mixattn.models.loader import load_model  # noqa: E402
from mixattn.types import Request, SamplingParams  # noqa: E402


class MixattnEngine:
    """``Engine`` of workloads.py."""

    def __init__(self, args: argparse.Namespace) -> None:
        config = EngineConfig(
            args.model,
            max_model_len=4096,
            quantization=args.quantization,
            activation_dtype=args.activation_dtype,
            cache=CacheConfig(kv_cache_memory_bytes=2 << 30, kv_cache_dtype=args.kv_cache_dtype),
            scheduler=SchedulerConfig(max_num_batched_tokens=args.budget, max_num_seqs=min(64, args.budget)),
        )
        self._driver = build_engine(config, load_model(config, show_progress=False)).driver
        self._num_unfinished = 0

    def submit(self, request_id: str, prompt: Sequence[int], num_tokens: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        self._driver.add_request(Request(request_id, prompt, params))
        self._num_unfinished += 1

    def step(self) -> list[str]:
        events = self._driver.step()
        self._num_unfinished -= sum(event.finish_reason is not None for event in events)
        return [event.request_id for event in events if event.token_id is not None]

    def is_busy(self) -> bool:
        return self._num_unfinished > 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--quantization", default="auto")
    parser.add_argument("--activation-dtype", default="float32")
    parser.add_argument("--kv-cache-dtype", default="auto")


if __name__ == "__main__":
    main(MixattnEngine, add_arguments)
