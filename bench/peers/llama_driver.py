"""llama.cpp built for this CPU, in the environment ``llama``.

Its library decodes batches; which requests are in one is its server's affair. Here whole prompts go first, one a step,
then all streams take a step together: enough for prefill and decode, not for a fair word on serving. The sampled token
is the largest logit, found by numpy.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Sequence

import llama_cpp
import numpy as np
from workloads import main

_MAX_STREAMS, _CONTEXT, _BATCH = 32, 4096, 2048


class LlamaEngine:
    """``Engine`` of workloads.py."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = 0
        model = llama_cpp.llama_model_load_from_file(args.model.encode(), model_params)
        assert model, f"{args.model} cannot be loaded"
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = args.streams
        params.n_ctx = args.streams * (_CONTEXT if args.streams == 1 else 384)
        params.n_batch, params.n_ubatch = _BATCH, 512
        params.n_threads = params.n_threads_batch = args.threads
        params.flash_attn_type = args.flash_attention
        params.no_perf = True
        self._context = llama_cpp.llama_init_from_model(model, params)
        assert self._context, "no context"
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(_BATCH, 0, 1)
        self._waiting: list[tuple[str, Sequence[int], int]] = []
        self._streams: dict[int, list[object]] = {}  # by sequence id: request id, last token, position, tokens to go

    def submit(self, request_id: str, prompt: Sequence[int], num_tokens: int) -> None:
        self._waiting.append((request_id, prompt, num_tokens))

    def step(self) -> list[str]:
        if self._waiting:
            return [self._prefill(*self._waiting.pop(0))]
        rows = [(stream[1], stream[2], seq) for seq, stream in self._streams.items()]
        best = self._decode(rows, wants_all=True)
        given = []
        for (seq, stream), token in zip(list(self._streams.items()), best, strict=True):
            given.append(str(stream[0]))
            self._advance(seq, stream, int(token))
        return given

    def is_busy(self) -> bool:
        return bool(self._waiting or self._streams)

    def _prefill(self, request_id: str, prompt: Sequence[int], num_tokens: int) -> str:
        seq = next(seq for seq in range(_MAX_STREAMS) if seq not in self._streams)
        best = np.zeros(1)
        for begin in range(0, len(prompt), _BATCH):
            part = prompt[begin : begin + _BATCH]
            best = self._decode([(token, begin + idx, seq) for idx, token in enumerate(part)], wants_all=False)
        self._streams[seq] = [request_id, 0, len(prompt) - 1, num_tokens]
        self._advance(seq, self._streams[seq], int(best[-1]))
        return request_id

    def _advance(self, seq: int, stream: list[object], token: int) -> None:
        stream[1], stream[2], stream[3] = token, int(stream[2]) + 1, int(stream[3]) - 1  # type: ignore[call-overload]
        if stream[3] == 0:
            del self._streams[seq]
            llama_cpp.llama_memory_seq_rm(self._memory, seq, -1, -1)

    def _decode(self, rows: Sequence[tuple[object, object, int]], *, wants_all: bool) -> np.ndarray:
        """The token with the largest logit, of all rows or of the last one."""
        self._batch.n_tokens = len(rows)
        for idx, (token, position, seq) in enumerate(rows):
            self._batch.token[idx], self._batch.pos[idx] = token, position
            self._batch.n_seq_id[idx], self._batch.seq_id[idx][0] = 1, seq
            self._batch.logits[idx] = wants_all or idx == len(rows) - 1
        code = llama_cpp.llama_decode(self._context, self._batch)
        assert code == 0, code
        num_rows = len(rows) if wants_all else 1
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(self._context), shape=(num_rows, self._vocab_size))
        return logits.argmax(-1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--streams", type=int, default=_MAX_STREAMS, help="sequences that the context has room for")
    parser.add_argument(
        "--flash-attention", type=int, default=0, help="1 is its better setting for prompts, 0 for decodes"
    )


if __name__ == "__main__":
    main(LlamaEngine, add_arguments)
