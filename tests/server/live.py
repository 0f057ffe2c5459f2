"""The server as users start it: a process, on a free port."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_START_S = 120
_LISTENING = re.compile(r"listening on http://127\.0\.0\.1:(\d+)")


def wait_until(condition: Any, what: str, limit_s: float = 30.0) -> None:
    """Returns once ``condition()`` holds; fails when it does not in time."""
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s, f"not within {limit_s} s: {what}"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Whether there is such a process, and not only its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


class LiveServer:
    """``mixattn-engine serve`` with these arguments."""

    def __init__(self, *arguments: str, temporary: Path, environment: Mapping[str, str] | None = None) -> None:
        self.temporary = temporary
        self._log: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mixattn.cli", "serve", *arguments, "--port", "0"],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(temporary), **(environment or {})},
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        wait_until(lambda: _LISTENING.search(self.log) or self.process.poll() is not None, "the port", _START_S)
        found = _LISTENING.search(self.log)
        assert found, self.log
        self.port = int(found[1])

    @property
    def log(self) -> str:
        return "".join(self._log)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def engine_pid(self) -> int:
        """The one child."""
        pid = self.process.pid
        (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(child)

    def wait_until_ready(self) -> LiveServer:
        wait_until(lambda: self.get("/ready")[0] == 200, f"ready\n{self.log}", _START_S)
        return self

    def get(self, path: str) -> tuple[int, bytes]:
        with contextlib.closing(self.connection()) as connection:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()

    def metric(self, name: str) -> float:
        """The value of a metric without labels but the model's."""
        found = re.search(rf"^{name}\{{model_name=\"[^\"]*\"\}} (\S+)$", self.get("/metrics")[1].decode(), re.MULTILINE)
        assert found, name
        return float(found[1])

    def post(self, path: str, body: Any) -> http.client.HTTPResponse:
        """The response, whose connection ends with ``close`` of it."""
        connection = self.connection()
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json", "Connection": "close"})
        return connection.getresponse()

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def exit_code(self) -> int:
        """Waits for the end."""
        code = self.process.wait(60)
        self._reader.join(10)
        return code

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        assert self.process.stderr is not None
        self._reader.join(10)
        self.process.stderr.close()

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._log.append(line)


@contextlib.contextmanager
def live_server(*arguments: str, temporary: Path, environment: Mapping[str, str] | None = None) -> Iterator[LiveServer]:
    """A server that is gone afterwards, whatever happens."""
    server = LiveServer(*arguments, temporary=temporary, environment=environment)
    try:
        yield server
    finally:
        server.kill()
