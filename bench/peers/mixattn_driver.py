"""mixattn, in the project's own environment."""

from __future__ import annotations

import time

START_S = time.time()

import argparse  # noqa: E402 - the time that imports take is part of the start
import itertools  # noqa: E402

from bench.peers import drive, workloads  # noqa: E402
from mixattn import env  # noqa: E402

env.prepare_process()

import torch  # noqa: E402

from bench.lib.quality import text_logits  # noqa: E402
from mixattn.config import (  # noqa: E402
    ACTIVATION_DTYPES,
    KV_CACHE_DTYPES,
    QUANTIZATIONS,
    CacheConfig,
    EngineConfig,
    SchedulerConfig,
)
from mixattn.engine.build import build_engine  # noqa: E402
from mixattn.models.loader import LoadedModel, load_model  # noqa: E402
from mixattn.types import Request, SamplingParams  # noqa: E402


class Engine:
    """``WallDriver`` as ``drive.Engine``."""

    def __init__(self, config: EngineConfig, loaded: LoadedModel) -> None:
        self._driver = build_engine(config, loaded).driver
        self._ids = itertools.count()
        self._unfinished: set[str] = set()

    def add(self, prompt: list[int], num_output: int) -> int:
        idx = next(self._ids)
        sampling = SamplingParams(temperature=0, max_tokens=num_output, ignore_eos=True)
        self._driver.add_request(Request(str(idx), prompt, sampling, time.monotonic()))
        self._unfinished.add(str(idx))
        return idx

    def step(self) -> dict[int, list[int]]:
        tokens: dict[int, list[int]] = {}
        for event in self._driver.step():
            if event.error is not None or event.token_id is None:
                raise RuntimeError(f"request {event.request_id} ended without its tokens: {event.error}")
            tokens.setdefault(int(event.request_id), []).append(event.token_id)
            if event.finish_reason is not None:
                self._unfinished.remove(event.request_id)
        return tokens

    def has_work(self) -> bool:
        return bool(self._unfinished)


def make_peer(args: argparse.Namespace) -> drive.Peer:
    config = EngineConfig(
        "smollm2",
        quantization=args.quantization,
        activation_dtype=args.activation_dtype,
        max_model_len=2304,
        cache=CacheConfig(kv_cache_dtype=args.kv_cache_dtype),
        scheduler=SchedulerConfig(
            max_num_batched_tokens=args.budget,
            max_num_seqs=min(64, args.budget),
            policy=SchedulerConfig.policy_for(True, None, args.max_slowdown),
            max_slowdown=args.max_slowdown,
        ),
    )
    loaded = load_model(config, show_progress=False)
    engine = Engine(config, loaded)

    def log_likelihood(token_ids: list[int]) -> float:
        log_probs = text_logits(loaded, token_ids)[:-1].double().log_softmax(-1)
        return float(log_probs.gather(1, torch.tensor(token_ids[1:])[:, None]).sum())

    about = {"torch": torch.__version__, "threads": env.num_threads(), "budget": args.budget}
    return drive.Peer(lambda kind: engine, log_likelihood, about)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quantization", choices=QUANTIZATIONS, default="auto")
    parser.add_argument("--activation-dtype", choices=ACTIVATION_DTYPES, default="float32")
    parser.add_argument("--kv-cache-dtype", choices=KV_CACHE_DTYPES, default="auto")
    parser.add_argument("--budget", type=int, default=workloads.STALL_BUDGET)
    parser.add_argument("--max-slowdown", type=float)
    drive.main(make_peer, START_S, parser)
