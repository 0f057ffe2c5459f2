"""The server's event loop: the engine's client, the application, signals, and the order in which they end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
import socket
import time
from collections.abc import Iterator

import uvicorn
import uvloop
from tokenizers import Tokenizer as Backend

from mixattn.config import EngineConfig, ServerConfig
from mixattn.engine.client import EngineClient, EngineDeadError, EngineProcess
from mixattn.models.tokenizer import Tokenizer
from mixattn.server.app import create_app
from mixattn.server.prometheus import ServerMetrics
from mixattn.server.service import LoadedService, Service

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_LAST_BYTES_S = 2
"""How much longer than the requests themselves their connections may take to close."""


def run(
    config: EngineConfig, server: ServerConfig, engine: EngineProcess, listener: socket.socket, begin_s: float
) -> int:
    """Serves on ``listener`` with ``engine``, which it ends, until a signal or the engine's own end.

    Args:
        begin_s: when the program began, in seconds of the monotonic clock; for the log.
    Returns:
        The exit code.
    """
    return uvloop.run(_Program(config, server, engine, begin_s).run(listener))


class _UvicornServer(uvicorn.Server):
    """Uvicorn, leaving signals to the program."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Program:
    def __init__(self, config: EngineConfig, server: ServerConfig, engine: EngineProcess, begin_s: float) -> None:
        names = server.served_model_names or (config.model,)
        self._server = server
        self._engine = engine
        self._begin_s = begin_s
        self._service = Service(config.model, names, ServerMetrics(names[0], server.has_vllm_metrics))
        self._uvicorn = _UvicornServer(
            uvicorn.Config(
                create_app(self._service, server),
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                log_level=logging.WARNING,
                timeout_graceful_shutdown=math.ceil(server.shutdown_timeout_s) + _LAST_BYTES_S,
            )
        )

    async def run(self, listener: socket.socket) -> int:
        loop = asyncio.get_running_loop()
        client = EngineClient(self._engine, self._service.metrics)
        self._service.engine = client
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number, client)
        host, port = listener.getsockname()[:2]
        logger.info("listening on http://%s:%d while %s is being loaded", host, port, self._service.model)
        tasks = [loop.create_task(self._load(client)), loop.create_task(self._end_with(client))]
        try:
            await self._uvicorn.serve(sockets=[listener])
            return 0 if client.error is None else 1
        finally:
            for task in tasks:
                task.cancel()
            client.close()

    async def _load(self, client: EngineClient) -> None:
        """Opens the service once the engine is ready."""
        with contextlib.suppress(EngineDeadError):  # ``_end_with`` sees to that
            info = await client.info
            backend = await asyncio.to_thread(Backend.from_str, info.tokenizer.backend)
            tokenizer = Tokenizer(
                backend,
                special_tokens=info.tokenizer.special_tokens,
                chat_templates=info.tokenizer.chat_templates,
            )
            self._service.metrics.on_ready(info)
            self._service.loaded = LoadedService(tokenizer, info)
            logger.info(
                "ready after %.1f s (engine: imports %.1f s, model %.1f s)",
                time.monotonic() - self._begin_s,
                info.import_s,
                info.load_s,
            )

    async def _end_with(self, client: EngineClient) -> None:
        """The server ends when its engine does: whoever supervises it starts a new one."""
        await client.dead.wait()
        self._uvicorn.should_exit = True

    def _on_signal(self, number: int, client: EngineClient) -> None:
        if self._service.is_draining:
            self._engine.kill()
            os._exit(128 + number)
        self._service.is_draining = True
        self._uvicorn.should_exit = True
        if client.num_in_flight:
            logger.info("stopping; requests may run for %g s more", self._server.shutdown_timeout_s)
        loop = asyncio.get_running_loop()
        loop.call_later(self._server.shutdown_timeout_s, client.abort_all, "The server is stopping")
