"""OpenVINO GenAI's ContinuousBatchingPipeline, stepped in process, in the environment ``openvino``."""

from __future__ import annotations

import time

START_S = time.time()

import argparse  # noqa: E402 - the time that imports take is part of the start
import itertools  # noqa: E402

import numpy as np  # noqa: E402
import openvino  # noqa: E402
import openvino_genai as genai  # noqa: E402

from bench.peers import drive, workloads  # noqa: E402


def generation(num_output: int) -> genai.GenerationConfig:
    config = genai.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = num_output
    config.ignore_eos = True
    config.do_sample = False
    config.apply_chat_template = False
    return config


class Engine:
    """The pipeline as ``drive.Engine``."""

    def __init__(self, pipeline: genai.ContinuousBatchingPipeline) -> None:
        self.pipeline = pipeline
        self._ids = itertools.count(1)
        self._handles: dict[int, genai.GenerationHandle] = {}

    def add(self, prompt: list[int], num_output: int) -> int:
        return self.add_with(prompt, generation(num_output))

    def add_with(self, prompt: list[int], config: genai.GenerationConfig) -> int:
        request_id = next(self._ids)
        tokens = openvino.Tensor(np.array([prompt], dtype=np.int64))
        self._handles[request_id] = self.pipeline.add_request(request_id, tokens, config)
        return request_id

    def step(self) -> dict[int, list[int]]:
        return {request_id: [t for o in outs for t in o.generated_ids] for request_id, outs in self.read().items()}

    def read(self) -> dict[int, list[genai.GenerationOutput]]:
        """Runs a step; what each request put out."""
        self.pipeline.step()
        read = {}
        for request_id, handle in list(self._handles.items()):
            outs = []
            while handle.can_read():
                outs += handle.read().values()
            if outs:
                read[request_id] = outs
            if handle.get_status() != genai.GenerationStatus.RUNNING:
                del self._handles[request_id]
        return read

    def has_work(self) -> bool:
        return self.pipeline.has_non_finished_requests()


def make_peer(args: argparse.Namespace) -> drive.Peer:
    scheduler = genai.SchedulerConfig()
    scheduler.max_num_batched_tokens = args.budget
    scheduler.dynamic_split_fuse = True
    scheduler.max_num_seqs = 64
    scheduler.cache_size = 2
    scheduler.enable_prefix_caching = False
    properties = {
        "INFERENCE_NUM_THREADS": workloads.NUM_THREADS,
        "INFERENCE_PRECISION_HINT": "f32",
        "KV_CACHE_PRECISION": args.kv,
    }
    folder = workloads.PEERS / f"openvino-{args.weights}"
    engine = Engine(genai.ContinuousBatchingPipeline(str(folder), scheduler, "CPU", properties))

    def log_likelihood(token_ids: list[int]) -> float:
        config = generation(1)
        config.echo = True  # the prompt's tokens come out too, with their log probabilities
        config.logprobs = 1
        request_id = engine.add_with(token_ids, config)
        log_probs: list[float] = []
        while engine.has_work():
            log_probs += [p for out in engine.read().get(request_id, []) for p in out.generated_log_probs]
        if len(log_probs) != len(token_ids) + 1:
            raise RuntimeError(f"{len(log_probs)} log probabilities for {len(token_ids)} tokens and one more")
        return float(sum(log_probs[1:-1]))

    about = {"openvino": openvino.__version__, "genai": genai.__version__, "properties": properties}
    return drive.Peer(lambda kind: engine, log_likelihood, about | {"budget": args.budget})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", choices=["f32", "int8"], required=True)
    parser.add_argument("--kv", default="f32", help="what K and V are stored as")
    parser.add_argument("--budget", type=int, default=workloads.STALL_BUDGET)
    drive.main(make_peer, START_S, parser)
