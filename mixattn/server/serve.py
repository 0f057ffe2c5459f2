"""``serve``: a server as a program, from its two arguments to its exit code."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import time
from collections.abc import Iterator

from mixattn.config import EngineConfig, ServerConfig
from mixattn.engine.client import EngineProcess

logger = logging.getLogger(__name__)

_LOOPBACK = ("localhost", "127.", "::1")
_BACKLOG = 1024


def serve(config: EngineConfig, server: ServerConfig) -> int:
    """Serves until SIGINT or SIGTERM; the exit code is 0 then, and 1 if the engine failed.

    The port is bound first, and answers 503 while the model is being loaded. The first signal lets running requests
    end, up to ``shutdown_timeout_s``; the second ends everything at once.

    Raises:
        OSError: the address cannot be bound.
    """
    begin_s = time.monotonic()
    with _listen(server.host, server.port) as listener, _sigterm_as_interrupt():
        if not server.api_keys and not server.host.startswith(_LOOPBACK):
            logger.warning("%s is reached from other machines, and no API key is set", server.host)
        engine = EngineProcess(config)
        try:
            # FastAPI takes 0.7 s to import. The engine takes longer to load and has been started before.
            from mixattn.server.program import run

            return run(config, server, engine, listener, begin_s)
        except KeyboardInterrupt:
            return 0
        finally:
            engine.stop()


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket: nobody is refused while the rest is being started."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM ends the start as Ctrl-C does, with everything put in order, until the event loop handles both."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
