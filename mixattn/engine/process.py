"""The engine in a process of its own: loads the model, then steps, taking commands between steps.

Started by ``engine.client.EngineProcess``, which hands over the configuration as one line of JSON on stdin and then
keeps that open. The end of stdin is the end of the server, however it came about, and ends this process at once.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Protocol

import msgspec
import zmq

from mixattn.config import EngineConfig
from mixattn.engine import ipc
from mixattn.engine.wall_driver import WallDriver
from mixattn.sched.scheduler import QueueFull
from mixattn.types import TokenEvent

if TYPE_CHECKING:
    from mixattn.engine.build import Engine

logger = logging.getLogger(__name__)

_LAST_WORDS_MS = 1000
"""How long an exit waits for the failure's message to be taken."""


class Channel:
    """This process's end of the pair."""

    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)  # a step never waits for a slow reader
        self._socket.connect(address)

    def send(self, event: ipc.Event) -> None:
        self._socket.send(ipc.encoder.encode(event))

    def receive(self, is_blocking: bool) -> ipc.Command | None:
        """The next command; None when there is none and it was not to wait for one."""
        try:
            return ipc.command_decoder.decode(self._socket.recv(0 if is_blocking else zmq.NOBLOCK))
        except zmq.Again:
            return None

    def close(self) -> None:
        """Returns when all has been sent, or nobody takes it."""
        self._socket.close(linger=_LAST_WORDS_MS)
        self._context.term()


class CommandChannel(Protocol):
    """What an ``EngineServer`` asks of its channel."""

    def send(self, event: ipc.Event) -> None: ...
    def receive(self, is_blocking: bool) -> ipc.Command | None: ...


class EngineServer:
    """Serves an engine's peer, for ever.

    Args:
        driver: the engine.
        channel: to the peer (``Channel``).
    """

    def __init__(self, driver: WallDriver, channel: CommandChannel) -> None:
        self._driver = driver
        self._core = driver.core
        self._channel = channel

    def run(self) -> None:
        """Steps while there is work and waits for commands while there is none."""
        while True:
            self._handle_commands()
            last_step = self._core.last_step
            events = self._driver.step()
            self._report(events, is_step=self._core.last_step is not last_step)

    def _handle_commands(self) -> None:
        """All commands that are there; at least one if there is nothing else to do."""
        command = self._channel.receive(is_blocking=not self._core.has_work)
        while command is not None:
            if isinstance(command, ipc.AddRequests):
                self._channel.send(self._add(command))
            else:
                for request_id in command.request_ids:
                    self._core.abort(request_id, command.reason)
            command = self._channel.receive(is_blocking=False)

    def _add(self, command: ipc.AddRequests) -> ipc.Admission:
        added: list[str] = []
        try:
            for request in command.requests:
                self._driver.add_request(request)
                added.append(request.request_id)
        except (ValueError, QueueFull) as error:
            for request_id in added:
                self._core.abort(request_id)
            return ipc.Admission(command.group_id, str(error), isinstance(error, QueueFull))
        return ipc.Admission(command.group_id, None)

    def _report(self, events: list[TokenEvent], is_step: bool) -> None:
        queue = self._core.metrics.queue_s
        stats = ipc.StepStats(self._core.stats(), self._core.last_step if is_step else None, queue.counts, queue.total)
        self._channel.send(ipc.StepOutputs(events, stats))


def main(address: str, log_level: str) -> None:
    """Runs the engine until the end of stdin; exit code 1 on failure, of which the peer has been told.

    Args:
        address: where the peer listens.
        log_level: a number of ``logging``'s.
    """
    begin_s = time.monotonic()
    # Ctrl-C reaches every process of the terminal, and some supervisors signal a whole group: the server decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(level=int(log_level), format="%(levelname)s %(name)s: %(message)s")
    config = msgspec.json.decode(sys.stdin.buffer.readline(), type=EngineConfig)
    threading.Thread(target=_exit_at_end_of_stdin, name="parent-watch", daemon=True).start()
    channel = Channel(address)
    channel.send(ipc.Hello())
    try:
        try:
            engine, info = _load(config, begin_s)
        except (FileNotFoundError, ValueError, NotImplementedError) as error:
            channel.send(
                ipc.Failure(str(error))
            )  # the caller's: it says what is wrong with the configuration or a file
        else:
            # What has been loaded stays: to look at all of it, as a full collection does, takes some 0.15 s of a step.
            gc.freeze()
            channel.send(info)
            EngineServer(engine.driver, channel).run()
    except Exception as error:
        logger.exception("the engine failed")
        channel.send(ipc.Failure(f"{type(error).__name__}: {error}"))
    channel.close()
    sys.exit(1)


def _load(config: EngineConfig, begin_s: float) -> tuple[Engine, ipc.EngineInfo]:
    from mixattn.engine.build import build_engine  # torch
    from mixattn.models.loader import load_model

    imported_s = time.monotonic()
    loaded = load_model(config)
    engine = build_engine(config, loaded)
    scheduler = engine.scheduler_config
    info = ipc.EngineInfo(
        max_model_len=scheduler.max_model_len,
        vocab_size=engine.model_config.vocab_size,
        eos_token_ids=engine.model_config.eos_token_ids,
        page_size=engine.page_size,
        num_pages=engine.num_pages,
        max_num_queued_reqs=scheduler.max_num_queued_reqs,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        tokenizer=ipc.TokenizerData(
            engine.tokenizer.backend.to_str(), engine.tokenizer.special_tokens, engine.tokenizer.chat_templates
        ),
        import_s=imported_s - begin_s,
        load_s=time.monotonic() - imported_s,
    )
    return engine, info


def _exit_at_end_of_stdin() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os._exit(0)  # nothing here outlives the process, so nothing needs to be put in order
