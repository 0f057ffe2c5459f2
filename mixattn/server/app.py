"""The ASGI application."""

from __future__ import annotations

from fastapi import FastAPI

import mixattn
from mixattn.config import ServerConfig
from mixattn.server import chat, completions, models, probes
from mixattn.server.errors import install_handlers
from mixattn.server.middleware import Gate
from mixattn.server.service import Service


def create_app(service: Service, config: ServerConfig) -> FastAPI:
    """The application, answering from now on; routes that need the model say 503 until ``service.loaded`` is set."""
    app = FastAPI(title="mixattn", version=mixattn.__version__)
    app.state.service = service
    install_handlers(app)
    for routes in (probes, models, completions, chat):
        app.include_router(routes.router)
    app.add_middleware(Gate, api_keys=config.api_keys, max_request_bytes=config.max_request_bytes)
    return app
