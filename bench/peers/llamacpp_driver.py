"""llama.cpp through llama-cpp-python's low-level batches, in the environment ``llamacpp``.

Sequences are batched as llama.cpp's own llama-batched-bench does: prompts first, then all sequences a token per step.
The next token is the argmax of the logits, within the time, as for the other engines. Requests that arrive meanwhile
are scheduled by llama.cpp's server, which is not measured: no offline and stall rows.
"""

from __future__ import annotations

import time

START_S = time.time()

import argparse  # noqa: E402 - the time that imports take is part of the start
import ctypes  # noqa: E402
import itertools  # noqa: E402
import sys  # noqa: E402

import llama_cpp as llama  # noqa: E402
import numpy as np  # noqa: E402

from bench.peers import drive, workloads  # noqa: E402

_BATCH_ROWS = 2048
"""llama.cpp's default; it computes 512 of them at a time."""
_KV_TYPES = {"f32": 0, "f16": 1}


@llama.llama_log_callback
def _keep_quiet(level: int, text: bytes, user_data: object) -> None:
    if level >= 4:
        sys.stderr.write(text.decode(errors="replace"))


class Engine:
    """A context of llama.cpp as ``drive.Engine``: whole prompts, each in a step of its own, before decodes."""

    def __init__(self, model: object, num_seqs: int, tokens_each: int, has_flash: bool, kv_type: int) -> None:
        params = llama.llama_context_default_params()
        params.n_ctx = num_seqs * tokens_each
        params.n_seq_max = num_seqs
        params.n_batch = _BATCH_ROWS
        params.n_threads = params.n_threads_batch = workloads.NUM_THREADS
        params.type_k = params.type_v = kv_type
        params.flash_attn_type = int(has_flash)
        params.kv_unified = False
        params.no_perf = True
        self._context = llama.llama_init_from_model(model, params)
        if not self._context:
            raise RuntimeError("llama.cpp made no context")
        self._vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        self._batch = llama.llama_batch_init(_BATCH_ROWS, 0, 1)
        self._ids = itertools.count()
        self._free = list(range(num_seqs))
        self._waiting: list[tuple[int, list[int], int]] = []
        self._running: dict[int, tuple[int, int, int, int]] = {}
        """By request: sequence, last token, its position, tokens that are still to come."""

    def close(self) -> None:
        llama.llama_batch_free(self._batch)
        llama.llama_free(self._context)

    def add(self, prompt: list[int], num_output: int) -> int:
        request_id = next(self._ids)
        self._waiting.append((request_id, prompt, num_output))
        return request_id

    def step(self) -> dict[int, list[int]]:
        if self._waiting and self._free:
            request_id, prompt, num_output = self._waiting.pop(0)
            sequence = self._free.pop(0)
            token = int(self.read(prompt, sequence, is_all=False)[-1].argmax())
            return {request_id: [self._advance(request_id, (sequence, token, len(prompt), num_output - 1))]}
        running = list(self._running.items())
        logits = self._decode([(token, position, sequence, True) for _, (sequence, token, position, _) in running])
        tokens = logits.argmax(1).tolist()
        return {
            request_id: [self._advance(request_id, (sequence, token, position + 1, num_left - 1))]
            for (request_id, (sequence, _, position, num_left)), token in zip(running, tokens, strict=True)
        }

    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def read(self, prompt: list[int], sequence: int, is_all: bool) -> np.ndarray:
        """Logits of the prompt's last token, or of all of its tokens."""
        logits = []
        for start in range(0, len(prompt), _BATCH_ROWS):
            rows = [
                (token, position, sequence, is_all or position == len(prompt) - 1)
                for position, token in enumerate(prompt[start : start + _BATCH_ROWS], start)
            ]
            logits.append(self._decode(rows))
        return np.concatenate(logits)

    def forget(self, sequence: int) -> None:
        llama.llama_memory_seq_rm(llama.llama_get_memory(self._context), sequence, -1, -1)

    def _advance(self, request_id: int, state: tuple[int, int, int, int]) -> int:
        sequence, token, _, num_left = state
        if num_left:
            self._running[request_id] = state
        else:
            self._running.pop(request_id, None)
            self.forget(sequence)
            self._free.append(sequence)
        return token

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> np.ndarray:
        """Runs rows of (token, position, sequence, whether logits are wanted); [wanted, vocab_size] logits."""
        self._batch.n_tokens = len(rows)
        num_wanted = 0
        for idx, (token, position, sequence, is_wanted) in enumerate(rows):
            self._batch.token[idx] = token
            self._batch.pos[idx] = position
            self._batch.n_seq_id[idx] = 1
            self._batch.seq_id[idx][0] = sequence
            self._batch.logits[idx] = is_wanted
            num_wanted += is_wanted
        status = llama.llama_decode(self._context, self._batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        if not num_wanted:
            return np.empty((0, self._vocab_size), np.float32)
        pointer = llama.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, shape=(num_wanted, self._vocab_size))


def make_peer(args: argparse.Namespace) -> drive.Peer:
    llama.llama_log_set(_keep_quiet, ctypes.c_void_p(0))
    llama.llama_backend_init()
    params = llama.llama_model_default_params()
    params.n_gpu_layers = 0
    path = workloads.PEERS / f"{args.weights}.gguf"
    model = llama.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise RuntimeError(f"llama.cpp could not load {path}")
    open_engines: list[Engine] = []

    def engine(kind: str) -> Engine:
        """A context of the size that the row needs; flash attention where it is the faster on CPUs: in prefill."""
        while open_engines:
            open_engines.pop().close()
        num_seqs = int(kind.split("-")[1]) if kind.startswith("decode-") else 1
        tokens_each = 256 if kind.startswith("decode-") else 2304
        is_prefill = not kind.startswith("decode-")
        open_engines.append(Engine(model, num_seqs, tokens_each, is_prefill, _KV_TYPES[args.kv]))
        return open_engines[0]

    def log_likelihood(token_ids: list[int]) -> float:
        reader = engine("quality")
        logits = reader.read(token_ids, 0, is_all=True)[:-1].astype(np.float64)
        top = logits.max(1)
        log_sums = top + np.log(np.exp(logits - top[:, None]).sum(1))
        return float((logits[np.arange(len(logits)), token_ids[1:]] - log_sums).sum())

    system = llama.llama_print_system_info().decode().strip()
    about = {"llama-cpp-python": llama.__version__, "system": system, "kv": args.kv}
    return drive.Peer(engine, log_likelihood, about)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", choices=["f32", "q8_0", "q4_0", "q4_1"], required=True)
    parser.add_argument("--kv", choices=list(_KV_TYPES), default="f16", help="what K and V are stored as")
    drive.main(make_peer, START_S, parser)
