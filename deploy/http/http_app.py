"""The HTTP app: OpenAI's routes over whatever decodes behind them."""

from __future__ import annotations

from collections.abc import Sequence
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
from offramp.deploy.http.served_models import Answerers, ServedModels, classifies
from offramp.deploy.http.shapes.chat_contract import ChatRequest
from offramp.deploy.http.shapes.class_shapes import ClassifyReply, ClassifyRequest
from offramp.deploy.http.shapes.contract import CompletionRequest
from offramp.deploy.http.shapes.reply_shapes import ChatReply, CompletionReply, ErrorReply
from offramp.deploy.http.shapes.score_shapes import ScoreReply, ScoreRequest
from offramp.deploy.http.status_routes import add_status_routes
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


Served = Backend | ClassBackend | Embedded
"""What answers for a model: with ``labels`` it classifies; with no more than a service, that."""


def create_app(
    pools: Served | Sequence[Served],
    limits: HttpLimits = DEFAULT_LIMITS,
    access_log: Path | None = None,
    spans: Spans | None = None,
) -> FastAPI:
    """Build the app over whatever answers, with the routes for what that can do.

    Args:
        pools: What answers for the model, or for each of several.
        limits: How much and how long a client may ask.
        access_log: File that gets a line of JSON per request.
        spans: Makes a span of each request that makes tokens, or classifies.

    Raises:
        ConfigError: two models have the same name.
    """
    given = list(pools) if isinstance(pools, Sequence) else [pools]
    models = ServedModels([_answering(each) for each in given])
    app = FastAPI(
        title="offramp", docs_url=None, redoc_url=None, responses=ERRORS, telemetry=NO_SPANS
    )
    quotas = Quotas(models.clients.allowance)
    app.add_middleware(Gate, models=models, limits=limits, quotas=quotas)
    metrics = Metrics(models)
    app.add_middleware(AccessLog, file=access_log, count=metrics.count_reply)
    add_error_handlers(app)
    add_status_routes(app, models, metrics)
    add_text_routes(app, models)
    generations, classifications = {}, {}
    for name, pool in models.by_name.items():
        counted = metrics.by_model[name]
        if classifies(pool):
            classifications[name] = Classification(
                cast("ClassBackend", pool), limits, counted, quotas, spans
            )
        else:
            generations[name] = Generation(cast("Backend", pool), limits, counted, quotas, spans)
    if generations:
        _add_generation(
            app, Answerers(models, generations, "classifies texts, and makes no tokens")
        )
    if classifications:
        _add_classification(
            app, Answerers(models, classifications, "makes tokens, and classifies nothing")
        )
    return app


def _answering(given: Served) -> Pool:
    # Not by its type: that would ask a pool that is yet to start for its properties.
    if classifies(given) or hasattr(given, "submit_all"):
        return cast("Pool", given)
    return EngineBackend.of(cast("Embedded", given))


def _add_generation(app: FastAPI, generations: Answerers[Generation]) -> None:
    @app.post("/v1/completions", response_model=CompletionReply, responses=STREAMED)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await generations.of(body.model, request).complete(body, request)

    @app.post("/v1/chat/completions", response_model=ChatReply, responses=STREAMED)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await generations.of(body.model, request).converse(body, request)


def _add_classification(app: FastAPI, classifications: Answerers[Classification]) -> None:
    @app.post("/v1/classify")
    async def classify(body: ClassifyRequest, request: Request) -> ClassifyReply:
        return await classifications.of(body.model, request).answer(body, request)

    @app.post("/v1/score")
    async def score(body: ScoreRequest, request: Request) -> ScoreReply:
        return await classifications.of(body.model, request).score(body, request)
