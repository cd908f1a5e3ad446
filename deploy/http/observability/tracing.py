"""Sends an OpenTelemetry span per request to a collector: how long it took, what its exits did.

Names are OpenTelemetry's own for generative AI, and vLLM's where it has none.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from opentelemetry.propagate import extract
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer

from offramp.controller.costs.readings import EnergyShare
from offramp.controller.errors import ConfigError, OfframpError
from offramp.deploy.http.backend import Tokens
from offramp.worker.classifying.classified_text import ClassifiedText
from offramp.worker.decoding.request import CompletionStats, TokenEvent

SPAN = "llm_request"
"""Name of each span, as vLLM's."""

_EXPORTER = "opentelemetry.exporter.otlp.proto.http.trace_exporter"


class Spans:
    """Makes a span of each request, below its client's if it sent a ``traceparent``.

    Args:
        tracer: Makes spans.
        close: Called at the end, to send what waits.
    """

    def __init__(self, tracer: Tracer, close: Any = lambda: None) -> None:
        self._tracer = tracer
        self.close = close

    @classmethod
    def to(cls, endpoint: str) -> Spans:
        """Send them to a collector's URL for traces, by OTLP over HTTP.

        Raises:
            ConfigError: what sends them is not installed.
        """
        require_exporter()
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        provider = TracerProvider(resource=Resource.create({"service.name": "offramp"}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
        return cls(provider.get_tracer("offramp"), provider.shutdown)

    @contextmanager
    def around(
        self, headers: Mapping[str, str], about: Mapping[str, Any], began_s: float
    ) -> Iterator[Span]:
        """Make a span of what is done meanwhile; an error of ours marks it.

        Args:
            headers: The request's.
            about: Attributes that are known beforehand.
            began_s: When the request came, by ``time.perf_counter``.
        """
        start_ns = time.time_ns() - round((time.perf_counter() - began_s) * 1e9)
        span = self._tracer.start_span(
            SPAN, extract(headers), SpanKind.SERVER, dict(about), start_time=start_ns
        )
        try:
            yield span
        except OfframpError as error:
            span.set_status(Status(StatusCode.ERROR, str(error)))
            raise
        finally:
            span.end()

    @contextmanager
    def following(
        self, headers: Mapping[str, str], about: Mapping[str, Any], began_s: float
    ) -> Iterator[Callable[[Tokens], None]]:
        """Make a span of one request, until the block ends; what is entered is told its tokens.

        Args:
            headers, about, began_s: What ``around`` takes.
        """
        ends: list[TokenEvent] = []
        tokens, first_s = 0, 0.0

        def note(came: Tokens) -> None:
            nonlocal tokens, first_s
            first_s = first_s or time.perf_counter() - began_s
            tokens += len(came)
            ends.extend(event for _, event in came if event.finish_reason is not None)

        with self.around(headers, about, began_s) as span:
            try:
                yield note
            finally:
                span.set_attribute("gen_ai.usage.output_tokens", tokens)
                span.set_attribute("gen_ai.latency.time_to_first_token", first_s)
                span.set_attributes(_of_ends(ends))


def require_exporter() -> None:
    """Refuse to trace without what sends spans.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        found = importlib.util.find_spec(_EXPORTER)
    except ModuleNotFoundError:  # of a package above it
        found = None
    if found is None:
        problem = "needs OpenTelemetry's exporter, which is not installed"
        raise ConfigError("OFFRAMP_OTLP_ENDPOINT", problem, 'Run pip install "offramp[otel]"')


def of_texts(found: Sequence[ClassifiedText], tokens: int) -> dict[str, Any]:
    """What is said of texts that were classified: how deep each went, under which releases.

    Args:
        found: What became of each, at least one.
        tokens: Tokens of all of them.
    """
    layers = [each.layers for each in found]
    return {
        "gen_ai.usage.input_tokens": tokens,
        "offramp.texts": len(found),
        "offramp.generation": max(each.generation for each in found),
        "offramp.mean_exit_layer": sum(layers) / len(layers),
        "offramp.layer_calls": sum(layers),
        **_energy_of([each.energy for each in found]),
    }


def _energy_of(shares: Sequence[EnergyShare | None]) -> dict[str, Any]:
    """What all of a request took; nothing if a part is unknown, or was read another way."""
    known = [each for each in shares if each is not None]
    if len(known) < len(shares) or len({(each.method, each.source) for each in known}) != 1:
        return {}
    return {
        "offramp.energy_joules": sum(each.joules for each in known),
        "offramp.energy_method": known[0].method.value,
        "offramp.energy_source": known[0].source,
    }


def _of_ends(ends: list[TokenEvent]) -> dict[str, Any]:
    """What the completions that came to their end cost together."""
    told: list[CompletionStats] = [each.stats for each in ends if each.stats is not None]
    reasons = {"gen_ai.response.finish_reasons": [str(each.finish_reason) for each in ends]}
    if not told:
        return reasons
    return reasons | {
        "gen_ai.usage.input_tokens": sum(each.prompt_tokens for each in told),
        "gen_ai.latency.time_in_queue": max(each.queued_s for each in told),
        "offramp.generation": told[-1].generation,
        "offramp.mean_exit_layer": sum(each.mean_exit_layer for each in told) / len(told),
        "offramp.exact_share": sum(each.exact_share for each in told) / len(told),
        "offramp.layer_calls": sum(each.layer_calls for each in told),
        "offramp.copy_calls": sum(each.copy_calls for each in told),
        "offramp.prompt_calls": sum(each.prompt_calls for each in told),
        "offramp.drafts": sum(each.drafts for each in told),
        "offramp.drafts_accepted": sum(each.drafts_accepted for each in told),
        "offramp.cached_tokens": sum(each.cached_tokens or 0 for each in told),
        **_energy_of([each.energy for each in told]),
    }
