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
from offramp.deploy.http.served_models import ServedModels
from offramp.deploy.http.shapes.reply_shapes import (
    ErrorReply,
    ModelCard,
    ModelList,
    StateReply,
    VersionReply,
)

SERVE_HEALTH = "/-/healthz"
"""Where Ray Serve's proxies say how they are: KubeRay asks there before it sends clients."""

UNREADY: dict[int | str, dict[str, Any]] = {503: {"model": StateReply | ErrorReply}}


def add_status_routes(app: FastAPI, served: ServedModels, metrics: Metrics) -> None:
    """Add them to an app."""

    @app.get("/v1/models")
    async def models() -> ModelList:
        return {"object": "list", "data": [_card(pool) for pool in served.by_name.values()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> ModelCard:
        return _card(served.named(name))

    @app.get("/v1/policy")
    async def policy(model: str | None = None) -> dict[str, Any]:
        reports = served.named(model).reports()
        if not reports:
            raise HTTPException(503, "no worker has reported yet")
        return reports[-1]

    @app.get("/metrics", response_class=PlainTextResponse)
    async def scraped() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/version")
    async def installed() -> VersionReply:
        return {"version": version("offramp")}

    @app.get(SERVE_HEALTH, response_model=StateReply, responses=UNREADY)
    @app.get("/health", response_model=StateReply, responses=UNREADY)
    async def health() -> Response:
        return _state(served, served.trouble(), "ok")

    @app.get("/ready", response_model=StateReply, responses=UNREADY)
    async def ready() -> Response:
        outstanding, capacity = served.load()
        trouble = served.trouble() or ("busy" if outstanding >= capacity else None)
        return _state(served, trouble, "ready", outstanding=outstanding)


def _state(served: ServedModels, trouble: str | None, fine: str, **numbers: int) -> Response:
    """What an orchestrator asks for; of several models, how each is, too."""
    state: StateReply = {"status": trouble or fine, **numbers}  # type: ignore[typeddict-item]
    if served.only is None:
        state["models"] = {name: pool.trouble() or fine for name, pool in served.by_name.items()}
    return JSONResponse(state, 200 if trouble is None else 503)


def _card(pool: Pool) -> ModelCard:
    return {
        "id": pool.model_id,
        "object": "model",
        "created": pool.started_at,
        "owned_by": "offramp",
    }
