"""POST /v1/classify: texts are encoded beside the event loop, classified, and answered together."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence

from fastapi import Request

from offramp.controller.errors import RequestError
from offramp.deploy.clients.quotas import Quotas
from offramp.deploy.http.access_log import REQUEST_ID
from offramp.deploy.http.backend import ClassBackend
from offramp.deploy.http.limits import DeadlineError, HttpLimits
from offramp.deploy.http.metrics import Metrics
from offramp.deploy.http.shapes.class_shapes import (
    ClassifyReply,
    ClassifyRequest,
    TextClass,
    quality_within,
)
from offramp.worker.classifying.text_service import ClassifiedText


class Classification:
    """Answers the route that classifies.

    Args:
        backend: What classifies.
        limits: How much and how long a client may ask.
        metrics: Told of every text.
        quotas: Says what each client may ask, and counts it.
    """

    def __init__(
        self, backend: ClassBackend, limits: HttpLimits, metrics: Metrics, quotas: Quotas
    ) -> None:
        self._backend, self._limits = backend, limits
        self._metrics, self._quotas = metrics, quotas

    async def answer(self, body: ClassifyRequest, request: Request) -> ClassifyReply:
        """Answer POST /v1/classify.

        Raises:
            RequestError, OverloadedError, QuotaError, DecodeFailedError: it is refused, or failed.
            DeadlineError: it took too long.
        """
        began_s = time.perf_counter()
        backend, texts = self._backend, body.texts
        client = request.scope["state"].get("client")
        quality = quality_within(self._quotas.of(client).quality, body.quality)
        self._limits.require_choices(len(texts), "input", "answers")
        try:
            async with asyncio.timeout(self._limits.deadline_s):
                sequences = await backend.encoder.aside(self._encode, texts)
                tokens = sum(map(len, sequences))
                self._quotas.take(client, "tokens", tokens)
                found = await backend.classify(
                    sequences, quality=quality, request_id=request.headers[REQUEST_ID]
                )
        except TimeoutError as error:
            raise DeadlineError("the request's deadline has passed") from error
        seconds = time.perf_counter() - began_s
        self._metrics.count_texts([each.layers for each in found], tokens, seconds)
        return {
            "id": f"classify-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": backend.model_id,
            "data": [self._said(place, each, body) for place, each in enumerate(found)],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
        }

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        encoder, most = self._backend.encoder, self._backend.most_tokens
        sequences = []
        for place, text in enumerate(texts):
            field = f"input[{place}]"
            try:
                tokens = encoder.tokens_of(text)
            except RequestError as error:
                raise RequestError(field, error.problem, error.remedy) from error
            if not 1 <= len(tokens) <= most:
                problem = f"has {len(tokens)} tokens, and the model's context is {most}"
                raise RequestError(field, problem, "Shorten it, or give it words")
            sequences.append(tokens)
        return sequences

    def _said(self, place: int, found: ClassifiedText, body: ClassifyRequest) -> TextClass:
        labels = self._backend.labels
        said: TextClass = {
            "index": place,
            "label": labels[found.label],
            "probs": list(found.probs),
            "num_classes": len(labels),
        }
        if body.offramp.stats:
            said["offramp"] = {
                "exit_layer": found.layers,
                "layers": self._backend.layers,
                "generation": found.generation,
            }
        return said
