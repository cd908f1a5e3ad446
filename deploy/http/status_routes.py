"""Routes that say what is served and how it is."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from offramp.deploy.http.backend import Pool
from offramp.deploy.http.observability.metrics import Metrics
from offramp.deploy.http.shapes.reply_shapes import (
    ErrorReply,
    ModelCard,
    ModelList,
    StateReply,
    VersionReply,
)

UNREADY: dict[int | str, dict[str, Any]] = {503: {"model": StateReply | ErrorReply}}


def require_model(name: str, backend: Pool) -> None:
    """Refuse a model that is not served.

    Raises:
        HTTPException: 404.
    """
    if name != backend.model_id:
        raise HTTPException(404, f"model: {name!r} is not served. Ask for {backend.model_id!r}.")


def add_status_routes(app: FastAPI, backend: Pool, metrics: Metrics) -> None:
    """Add them to an app."""

    @app.get("/v1/models")
    async def models() -> ModelList:
        return {"object": "list", "data": [_card(backend)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> ModelCard:
        require_model(name, backend)
        return _card(backend)

    @app.get("/v1/policy")
    async def policy() -> dict[str, Any]:
        reports = backend.reports()
        if not reports:
            raise HTTPException(503, "no worker has reported yet")
        return reports[-1]

    @app.get("/metrics", response_class=PlainTextResponse)
    async def scraped() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/version")
    async def installed() -> VersionReply:
        return {"version": version("offramp")}

    @app.get("/health", response_model=StateReply, responses=UNREADY)
    async def health() -> Response:
        return _state(backend.trouble() or "ok", is_fine=backend.trouble() is None)

    @app.get("/ready", response_model=StateReply, responses=UNREADY)
    async def ready() -> Response:
        outstanding, capacity = backend.load()
        trouble = backend.trouble() or ("busy" if outstanding >= capacity else None)
        return _state(trouble or "ready", is_fine=trouble is None, outstanding=outstanding)


def _state(status: str, *, is_fine: bool, **numbers: int) -> Response:
    return JSONResponse({"status": status, **numbers}, 200 if is_fine else 503)


def _card(backend: Pool) -> ModelCard:
    return {
        "id": backend.model_id,
        "object": "model",
        "created": backend.started_at,
        "owned_by": "offramp",
    }
