"""The HTTP app: OpenAI's routes over whatever decodes behind them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.responses import Response
from fastapi.telemetry import TelemetryConfig

from offramp.deploy.classifying.classification import Classification
from offramp.deploy.clients.quotas import Quotas
from offramp.deploy.http.backend import Backend, ClassBackend, Embedded, EngineBackend, Pool
from offramp.deploy.http.error_replies import add_error_handlers
from offramp.deploy.http.gate import Gate
from offramp.deploy.http.generation import Generation
from offramp.deploy.http.limits import DEFAULT_LIMITS, HttpLimits
from offramp.deploy.http.observability.access_log import AccessLog
from offramp.deploy.http.observability.metrics import Metrics
from offramp.deploy.http.observability.tracing import Spans
from offramp.deploy.http.shapes.chat_contract import ChatRequest
from offramp.deploy.http.shapes.class_shapes import ClassifyReply, ClassifyRequest
from offramp.deploy.http.shapes.contract import CompletionRequest
from offramp.deploy.http.shapes.reply_shapes import ChatReply, CompletionReply, ErrorReply
from offramp.deploy.http.shapes.score_shapes import ScoreReply, ScoreRequest
from offramp.deploy.http.status_routes import add_status_routes, require_model
from offramp.deploy.http.text_routes import add_text_routes

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorReply, "description": "The request is refused"},
    "5XX": {"model": ErrorReply, "description": "The server failed"},
}
"""Every route's errors, in place of FastAPI's own 422, which never comes."""

EVENT = {
    "type": "object",
    "properties": {"data": {"type": "string", "description": "A chunk as JSON, or [DONE]."}},
    "required": ["data"],
}
"""One event of a stream, as OpenAPI 3.2 and FastAPI describe it."""

STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"itemSchema": EVENT}}}
}
"""What a reply may also be."""

NO_SPANS: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False}
"""FastAPI's own, beside ``spans``; it would ask the environment before each request."""


def create_app(
    backend: Backend | Embedded,
    limits: HttpLimits = DEFAULT_LIMITS,
    access_log: Path | None = None,
    spans: Spans | None = None,
) -> FastAPI:
    """Build the app over a backend.

    Args:
        backend: What decodes; of what is no backend but has a service, that.
        limits: How much and how long a client may ask.
        access_log: File that gets a line of JSON per request.
        spans: Makes a span of each request that makes tokens.
    """
    backend = _decoding(backend)
    app, metrics, quotas = _app_around(backend, limits, access_log)
    generation = Generation(backend, limits, metrics, quotas, spans)

    @app.post("/v1/completions", response_model=CompletionReply, responses=STREAMED)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        require_model(body.model, backend)
        return await generation.complete(body, request)

    @app.post("/v1/chat/completions", response_model=ChatReply, responses=STREAMED)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        require_model(body.model, backend)
        return await generation.converse(body, request)

    return app


def _decoding(given: Backend | Embedded) -> Backend:
    # Not by its type: that would ask a pool that is yet to start for its properties.
    return cast("Backend", given) if hasattr(given, "submit_all") else EngineBackend.of(given)


def create_class_app(
    backend: ClassBackend,
    limits: HttpLimits = DEFAULT_LIMITS,
    access_log: Path | None = None,
    _spans: Spans | None = None,
) -> FastAPI:
    """Build the app over a backend that classifies; arguments are those of ``create_app``."""
    app, metrics, quotas = _app_around(backend, limits, access_log)
    classification = Classification(backend, limits, metrics, quotas)

    @app.post("/v1/classify")
    async def classify(body: ClassifyRequest, request: Request) -> ClassifyReply:
        require_model(body.model, backend)
        return await classification.answer(body, request)

    @app.post("/v1/score")
    async def score(body: ScoreRequest, request: Request) -> ScoreReply:
        require_model(body.model, backend)
        return await classification.score(body, request)

    return app


def _app_around(
    backend: Pool, limits: HttpLimits, access_log: Path | None
) -> tuple[FastAPI, Metrics, Quotas]:
    """The app with what every pool answers, whatever it is asked for."""
    app = FastAPI(
        title="offramp", docs_url=None, redoc_url=None, responses=ERRORS, telemetry=NO_SPANS
    )
    quotas = Quotas(backend.clients.allowance)
    app.add_middleware(Gate, backend=backend, limits=limits, quotas=quotas)
    metrics = Metrics(backend)
    app.add_middleware(AccessLog, file=access_log, count=metrics.count_reply)
    add_error_handlers(app)
    add_status_routes(app, backend, metrics)
    add_text_routes(app, backend)
    return app, metrics, quotas
