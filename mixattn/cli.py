"""``mixattn-engine``: chat, generate, serve, bench, warmup, info and demo on the command line.

Nothing heavy is imported before the arguments are known to be good, so ``--help`` and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixattn import __version__, env
from mixattn.config import (
    ACTIVATION_DTYPES,
    KV_CACHE_DTYPES,
    QUANTIZATIONS,
    CacheConfig,
    EngineConfig,
    SchedulerConfig,
    ServerConfig,
)
from mixattn.types import SamplingParams

with contextlib.suppress(ImportError):  # not every Python has it; with it, input() has line editing and a history
    import readline  # noqa: F401

if TYPE_CHECKING:
    from mixattn.engine.llm import LLM, Prompt

logger = logging.getLogger(__name__)

_USER_ERRORS = (ValueError, NotImplementedError, OSError)
"""What wrong arguments and missing files raise; anything else is ours and keeps its traceback."""
_EXIT_USER_ERROR = 2
_EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the process's exit status: 0, 2 for the user's mistakes, 130 after Ctrl-C."""
    env.prepare_process()
    parser = build_parser()
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=arguments.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        return command(arguments)
    except KeyboardInterrupt:
        return _EXIT_INTERRUPTED
    except BrokenPipeError:  # whoever read our output has gone, as in `... | head`
        sys.stderr.close()
        return 0
    except _USER_ERRORS as error:
        logger.debug("raised here", exc_info=True)
        print(f"mixattn-engine: error: {error}", file=sys.stderr)
        return _EXIT_USER_ERROR


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; names of flags are vLLM's where it has them."""
    parser = argparse.ArgumentParser(prog="mixattn-engine", description="A stall-free engine on mixattn's kernels.")
    parser.add_argument("--version", action="version", version=f"mixattn {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], help_: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help_, description=help_)
        sub.set_defaults(command=run)
        default_level = "info" if name == "serve" else "warning"
        sub.add_argument("--log-level", choices=["debug", "info", "warning", "error"], default=default_level)
        return sub

    chat = add("chat", _chat, "Talk to a model; with --message, one answer.")
    chat.add_argument("--message", help="ask this and exit, instead of a conversation")
    chat.add_argument("--system", help="system message")
    _add_engine_flags(chat)
    _add_sampling_flags(chat, max_tokens=512)

    generate = add("generate", _generate, "Continue prompts.")
    generate.add_argument(
        "--prompt", action="append", required=True, help="text to continue; may be given several times"
    )
    _add_engine_flags(generate)
    _add_sampling_flags(generate, max_tokens=128)

    serve = add("serve", _serve, "Serve OpenAI's API over HTTP.")
    _add_server_flags(serve)
    _add_engine_flags(serve)

    bench = add("bench", _bench, "Measure offline throughput on random prompts.")
    bench.add_argument("--num-prompts", type=int, default=32, help="prompts, all at once (%(default)s)")
    bench.add_argument("--input-len", type=int, default=128, help="tokens of a prompt (%(default)s)")
    bench.add_argument("--output-len", type=int, default=64, help="tokens of an output (%(default)s)")
    bench.add_argument("--random-range-ratio", type=float, default=0.0, help="lengths vary by this share (%(default)s)")
    bench.add_argument("--output-json", type=Path, metavar="FILE", help="write the result there, too")
    _add_engine_flags(bench)

    warmup = add("warmup", _warmup, "Compile ahead what serving a model on a GPU launches.")
    warmup.add_argument(
        "--target",
        type=_capability,
        metavar="sm_90",
        help="compile for this architecture, whose GPU need not be here, into Triton's cache",
    )
    _add_engine_flags(warmup)

    info = add("info", _info, "Show the CPU, the GPU and what can run on them.")
    info.add_argument("--kernels", action="store_true", help="show the compiled CUDA kernels instead")

    demo = add("demo", _demo, "Measure what a long prompt does to running streams, in chunks and not.")
    demo.add_argument("--num-streams", type=int, default=8, help="streams that decode (%(default)s)")
    demo.add_argument("--prompt-len", type=int, default=1500, help="tokens of the long prompt (%(default)s)")
    _add_engine_flags(demo)
    return parser


def _add_server_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument("--host", default=ServerConfig.host, help="address to listen on (%(default)s)")
    group.add_argument("--port", type=int, default=ServerConfig.port, help="port to listen on (%(default)s)")
    group.add_argument(
        "--served-model-name", nargs="+", default=[], metavar="NAME", help="what clients may call the model"
    )
    group.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="ask for a key; may be given several times (MIXATTN_API_KEY)",
    )
    group.add_argument("--api-key-file", type=Path, metavar="FILE", help="keys to let in, one a line")
    group.add_argument(
        "--max-request-bytes",
        type=_size,
        metavar="N",
        default=ServerConfig.max_request_bytes,
        help="longest body of a request (%(default)s)",
    )
    group.add_argument(
        "--shutdown-timeout",
        type=float,
        metavar="S",
        default=ServerConfig.shutdown_timeout_s,
        help="seconds that running requests get when the server is told to stop (%(default)s)",
    )
    group.add_argument(
        "--metrics-compat",
        choices=["vllm", "none"],
        default="vllm",
        help="whose names metrics have besides our own (%(default)s)",
    )


def _add_engine_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    group.add_argument("model", help="a folder, a GGUF file, a Hugging Face name, or smollm2")
    group.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    group.add_argument(
        "--quantization",
        default="auto",
        choices=QUANTIZATIONS,
        help="auto holds matrices as the checkpoint does, none in float32, int8 and int4 round them (CPU, float32)",
    )
    group.add_argument(
        "--activation-dtype",
        default="float32",
        choices=ACTIVATION_DTYPES,
        help="int8 rounds what quantised matrices are multiplied with: faster, not exact (CPU, float32)",
    )
    group.add_argument("--seed", type=int, default=0, help="of requests that name none (%(default)s)")
    group.add_argument("--max-model-len", type=_size, metavar="N", help="longest context (the model's own)")
    group.add_argument(
        "--max-num-batched-tokens",
        type=_size,
        metavar="N",
        default=SchedulerConfig.max_num_batched_tokens,
        help="token budget of a step (%(default)s)",
    )
    group.add_argument("--max-num-seqs", type=int, metavar="N", help="requests that run at once (64)")
    group.add_argument(
        "--max-num-queued-reqs",
        type=int,
        metavar="N",
        default=SchedulerConfig.max_num_queued_reqs,
        help="requests that may wait (%(default)s)",
    )
    group.add_argument(
        "--enable-chunked-prefill",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="prompts in chunks beside the decodes; without, in steps of their own while decodes wait",
    )
    group.add_argument(
        "--tbt-slo-ms",
        type=float,
        metavar="MS",
        help="cut chunks so that running requests wait no longer than this for their next tokens (any time)",
    )
    group.add_argument(
        "--max-slowdown",
        type=float,
        metavar="X",
        help="cut chunks so that a step takes no longer than X times what its decodes would take alone",
    )
    group.add_argument(
        "--block-size",
        "--page-size",
        type=int,
        metavar="N",
        default=CacheConfig.page_size,
        help="tokens per page of KV (%(default)s)",
    )
    group.add_argument("--num-gpu-blocks-override", "--num-pages", type=_size, metavar="N", help="pages of KV")
    group.add_argument(
        "--kv-cache-memory-bytes",
        type=_size,
        metavar="N",
        help="memory for KV, as 512M or 2G (a share of what is free)",
    )
    group.add_argument(
        "--kv-cache-dtype",
        choices=KV_CACHE_DTYPES,
        default=CacheConfig.kv_cache_dtype,
        help="what K and V are stored as (%(default)s: as the model)",
    )
    group.add_argument("--attention-backend", metavar="NAME", help="cpu, triton or reference (the fastest here)")
    group.add_argument("--load-format", default="auto", choices=["auto", "safetensors", "gguf", "dummy"])
    group.add_argument("--chat-template", metavar="JINJA", help="Jinja text or file in place of the model's own")


def _add_sampling_flags(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=_size, default=max_tokens, help="tokens of an answer (%(default)s)")
    group.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (%(default)s)")
    group.add_argument("--top-p", type=float, default=1.0)
    group.add_argument("--top-k", type=int, default=0)
    group.add_argument("--min-p", type=float, default=0.0)
    group.add_argument("--repetition-penalty", type=float, default=1.0)
    group.add_argument("--stop", action="append", default=[], help="end at this text; may be given several times")
    group.add_argument("--ignore-eos", action="store_true", help="go on past the model's end of sequence")


def _size(text: str) -> int:
    """Integers as people write them: 4k is 4,000 and 4K is 4,096, as with vLLM; m, M, g, G likewise."""
    factors = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}
    number, factor = (text[:-1], factors[text[-1]]) if text[-1:] in factors else (text, 1)
    try:
        value = float(number) * factor if factor > 1 else int(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number, nor one such as 4k (4,000) or 2G (2^31)") from None
    return int(value)


def _capability(text: str) -> tuple[int, int]:
    """The compute capability of an architecture's name: (9, 0) of sm_90."""
    number = text.removeprefix("sm_")
    if not text.startswith("sm_") or not number.isdecimal() or len(number) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is no architecture such as sm_80, sm_90 or sm_100")
    return int(number[:-1]), int(number[-1])


def _engine_config(arguments: argparse.Namespace) -> EngineConfig:
    budget, max_num_seqs = arguments.max_num_batched_tokens, arguments.max_num_seqs
    if max_num_seqs is None:
        max_num_seqs = min(SchedulerConfig.max_num_seqs, budget)
    return EngineConfig(
        model=arguments.model,
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        activation_dtype=arguments.activation_dtype,
        seed=arguments.seed,
        max_model_len=arguments.max_model_len,
        cache=CacheConfig(
            arguments.block_size,
            arguments.num_gpu_blocks_override,
            arguments.kv_cache_memory_bytes,
            arguments.kv_cache_dtype,
        ),
        scheduler=SchedulerConfig(
            max_num_batched_tokens=budget,
            max_num_seqs=max_num_seqs,
            max_num_queued_reqs=arguments.max_num_queued_reqs,
            policy=SchedulerConfig.policy_for(
                arguments.enable_chunked_prefill, arguments.tbt_slo_ms, arguments.max_slowdown
            ),
            tbt_slo_ms=arguments.tbt_slo_ms,
            max_slowdown=arguments.max_slowdown,
        ),
        attention_backend=arguments.attention_backend,
        load_format=arguments.load_format,
        chat_template=arguments.chat_template,
    )


def _sampling(arguments: argparse.Namespace) -> SamplingParams:
    return SamplingParams(
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        max_tokens=arguments.max_tokens,
        stop=arguments.stop,
        ignore_eos=arguments.ignore_eos,
    )


def _load(arguments: argparse.Namespace) -> LLM:
    """The engine, after all its arguments have been looked at."""
    config = _engine_config(arguments)
    from mixattn.engine.llm import LLM

    return LLM.from_config(config)


def _chat(arguments: argparse.Namespace) -> int:
    sampling = _sampling(arguments)
    messages: list[dict[str, Any]] = []
    if arguments.system is not None:
        messages.append({"role": "system", "content": arguments.system})
    with _load(arguments) as llm:
        if arguments.message is not None:
            messages.append({"role": "user", "content": arguments.message})
            _print_stream(llm, llm.render_chat(messages), sampling)
            return 0
        print("Ctrl-C stops an answer, Ctrl-D ends the conversation.", file=sys.stderr)
        while True:
            try:
                messages.append({"role": "user", "content": input("> ")})
            except EOFError:
                print()
                return 0
            answer = _print_stream(llm, llm.render_chat(messages), sampling, is_conversation=True)
            messages.append({"role": "assistant", "content": answer})


def _print_stream(llm: LLM, prompt: Prompt, sampling: SamplingParams, is_conversation: bool = False) -> str:
    """Prints a continuation as it comes, then its speed on stderr. Returns it; Ctrl-C cuts it in a conversation."""
    begin_s, text, num_tokens = time.monotonic(), "", 0
    first_s = end_s = begin_s
    stream = llm.stream(prompt, sampling)
    try:
        for output in stream:
            print(output.outputs[0].text[len(text) :], end="", flush=True)
            text, num_tokens, end_s = output.outputs[0].text, len(output.outputs[0].token_ids), time.monotonic()
            if num_tokens == 1:
                first_s = end_s
    except KeyboardInterrupt:
        if not is_conversation:
            raise
    finally:
        stream.close()
        print(flush=True)
    if num_tokens > 1:
        print(
            f"[{num_tokens} tokens, the first after {first_s - begin_s:.2f} s, "
            f"then {(num_tokens - 1) / (end_s - first_s):.1f} tokens/s]",
            file=sys.stderr,
        )
    return text


def _generate(arguments: argparse.Namespace) -> int:
    sampling = _sampling(arguments)
    with _load(arguments) as llm:
        if len(arguments.prompt) == 1:
            _print_stream(llm, arguments.prompt[0], sampling)
            return 0
        for output in llm.generate(arguments.prompt, sampling, use_tqdm=sys.stderr.isatty()):
            print(f"{output.prompt}{output.outputs[0].text}\n")
    return 0


def _serve(arguments: argparse.Namespace) -> int:
    config = _engine_config(arguments)
    keys = list(arguments.api_key)
    if arguments.api_key_file is not None:
        keys += arguments.api_key_file.read_text().split()
    server = ServerConfig(
        host=arguments.host,
        port=arguments.port,
        served_model_names=tuple(arguments.served_model_name),
        api_keys=tuple(keys or env.api_keys()),
        max_request_bytes=arguments.max_request_bytes,
        shutdown_timeout_s=arguments.shutdown_timeout,
        has_vllm_metrics=arguments.metrics_compat == "vllm",
    )
    from mixattn.server.serve import serve

    return serve(config, server)


def _bench(arguments: argparse.Namespace) -> int:
    config = _engine_config(arguments)
    from mixattn.engine.llm import LLM
    from mixattn.engine.throughput import Workload, measure_throughput

    workload = Workload(
        num_prompts=arguments.num_prompts,
        input_len=arguments.input_len,
        output_len=arguments.output_len,
        range_ratio=arguments.random_range_ratio,
        seed=arguments.seed,
    )
    with LLM.from_config(config) as llm:
        result = measure_throughput(llm, workload, use_tqdm=sys.stderr.isatty())
    print("\n".join(result.lines()))
    if arguments.output_json is not None:
        arguments.output_json.write_text(json.dumps(result.record(), indent=2) + "\n")
    return 0


def _warmup(arguments: argparse.Namespace) -> int:
    config = _engine_config(arguments)
    import torch

    from mixattn.engine.build import warm_up_engine
    from mixattn.models.loader import read_shape

    target = arguments.target
    has_gpu = torch.cuda.is_available()
    if target is None and not has_gpu:
        read_shape(config, torch.device("cpu"))  # a model that is not there is a mistake here, too
        print(
            "nothing to compile: torch sees no GPU, and the kernels for CPUs were compiled when mixattn was built; "
            "--target sm_90 compiles for a GPU that is elsewhere"
        )
        return 0
    gpu = torch.device("cuda", torch.cuda.current_device()) if has_gpu else torch.device("cuda")
    model_config, dtype = read_shape(config, gpu)
    begin_s = time.monotonic()
    warmed = warm_up_engine(config, model_config, dtype, gpu if target is None else torch.device("cpu"), target)
    where = torch.cuda.get_device_name(gpu) if target is None else f"sm_{target[0]}{target[1]}, in Triton's cache"
    for one in warmed:
        print(f"{one.name:28} {one.kernel:32} {one.how}")
    print(f"{len(warmed)} kernels for {arguments.model} in {dtype} on {where}: {time.monotonic() - begin_s:.1f} s")
    return 0


def _info(arguments: argparse.Namespace) -> int:
    from mixattn.engine.info import info_lines
    from mixattn.ops.cuda_images import kernel_lines

    print("\n".join(kernel_lines() if arguments.kernels else info_lines()))
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    config = _engine_config(arguments)
    from rich.console import Console

    from mixattn.engine.demo import Scenario, run
    from mixattn.models.loader import load_model

    scenario = Scenario(num_streams=arguments.num_streams, long_prompt_len=arguments.prompt_len)
    run(config, load_model(config), scenario, Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
