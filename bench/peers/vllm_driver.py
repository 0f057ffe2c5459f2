"""vLLM's CPU build in process, float32, in the environment ``vllm`` with its preloads (``__main__`` sets them)."""

from __future__ import annotations

import time

START_S = time.time()

import os  # noqa: E402 - the time that imports take is part of the start

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "2"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0-1"
os.environ["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"
os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"
os.environ["VLLM_NO_USAGE_STATS"] = "1"

import argparse  # noqa: E402
import itertools  # noqa: E402

import torch  # noqa: E402
import vllm  # noqa: E402
from vllm.inputs import TokensPrompt  # noqa: E402

from bench.peers import drive, workloads  # noqa: E402


def sampling(num_output: int) -> vllm.SamplingParams:
    return vllm.SamplingParams(
        temperature=0.0, max_tokens=num_output, min_tokens=num_output, ignore_eos=True, detokenize=False
    )


class Engine:
    """vLLM's engine as ``drive.Engine``."""

    def __init__(self, llm: vllm.LLM) -> None:
        self._engine = llm.llm_engine
        self._ids = itertools.count()
        self._num_seen: dict[int, int] = {}

    def add(self, prompt: list[int], num_output: int) -> int:
        request_id = next(self._ids)
        self._engine.add_request(str(request_id), TokensPrompt(prompt_token_ids=prompt), sampling(num_output))
        self._num_seen[request_id] = 0
        return request_id

    def step(self) -> dict[int, list[int]]:
        tokens = {}
        for output in self._engine.step():
            # vLLM appends a suffix of its own to the id.
            request_id = int(output.request_id.split("-")[0])
            token_ids = list(output.outputs[0].token_ids)
            tokens[request_id] = token_ids[self._num_seen[request_id] :]
            self._num_seen[request_id] = len(token_ids)
        return tokens

    def has_work(self) -> bool:
        return self._engine.has_unfinished_requests()


def make_peer(args: argparse.Namespace) -> drive.Peer:
    llm = vllm.LLM(
        model=str(workloads.PEERS / "smollm2-f32"),
        dtype="float32",
        max_model_len=2304,
        max_num_batched_tokens=args.budget,
        max_num_seqs=64,
        enable_prefix_caching=False,
        enable_chunked_prefill=True,
        enforce_eager=not args.compiled,
        disable_log_stats=True,
    )
    engine = Engine(llm)

    def log_likelihood(token_ids: list[int]) -> float:
        params = vllm.SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        output = llm.generate([TokensPrompt(prompt_token_ids=token_ids)], params, use_tqdm=False)[0]
        pairs = zip(output.prompt_logprobs[1:], token_ids[1:], strict=True)
        return float(sum(log_probs[token_id].logprob for log_probs, token_id in pairs))

    about = {"vllm": vllm.__version__, "torch": torch.__version__, "threads": torch.get_num_threads()}
    return drive.Peer(lambda kind: engine, log_likelihood, about | {"budget": args.budget, "compiled": args.compiled})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compiled", action="store_true", help="torch.compile: minutes at every start")
    parser.add_argument("--budget", type=int, default=workloads.STALL_BUDGET)
    drive.main(make_peer, START_S, parser)
