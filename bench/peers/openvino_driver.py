"""OpenVINO GenAI's continuous batching, in the environment ``openvino``.

Prefix caching is off, and "split fuse", its chunked prefill, on. The GGUF reader of OpenVINO is not used: it rounds the
minima of Q4_1 blocks.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import openvino
import openvino_genai as genai
from workloads import main


class OpenVinoEngine:
    """``Engine`` of workloads.py."""

    def __init__(self, args: argparse.Namespace) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.max_num_batched_tokens = args.budget
        scheduler.max_num_seqs = 64
        scheduler.cache_size = 2
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = False
        properties = {"INFERENCE_NUM_THREADS": args.threads, "INFERENCE_PRECISION_HINT": "f32"}
        if args.kv:
            properties["KV_CACHE_PRECISION"] = args.kv
        self._pipeline = genai.ContinuousBatchingPipeline(args.model, scheduler, "CPU", properties)
        self._handles: dict[str, object] = {}

    def submit(self, request_id: str, prompt: Sequence[int], num_tokens: int) -> None:
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = num_tokens
        config.ignore_eos = True
        config.do_sample = False
        config.apply_chat_template = False
        ids = openvino.Tensor(np.array([prompt], dtype=np.int64))
        self._handles[request_id] = self._pipeline.add_request(len(self._handles), ids, config)

    def step(self) -> list[str]:
        self._pipeline.step()
        given = []
        for request_id, handle in self._handles.items():
            while handle.can_read():
                for output in handle.read().values():
                    given.extend([request_id] * len(output.generated_ids))
        return given

    def is_busy(self) -> bool:
        if self._pipeline.has_non_finished_requests():
            return True
        self._handles.clear()
        return False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True)
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kv", help="precision of the KV cache")


if __name__ == "__main__":
    main(OpenVinoEngine, add_arguments)
