"""The engine seen from the API process: started as a child, asked by ``generate``, watched until it ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec
import zmq
import zmq.asyncio

from mixattn.config import EngineConfig
from mixattn.engine import ipc
from mixattn.types import FinishReason, Request

logger = logging.getLogger(__name__)

_BOOT = "import sys; sys.path[:] = sys.argv[3:]; from mixattn.engine.process import main; main(*sys.argv[1:3])"
"""The engine finds its modules where this process does, and not in the directory it happens to be started from."""
_LAST_WORDS_S = 0.2
"""How long a message may be under way between the engine's send and its exit being seen here."""
_STOP_S = 5.0
"""The engine ends at the end of its stdin, within milliseconds; this long is something being wrong."""


class EngineDeadError(RuntimeError):
    """The engine process has ended, or failed; nothing can be generated any more."""


class QueueFullError(RuntimeError):
    """As many requests wait as may; this one was not taken."""


class RequestsAbortedError(RuntimeError):
    """The server gave the request up, as it does when it is told to stop."""


@dataclass(frozen=True)
class Delta:
    """What came newly for one request of a stream: at least a token or the end."""

    index: int
    """Which of the stream's requests."""
    token_ids: list[int]
    finish_reason: FinishReason | None
    """``ERROR`` when the step failed that the request was in."""


@dataclass(slots=True)
class RequestRecord:
    """What has happened to a request so far; times in seconds of the monotonic clock, as seen by this process."""

    num_prompt_tokens: int
    arrival_s: float
    num_tokens: int = 0
    """Generated."""
    first_token_s: float | None = None
    last_token_s: float | None = None


class Observer(Protocol):
    """Who is told of every step, token and end; the metrics."""

    def on_step(self, stats: ipc.StepStats) -> None: ...
    def on_first_token(self, record: RequestRecord, now: float) -> None: ...
    def on_next_token(self, gap_s: float) -> None: ...
    def on_finish(self, record: RequestRecord, reason: FinishReason, now: float) -> None: ...


class EngineProcess:
    """The engine's process, from before an event loop runs until it has been waited for.

    It is told the configuration through its stdin and ends when that is closed: by ``stop``, or by the kernel when this
    process ends in whatever way. No engine outlives its server.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="mixattn-"))  # 0700
        path = self._directory / "engine"
        if len(os.fsencode(path)) > zmq.IPC_PATH_MAX_LEN:
            self.remove_directory()
            raise OSError(f"TMPDIR is too long: a socket's name is at most {zmq.IPC_PATH_MAX_LEN} bytes, not {path}")
        self.address = f"ipc://{path}"
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, self.address, str(logging.root.level), *sys.path], stdin=subprocess.PIPE
        )
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(config) + b"\n")
        self._process.stdin.flush()

    @property
    def pid(self) -> int:
        return self._process.pid

    def remove_directory(self) -> None:
        """The connection lives on without its name."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def wait(self) -> int:
        """The exit code, once there is one; negative for a signal."""
        return self._process.wait()

    def stop(self) -> None:
        """Ends the process and waits for it; harmless when it has ended."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()
            self._process.wait()
        self.remove_directory()

    def kill(self) -> None:
        """Ends the process at once."""
        self._process.kill()
        self.remove_directory()


class DeltaStream(AsyncIterator[Delta]):
    """The tokens of a group of requests, as they come. Tokens that come while nobody reads are handed over together."""

    def __init__(self, client: EngineClient, requests: Sequence[Request]) -> None:
        self._client = client
        self._requests = requests
        self._tokens: dict[int, list[int]] = {}  # by index, not yet read; in the order of arrival
        self._finish: dict[int, FinishReason] = {}  # by index, not yet read
        self._running = set(range(len(requests)))  # not yet read to the end
        self._error: Exception | None = None
        self._is_admitted = False
        self._wake = asyncio.Event()

    async def __anext__(self) -> Delta:
        while not self._tokens:
            if self._error is not None:
                raise self._error
            if not self._running:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
        index = next(iter(self._tokens))
        delta = Delta(index, self._tokens.pop(index), self._finish.pop(index, None))
        if delta.finish_reason is not None:
            self._running.discard(index)
        return delta

    def stop(self, index: int) -> None:
        """Aborts one request of the group: its output is complete."""
        self._running.discard(index)
        self._tokens.pop(index, None)
        self._finish.pop(index, None)
        self._client.forget([self._requests[index].request_id], FinishReason.STOP)

    def close(self) -> None:
        """Aborts what still runs; its pages are free within a step."""
        self._running.clear()
        self._client.forget([request.request_id for request in self._requests], FinishReason.ABORT)

    async def admitted(self) -> None:
        """Returns once the engine has taken the requests.

        Raises:
            ValueError: they can never be served.
            QueueFullError: not now.
        """
        while not self._is_admitted:
            if self._error is not None:
                raise self._error
            self._wake.clear()
            await self._wake.wait()

    def on_admission(self, error: Exception | None) -> None:
        self._is_admitted = error is None
        self._error = error
        self._wake.set()

    def on_token(self, index: int, token_id: int | None, finish_reason: FinishReason | None) -> None:
        tokens = self._tokens.setdefault(index, [])
        if token_id is not None:
            tokens.append(token_id)
        if finish_reason is not None:
            self._finish[index] = finish_reason
        self._wake.set()

    def on_error(self, error: Exception) -> None:
        self._error = error
        self._wake.set()


@dataclass(slots=True)
class _InFlight:
    """A request that the engine has, or is asked to take."""

    stream: DeltaStream
    index: int
    record: RequestRecord


class EngineClient:
    """Asks an ``EngineProcess``; to be made and used within one event loop."""

    def __init__(self, process: EngineProcess, observer: Observer) -> None:
        self._process = process
        self._observer = observer
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)  # neither side ever waits for the other; what is in flight is bounded by admission
        self._socket.bind(process.address)
        self._in_flight: dict[str, _InFlight] = {}
        self._groups: dict[int, tuple[DeltaStream, Sequence[Request]]] = {}  # sent, not answered
        self._next_group_id = 0
        self._loop = asyncio.get_running_loop()
        self.info: asyncio.Future[ipc.EngineInfo] = self._loop.create_future()
        """Set once the model is loaded; EngineDeadError if it could not be."""
        self.dead = asyncio.Event()
        self.error: EngineDeadError | None = None
        self.stats: ipc.StepStats | None = None
        self._receiver = self._loop.create_task(self._receive())
        threading.Thread(target=self._watch, name="engine-watch", daemon=True).start()

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    async def generate(self, requests: Sequence[Request]) -> DeltaStream:
        """The stream of these requests' tokens, once the engine has taken all of them.

        Raises:
            ValueError: one of them can never be served; the message names the bound.
            QueueFullError: they cannot be taken now.
            EngineDeadError: there is no engine.
        """
        if self.error is not None:
            raise self.error
        stream = DeltaStream(self, requests)
        group_id = self._next_group_id
        self._next_group_id += 1
        self._groups[group_id] = (stream, requests)
        for index, request in enumerate(requests):
            record = RequestRecord(len(request.prompt_token_ids), request.arrival_s)
            self._in_flight[request.request_id] = _InFlight(stream, index, record)
        self._send(ipc.AddRequests(group_id, list(requests)))
        try:
            await stream.admitted()
        except BaseException:
            stream.close()
            raise
        return stream

    def forget(self, request_ids: Sequence[str], reason: FinishReason) -> None:
        """Ends those of the requests that still run, and has the engine free their pages."""
        now = time.monotonic()
        ended = []
        for request_id in request_ids:
            in_flight = self._in_flight.pop(request_id, None)
            if in_flight is not None:
                self._observer.on_finish(in_flight.record, reason, now)
                ended.append(request_id)
        if ended and self.error is None:
            self._send(ipc.AbortRequests(ended, reason))

    def abort_all(self, reason: str) -> None:
        """Ends every stream with a RequestsAbortedError."""
        for stream in {in_flight.stream for in_flight in self._in_flight.values()}:
            stream.on_error(RequestsAbortedError(reason))
            stream.close()

    def close(self) -> None:
        """Ends the engine process and waits for it."""
        self.error = self.error or EngineDeadError("the engine has been closed")
        self._receiver.cancel()
        self._context.destroy(linger=0)
        self._process.stop()

    def _send(self, command: ipc.Command) -> None:
        self._socket.send(ipc.encoder.encode(command))  # without a high-water mark it is sent on the spot

    async def _receive(self) -> None:
        try:
            while True:
                self._handle(ipc.event_decoder.decode(await self._socket.recv()))
        except Exception as error:
            logger.exception("the engine's messages cannot be read")
            self._die(f"the engine's messages cannot be read: {error}")

    def _handle(self, event: ipc.Event) -> None:
        if isinstance(event, ipc.StepOutputs):
            self._on_step(event)
        elif isinstance(event, ipc.Admission):
            self._on_admission(event)
        elif isinstance(event, ipc.Hello):
            self._process.remove_directory()
        elif isinstance(event, ipc.EngineInfo):
            self.info.set_result(event)
        else:
            self._die(event.message)

    def _on_admission(self, answer: ipc.Admission) -> None:
        stream, requests = self._groups.pop(answer.group_id)
        if answer.error is None:
            stream.on_admission(None)
            return
        for request in requests:
            self._in_flight.pop(request.request_id, None)
        stream.on_admission((QueueFullError if answer.is_queue_full else ValueError)(answer.error))

    def _on_step(self, outputs: ipc.StepOutputs) -> None:
        now = time.monotonic()
        self.stats = outputs.stats
        self._observer.on_step(outputs.stats)
        for event in outputs.events:
            in_flight = self._in_flight.get(event.request_id)
            if in_flight is None:
                continue  # aborted meanwhile
            if event.token_id is not None:
                self._record_token(in_flight.record, now)
            if event.finish_reason is not None:
                del self._in_flight[event.request_id]
                self._observer.on_finish(in_flight.record, event.finish_reason, now)
            in_flight.stream.on_token(in_flight.index, event.token_id, event.finish_reason)

    def _record_token(self, record: RequestRecord, now: float) -> None:
        if record.last_token_s is None:
            record.first_token_s = now
            self._observer.on_first_token(record, now)
        else:
            self._observer.on_next_token(now - record.last_token_s)
        record.last_token_s = now
        record.num_tokens += 1

    def _watch(self) -> None:
        """Waits for the engine's end, in a thread of its own."""
        exit_code = self._process.wait()
        with contextlib.suppress(RuntimeError):  # the loop is closed: there is nobody left to tell
            self._loop.call_soon_threadsafe(self._loop.call_later, _LAST_WORDS_S, self._on_exit, exit_code)

    def _on_exit(self, exit_code: int) -> None:
        how = f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
        self._die(f"the engine process ended with {how}")

    def _die(self, reason: str) -> None:
        if self.error is not None:
            return
        logger.error("engine: %s", reason)
        self.error = EngineDeadError(reason)
        if not self.info.done():
            self.info.set_exception(self.error)
            self.info.exception()  # told to whoever asks; nobody has to
        for stream in {in_flight.stream for in_flight in self._in_flight.values()}:
            stream.on_error(self.error)
        self._in_flight.clear()
        self._groups.clear()
        self.dead.set()
