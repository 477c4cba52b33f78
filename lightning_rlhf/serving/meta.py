"""``/health``, ``/metrics`` and ``/v1/models``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from lightning_rlhf.serving.errors import json_response
from lightning_rlhf.serving.models import Served
from lightning_rlhf.serving.server import Server


def meta_routes(server: Server) -> APIRouter:
    """Makes the routes."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> Response:
        alive = all(worker.alive for worker in server.workers)
        engines = {name: served.engine for name, served in server.models.items()}
        reward = None if server.scorer is None else server.scorer.name
        content = {"status": "ok" if alive else "failed", "engines": engines, "reward": reward}
        return json_response(content, 200 if alive else 503)

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @router.get("/v1/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [_model(served) for served in server.models.values()]})

    @router.get("/v1/models/{name}")
    async def model(name: str) -> Response:
        return json_response(_model(server.find(name)))

    return router


def _model(served: Served) -> dict[str, Any]:
    """A model in OpenAI's form, with the length of its context."""
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "lightning_rlhf",
        "context_length": served.context,
    }
