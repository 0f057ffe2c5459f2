"""The command line: answers, the lines that scripts look for, and mistakes met with one clear line."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from mixattn import _C, cli, env
from mixattn.config import PolicyName
from mixattn.engine import info

TINY = ["tiny-llama", "--load-format", "dummy", "--max-model-len", "512"]
COMMANDS = ["chat", "generate", "serve", "bench", "warmup", "info", "demo"]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of one command, run in this process."""
    try:
        status = cli.main(arguments)
    except SystemExit as exit_:  # argparse
        status = exit_.code
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    code = (
        "import sys, time; begin = time.perf_counter()\n"
        "from mixattn import cli\n"
        "try: cli.main(['serve', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'transformers', 'tokenizers', 'fastapi', 'tqdm', 'rich'} & set(sys.modules)\n"
        "print(heavy, file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "--max-num-batched-tokens" in result.stdout
    assert result.stderr.strip() == "set()"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_flag_of_every_command(capsys: pytest.CaptureFixture[str], command: str) -> None:
    status, out, _ = run(capsys, command, "--help")
    assert status == 0
    assert out.startswith(f"usage: mixattn-engine {command}")


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version")[:2] == (0, "mixattn 0.1.0\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        (["generate", *TINY], "required: --prompt"),
        (["generate", *TINY, "--prompt", "a", "--bogus"], "unrecognized arguments: --bogus"),
        (["generate", *TINY, "--prompt", "a", "--temperature", "warm"], "--temperature: invalid float value: 'warm'"),
        (["generate", *TINY, "--prompt", "a", "--temperature", "-1"], "temperature must be in [0, 100], got -1.0"),
        (["generate", *TINY, "--prompt", "a", "--top-p", "0"], "top_p must be in (0, 1]"),
        (["generate", *TINY, "--prompt", "a", "--max-tokens", "x4"], "'x4' is no number"),
        (["generate", *TINY, "--prompt", "a" * 600], "601 tokens; with max_model_len 512"),
        (["generate", "no-such-model", "--prompt", "a"], "'no-such-model'"),
        (
            ["generate", *TINY, "--prompt", "a", "--max-model-len", "4k"],
            "max_model_len must be in [1, 2048], the model's context, got 4000",
        ),
        (["generate", *TINY, "--prompt", "a", "--attention-backend", "magic"], "'magic'"),
        (
            ["generate", *TINY, "--prompt", "a", "--kv-cache-memory-bytes", "1k"],
            "kv_cache_memory_bytes must be >= 8192",
        ),
        (["generate", *TINY, "--prompt", "a", "--kv-cache-dtype", "fp9"], "invalid choice: 'fp9'"),
        (
            ["generate", *TINY, "--prompt", "a", "--kv-cache-dtype", "int4", "--kv-cache-memory-bytes", "1k"],
            "kv_cache_memory_bytes must be >= 1536",
        ),
        (["bench", *TINY, "--num-prompts", "0"], "num_prompts must be >= 1, got 0"),
        (["bench", *TINY, "--input-len", "500"], "input_len + output_len must be <= 512, the context, got 564"),
        (["chat", *TINY, "--message", "hi"], "no chat template"),
        (["serve", *TINY, "--port", "70000"], "port must be in [0, 65535], got 70000"),
        (["serve", *TINY, "--api-key-file", "/no/such/file"], "/no/such/file"),
        (["demo", *TINY], "prompt_len must be < 512, the context, got 1500"),
        (["generate", *TINY, "--prompt", "a", "--tbt-slo-ms", "0"], "tbt_slo_ms must be > 0, got 0.0"),
        (["generate", *TINY, "--prompt", "a", "--max-slowdown", "1"], "max_slowdown must be > 1, got 1.0"),
        (
            ["generate", *TINY, "--prompt", "a", "--no-enable-chunked-prefill", "--tbt-slo-ms", "5"],
            "go with policy time_budget, and one of them must; policy is prefill_first",
        ),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_mistake_is_one_clear_line_and_status_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    status, out, err = run(capsys, *arguments)
    assert status == 2
    assert message in err
    assert err.strip().splitlines()[-1].startswith("mixattn-engine")
    assert "Traceback" not in err
    assert out.strip() == ""


@pytest.mark.parametrize(
    ("text", "value"), [("17", 17), ("4k", 4000), ("4K", 4096), ("1.5k", 1500), ("2M", 2**21), ("1g", 10**9)]
)
def test_size_reads_numbers_as_vllm_does(text: str, value: int) -> None:
    assert cli._size(text) == value


def test_generate_one_prompt_streams_its_text(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", *TINY, "--prompt", "abc", "--max-tokens", "5", "--temperature", "0", "--ignore-eos"]
    status, out, err = run(capsys, *arguments)
    assert status == 0
    assert len(out) > 1
    assert out == run(capsys, *arguments)[1]
    assert re.fullmatch(r"\[5 tokens, the first after \d+\.\d\d s, then \d+\.\d tokens/s\]\n", err)


def test_generate_several_prompts_are_printed_with_their_texts(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "generate", *TINY, "--prompt", "first one", "--prompt", "second", "--max-tokens", "3")
    assert status == 0
    assert out.startswith("first one")
    assert "\n\nsecond" in out


def test_chat_message_is_answered(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--message", "hi", "--system", "be brief", "--max-tokens", "4", "--chat-template", TEMPLATE]
    status, out, _ = run(capsys, "chat", *TINY, *arguments)
    assert status == 0
    assert len(out) > 1


def test_chat_conversation_goes_on_to_the_end_of_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nand again\n"))
    status, out, err = run(capsys, "chat", *TINY, "--max-tokens", "4", "--chat-template", TEMPLATE)
    assert status == 0
    assert out.count("> ") == 3
    assert err.count("[4 tokens") == 2


def test_bench_prints_the_line_that_scripts_look_for(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    lengths = ["--num-prompts", "3", "--input-len", "20", "--output-len", "10", "--random-range-ratio", "0.5"]
    status, out, _ = run(capsys, "bench", *TINY, *lengths, "--output-json", str(file))
    assert status == 0
    number = r"\d+\.\d\d"
    line = rf"Throughput: {number} requests/s, {number} total tokens/s, {number} output tokens/s"
    assert re.match(line, out)
    record = json.loads(file.read_text())
    assert record["num_requests"] == 3
    assert record["total_num_tokens"] == sum(int(n) for n in re.findall(r"Total num \w+ tokens:  (\d+)", out))
    assert record["tokens_per_second"] == pytest.approx(record["total_num_tokens"] / record["elapsed_time"])


def test_info_lists_every_backend_with_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "info")
    assert status == 0
    assert re.search(r"^threads +\d+", out, re.MULTILINE)
    for backend in ("cpu", "triton", "cuda", "reference"):
        assert re.search(rf"^  {backend} +(yes|no) +\S", out, re.MULTILINE)


def test_info_says_why_an_isa_was_passed_over_unless_one_is_forced(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "avx512_bf16: two bfloat16 products take as long as 4.0 FMAs"
    cpu = {**_C.cpu_info(), "passed_over": reason}
    monkeypatch.setattr(info._C, "cpu_info", lambda: cpu)
    for forced, line in ((None, rf"{cpu['isa']} \(this CPU can: .*\); not {reason}"), ("scalar", r"scalar \(.*\)")):
        monkeypatch.setattr(env, "cpu_isa", lambda forced=forced: forced)
        assert re.search(rf"^CPU kernels +{line}$", run(capsys, "info")[1], re.MULTILINE)


def test_info_kernels_lists_the_compiled_kernels_or_says_why_there_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "info", "--kernels")
    assert status == 0
    assert re.match(r"built without CUDA kernels|kernels for .*\nkernel +for +registers", out)


@pytest.mark.parametrize(
    ("flags", "policy", "limits"),
    [
        ([], PolicyName.SARATHI, (None, None)),
        (["--no-enable-chunked-prefill"], PolicyName.PREFILL_FIRST, (None, None)),
        (["--tbt-slo-ms", "40"], PolicyName.TIME_BUDGET, (40.0, None)),
        (["--max-slowdown", "2.5"], PolicyName.TIME_BUDGET, (None, 2.5)),
        (["--tbt-slo-ms", "40", "--max-slowdown", "3"], PolicyName.TIME_BUDGET, (40.0, 3.0)),
    ],
)
def test_flags_choose_the_policy(
    flags: list[str], policy: PolicyName, limits: tuple[float | None, float | None]
) -> None:
    arguments = cli.build_parser().parse_args(["serve", *TINY, *flags])
    scheduler = cli._engine_config(arguments).scheduler
    assert (scheduler.policy, (scheduler.tbt_slo_ms, scheduler.max_slowdown)) == (policy, limits)


def test_demo_prints_a_row_for_each_way_of_batching(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "demo", *TINY, "--num-streams", "2", "--prompt-len", "300")
    assert status == 0
    assert "While 2 streams decode, a prompt of 300 tokens arrives" in out
    assert max(map(len, out.splitlines())) <= 80
    for label in ("chunked, at most 3x", "chunked, budget 64", "chunked, budget 256", "not chunked"):
        assert re.search(rf"{label}(\W+\d+){{5}}\W*$", out, re.MULTILINE)


def test_ctrl_c_ends_a_command_quietly_with_status_130() -> None:
    command = [sys.executable, "-m", "mixattn.cli", "generate", "tiny-llama", "--load-format", "dummy", "--ignore-eos"]
    process = subprocess.Popen(
        [*command, "--prompt", "a", "--max-tokens", "2000"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(cli.__file__).parents[1],
    )
    assert process.stdout is not None
    os.read(process.stdout.fileno(), 1)  # it is generating
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err


def test_ctrl_c_in_a_conversation_stops_the_answer_and_ctrl_d_ends_it() -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "mixattn.cli", "chat", *TINY[:3], "--ignore-eos", "--max-tokens", "2000"]
    process = subprocess.Popen(
        [*command, "--chat-template", TEMPLATE],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=Path(cli.__file__).parents[1],
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(theirs, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)

    shown = bytearray()

    def read_until(text: bytes) -> None:
        begin = len(shown)
        while text not in shown[begin:]:
            shown.extend(os.read(ours, 4096))

    try:
        read_until(b"> ")
        os.write(ours, b"hi\n")
        read_until(b"hi\r\n")
        shown.extend(os.read(ours, 1))  # the answer has begun
        os.write(ours, b"\x03")
        read_until(b"> ")
        os.write(ours, b"\x04")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        os.close(ours)
    assert shown.count(b"> ") == 2
    assert b"Traceback" not in shown
