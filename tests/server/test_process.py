"""How server and engine process end: by signals, by each other's death, by a failure to start."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import pytest

from mixattn.config import EngineConfig
from mixattn.engine.client import EngineProcess
from tests.server.live import LiveServer, is_running, live_server, wait_until

STUB = Path(__file__).parent / "stub_engine"
MODEL = "counting"
STREAM = {"prompt": "a", "stream": True, "ignore_eos": True}
Start = Callable[..., LiveServer]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts servers whose temporary directories are ``tmp_path``; they end with the test."""
    path = os.pathsep.join([str(STUB), *filter(None, [os.environ.get("PYTHONPATH")])])
    with ExitStack() as stack:

        def start(*arguments: str, has_model: bool = False) -> LiveServer:
            environment = {} if has_model else {"PYTHONPATH": path}
            return stack.enter_context(live_server(*arguments, temporary=tmp_path, environment=environment))

        yield start


def rest_of(response: HTTPResponse) -> list[dict[str, Any]]:
    """The chunks that a stream still gives, up to its proper end."""
    events = response.read().decode().strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]


def assert_nothing_is_left(server: LiveServer, engine_pid: int) -> None:
    wait_until(lambda: not is_running(engine_pid), "the engine's end", 10)
    assert not list(server.temporary.glob("mixattn-*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_while_loading_ends_everything(start: Start, number: signal.Signals) -> None:
    server = start("tiny-llama", "--load-format", "dummy", has_model=True)
    assert server.get("/ready")[0] == 503
    assert server.get("/health")[0] == 200
    engine_pid = server.engine_pid
    server.signal(number)
    assert server.exit_code() == 0
    assert_nothing_is_left(server, engine_pid)
    assert "Traceback" not in server.log


def test_sigterm_lets_running_requests_end(start: Start) -> None:
    server = start(MODEL, "--shutdown-timeout", "60").wait_until_ready()
    engine_pid = server.engine_pid
    os.kill(engine_pid, signal.SIGTERM)  # some supervisors signal all processes of a group: the engine leaves it be
    response = server.post("/v1/completions", {**STREAM, "max_tokens": 500})
    response.readline()
    server.signal(signal.SIGTERM)
    wait_until(lambda: not is_listening(server.port), "closed to new requests")
    assert rest_of(response)[-1]["choices"][0]["finish_reason"] == "length"
    assert server.exit_code() == 0
    assert_nothing_is_left(server, engine_pid)


def test_requests_beyond_the_shutdown_timeout_end_with_an_error(start: Start) -> None:
    server = start(MODEL, "--shutdown-timeout", "0").wait_until_ready()
    engine_pid = server.engine_pid
    response = server.post("/v1/completions", {**STREAM, "n": 64, "max_tokens": 2000})
    response.readline()
    server.signal(signal.SIGINT)
    assert rest_of(response)[-1]["error"]["code"] == "shutting_down"
    assert server.exit_code() == 0
    assert_nothing_is_left(server, engine_pid)


def test_second_signal_ends_at_once(start: Start) -> None:
    server = start(MODEL, "--shutdown-timeout", "300").wait_until_ready()
    engine_pid = server.engine_pid
    response = server.post("/v1/completions", {**STREAM, "n": 64, "max_tokens": 2000})
    response.readline()
    server.signal(signal.SIGINT)
    wait_until(lambda: "stopping" in server.log, "the first signal seen")
    server.signal(signal.SIGINT)
    assert server.exit_code() == 128 + signal.SIGINT
    assert_nothing_is_left(server, engine_pid)


def test_full_queue_refuses_and_engines_death_ends_the_server(start: Start) -> None:
    server = start(MODEL, "--max-num-seqs", "1", "--max-num-queued-reqs", "4").wait_until_ready()
    engine_pid = server.engine_pid
    response = server.post("/v1/completions", {**STREAM, "n": 4, "max_tokens": 2000})
    response.readline()
    refused = server.post("/v1/completions", {"prompt": "a", "n": 2})  # 1 runs, 3 wait, and 2 more would be 5
    assert (refused.status, refused.headers["Retry-After"]) == (429, "1")
    assert "max_num_queued_reqs (4)" in json.loads(refused.read())["error"]["message"]
    os.kill(engine_pid, signal.SIGKILL)
    assert rest_of(response)[-1]["error"]["code"] == "engine_dead"
    assert server.exit_code() == 1
    assert "the engine process ended with signal 9" in server.log
    assert_nothing_is_left(server, engine_pid)


def test_servers_death_ends_the_engine(start: Start) -> None:
    server = start(MODEL)
    engine_pid = server.engine_pid
    wait_until(lambda: not list(server.temporary.glob("mixattn-*")), "the socket's name is removed once connected")
    server.signal(signal.SIGKILL)
    server.exit_code()
    assert_nothing_is_left(server, engine_pid)


def test_model_that_is_not_there_ends_the_server_with_a_message(start: Start) -> None:
    server = start("no-such-model.gguf", has_model=True)
    assert server.exit_code() == 1
    assert "no-such-model.gguf" in server.log
    assert "Traceback" not in server.log
    assert not list(server.temporary.glob("mixattn-*"))


def test_port_in_use_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    from mixattn.cli import main

    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", MODEL, "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1:{port}" in capfd.readouterr().err


def test_sockets_directory_is_the_owners_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    engine = EngineProcess(EngineConfig("tiny-llama", load_format="dummy"))
    (directory,) = tmp_path.iterdir()
    assert directory.stat().st_mode & 0o777 == 0o700
    engine.stop()
    assert not is_running(engine.pid)
    assert not directory.exists()


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
