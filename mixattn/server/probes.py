"""What orchestrators, routers and dashboards ask: health, readiness, load, metrics, version."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

import mixattn
from mixattn.server.answer import json_response
from mixattn.server.prometheus import CONTENT_TYPE
from mixattn.server.service import AnyService

router = APIRouter()


@router.get("/health", summary="Alive? 503 once the engine has ended")
@router.get("/ping", summary="As /health")
async def health(service: AnyService) -> Response:
    service.require_alive()
    return Response()


@router.get("/ready", summary="Welcoming requests? 503 while loading or stopping")
async def ready(service: AnyService) -> Response:
    service.require_loaded()
    return Response()


@router.get("/load", summary="Requests in the server")
async def load(service: AnyService) -> Response:
    """``server_load`` counts what was taken and has not ended; ``running`` and ``waiting`` are the engine's words."""
    stats = None if service.engine is None else service.engine.stats
    answer = {
        "server_load": 0 if service.engine is None else service.engine.num_in_flight,
        "running": 0 if stats is None else stats.scheduler.num_running,
        "waiting": 0 if stats is None else stats.scheduler.num_waiting,
    }
    return json_response(answer)


@router.get("/metrics", summary="Prometheus metrics")
async def metrics(service: AnyService) -> Response:
    return Response(service.metrics.render(), media_type=CONTENT_TYPE)


@router.get("/version", summary="The server's version")
async def version() -> Response:
    return json_response({"version": mixattn.__version__})
