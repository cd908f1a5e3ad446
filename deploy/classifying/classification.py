"""/v1/classify, /v1/score: texts are encoded beside the event loop, and answered together."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from fastapi import Request
from opentelemetry.trace import Span

from offramp.controller.errors import RequestError
from offramp.deploy.clients.quotas import Quotas
from offramp.deploy.http.backend import ClassBackend
from offramp.deploy.http.limits import DeadlineError, HttpLimits
from offramp.deploy.http.observability.access_log import REQUEST_ID
from offramp.deploy.http.observability.metrics import ModelMetrics
from offramp.deploy.http.observability.tracing import Spans, of_texts
from offramp.deploy.http.shapes.class_shapes import (
    ClassifyReply,
    ClassifyRequest,
    TextClass,
    quality_within,
)
from offramp.deploy.http.shapes.score_shapes import (
    ScoreOptions,
    ScoreReply,
    ScoreRequest,
    TextScore,
    scored_label,
)
from offramp.worker.classifying.classified_text import ClassifiedText


class Classification:
    """Answers the routes of a pool that classifies.

    Args:
        backend: What classifies.
        limits: How much and how long a client may ask.
        metrics: Told of every text.
        quotas: Says what each client may ask, and counts it.
        spans: Makes a span of each request; None: there are no traces.
    """

    def __init__(
        self,
        backend: ClassBackend,
        limits: HttpLimits,
        metrics: ModelMetrics,
        quotas: Quotas,
        spans: Spans | None = None,
    ) -> None:
        self._backend, self._limits = backend, limits
        self._metrics, self._quotas, self._spans = metrics, quotas, spans

    async def answer(self, body: ClassifyRequest, request: Request) -> ClassifyReply:
        """Answer POST /v1/classify.

        Raises:
            RequestError, OverloadedError, QuotaError, DecodeFailedError: it is refused, or failed.
            DeadlineError: it took too long.
        """
        pairs = [("", text) for text in body.texts]
        quality = quality_within(self._least(request), body.offramp)
        found, tokens, _ = await self._classified(
            pairs, "input", body.fields, request, quality=quality
        )
        return {
            "id": f"classify-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": self._backend.model_id,
            "data": [self._said(place, each, body) for place, each in enumerate(found)],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
        }

    async def score(self, body: ScoreRequest, request: Request) -> ScoreReply:
        """Answer POST /v1/score; raises as ``answer`` does."""
        options = body.offramp
        scored_label(options.label, self._backend.labels)  # refused before anything is read
        quality = quality_within(self._least(request), options)
        if options.best and quality is not None:
            problem = "promises no quality: the bounds that it rests on are not certified"
            raise RequestError("offramp.best", problem, "Leave it, or the quality, out")
        found, tokens, label = await self._classified(
            body.pairs, "text_2", body.fields, request, quality=quality, scored=options
        )
        return {
            "id": f"score-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": self._backend.model_id,
            "data": [self._scored(n, each, label, options) for n, each in enumerate(found)],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
        }

    def _least(self, request: Request) -> float | str | None:
        """The quality that the client's key promises."""
        return self._quotas.of(request.scope["state"].get("client")).quality

    async def _classified(
        self,
        pairs: Sequence[tuple[str, str]],
        field: str,
        names: Callable[[int], tuple[str, str]],
        request: Request,
        *,
        quality: float | None,
        scored: ScoreOptions | None = None,
    ) -> tuple[list[ClassifiedText], int, int]:
        """What was found of pairs of texts, how many tokens they are, and which class is scored.

        Errors call all of them by a field, and each by a pair of names.
        """
        began_s = time.perf_counter()
        self._limits.require_choices(len(pairs), field, "answers")
        with self._span(request, began_s) as span:
            try:
                async with asyncio.timeout(self._limits.deadline_s):
                    sequences = await self._backend.encoder.aside(self._encode, pairs, names)
                    tokens = sum(map(len, sequences))
                    self._quotas.take(request.scope["state"].get("client"), "tokens", tokens)
                    found, label = await self._found(sequences, quality, request, scored)
            except TimeoutError as error:
                raise DeadlineError("the request's deadline has passed") from error
            if span is not None:
                span.set_attributes(of_texts(found, tokens))
        layers = [each.layers for each in found]
        self._metrics.count_texts(layers, tokens, time.perf_counter() - began_s)
        return found, tokens, label

    async def _found(
        self,
        sequences: Sequence[Sequence[int]],
        quality: float | None,
        request: Request,
        scored: ScoreOptions | None,
    ) -> tuple[list[ClassifiedText], int]:
        """What a worker found; again if a redeploy has changed the classes meanwhile."""
        while True:
            labels = self._backend.labels
            label = 0 if scored is None else scored_label(scored.label, labels)
            best = label if scored is not None and scored.best else None
            found = await self._backend.classify(
                sequences, quality=quality, request_id=request.headers[REQUEST_ID], best=best
            )
            if scored is None or labels == self._backend.labels:
                return found, label

    def _span(self, request: Request, began_s: float) -> AbstractContextManager[Span | None]:
        if self._spans is None:
            return nullcontext()
        about = {
            "gen_ai.request.model": self._backend.model_id,
            "gen_ai.request.id": request.headers[REQUEST_ID],
            "http.route": request.url.path,
        }
        return self._spans.around(request.headers, about, began_s)

    def _encode(
        self, pairs: Sequence[tuple[str, str]], names: Callable[[int], tuple[str, str]]
    ) -> list[list[int]]:
        encode = self._backend.encoder.pair_of
        return [encode(*pair, names(place)) for place, pair in enumerate(pairs)]

    def _scored(
        self, place: int, found: ClassifiedText, label: int, options: ScoreOptions
    ) -> TextScore:
        said: TextScore = {"index": place, "object": "score", "score": found.probs[label]}
        if options.stats:
            said["offramp"] = self._stats(found)
        if options.best:
            said["offramp"] = said.get("offramp", {}) | {"best": found.is_best}
        return said

    def _stats(self, found: ClassifiedText) -> dict[str, Any]:
        return {
            "exit_layer": found.layers,
            "layers": self._backend.layers,
            "generation": found.generation,
            "energy": found.energy and found.energy._asdict(),
        }

    def _said(self, place: int, found: ClassifiedText, body: ClassifyRequest) -> TextClass:
        said: TextClass = {
            "index": place,
            "label": found.name,
            "probs": list(found.probs),
            "num_classes": len(found.probs),
        }
        if body.offramp.stats:
            said["offramp"] = self._stats(found)
        return said
