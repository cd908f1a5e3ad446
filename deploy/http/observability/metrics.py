"""What Prometheus is told: requests as their clients see them, and workers as they report.

Where vLLM counts the same thing, names after the prefix, labels and buckets are vLLM's.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from offramp.controller.errors import OfframpError
from offramp.deploy.http.backend import Pool, Tokens
from offramp.worker.decoding.request import CompletionStats, TokenEvent

PREFIX = "offramp_"

# fmt: off
FIRST_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
           10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)
"""Buckets of the time to the first token."""

GAP_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0,
         2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
"""Buckets of the time between two tokens: vLLM's, and three below them."""

WHOLE_S = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0,
           240.0, 480.0, 960.0, 1920.0, 7680.0)
"""Buckets of what a completion takes, or waits, in all."""
# fmt: on

REPORTED = {
    "num_requests_running": ("running", "Completions that a worker decodes"),
    "num_requests_waiting": ("waiting", "Completions that wait for a slot of a worker"),
    "tokens_under_way": ("tokens", "Tokens of its requests: prompts, and all that they may make"),
    "kept_prompts_total": ("kept", "Prompts sent to a worker since it had read their beginning"),
    "moved_prompts_total": ("moved", "Those sent to it since all who had were too busy"),
    "policy_generation": ("generation", "Release that a worker runs; 0: full depth"),
    "policy_stale_seconds": ("stale_s", "Since when a worker cannot tell which release is newest"),
    "guardrail_trips_total": ("trips", "Releases that a worker took out of service"),
    "policy_point": (
        "point",
        "Certified setting that it runs at, from 1, the safest, on; 0: fixed",
    ),
    "policy_moves_total": ("moves", "How often that setting changed"),
    "audited_tokens_total": ("audited", "Early tokens that full depth was asked about"),
    "audit_disagreements_total": ("disagreed", "Those that full depth would not have emitted"),
}
"""What workers report: the field of their report, and what it says."""

TRAFFIC = {
    "live_traffic_tokens_total": ("recorded_tokens", "Tokens of live traffic that were recorded"),
    "live_traffic_passed_over_total": (
        "passed_over",
        "Requests that were not recorded: no time was left, or they were too long",
    ),
    "live_traffic_kept_total": ("kept", "Recorded requests that were written to disk"),
    "live_traffic_dropped_total": ("dropped", "Those that gave way to newer ones"),
    "live_traffic_lost_total": ("lost", "Recorded requests that never reached the disk"),
}
"""What workers that keep live traffic report of it: the field under ``traffic``, and what it says.
"""


class Metrics:
    """Counts what one server does.

    Args:
        backend: What decodes; its workers' reports are looked up each time Prometheus asks.
    """

    def __init__(self, backend: Pool) -> None:
        self._registry = CollectorRegistry()
        self._model, self._layers = backend.model_id, backend.layers
        self._first = self._histogram("time_to_first_token_seconds", "To the first token", FIRST_S)
        self._gap = self._histogram("inter_token_latency_seconds", "Between two tokens", GAP_S)
        self._whole = self._histogram("e2e_request_latency_seconds", "To the last token", WHOLE_S)
        self._queued = self._histogram("request_queue_time_seconds", "In line", WHOLE_S)
        depths = tuple(range(1, self._layers + 1))
        self._depth = self._histogram(
            "exit_layer", "Layers before a token was emitted, or a text classified", depths
        )
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts")
        self._asked = self._counter("prefix_cache_queries", "Tokens of prompts that were looked up")
        self._known = self._counter("prefix_cache_hits", "Those of them that were known")
        self._made = self._counter("generation_tokens", "Tokens emitted")
        self._run = self._counter("layers_executed", "Layers executed after prompts")
        self._full = self._counter("layers_full_depth", "Layers of the same tokens at full depth")
        self._drafts = self._counter("spec_decode_num_draft_tokens", "Tokens drafted")
        self._accepted = self._counter("spec_decode_num_accepted_tokens", "Drafts confirmed")
        self._replies = Counter(
            PREFIX + "http_requests",
            "Replies by their status; 0: the client left before there was one",
            ("model_name", "status"),
            registry=self._registry,
        )
        self._ended = Counter(
            PREFIX + "request_success",
            "Completions by their end; abort, error: not a success",
            ("model_name", "finished_reason"),
            registry=self._registry,
        )
        self._registry.register(_Reports(backend))

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> _Histogram:
        histogram = _Histogram(PREFIX + name, text, self._model, buckets)
        self._registry.register(histogram)
        return histogram

    def _counter(self, name: str, text: str) -> Counter:
        family = Counter(PREFIX + name, text, ("model_name",), registry=self._registry)
        return family.labels(self._model)

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self._registry)

    def count_reply(self, status: int) -> None:
        """Count a reply, of whatever route, once it has ended."""
        self._replies.labels(self._model, str(status)).inc()

    async def follow(
        self, events: AsyncIterator[Tokens], completions: int, began_s: float
    ) -> AsyncIterator[Tokens]:
        """Pass the events of one request on, and count them.

        Args:
            events: An async generator; closed in any case.
            completions: How many end in it.
            began_s: When the request came, by ``time.perf_counter`` (uvloop counts milliseconds).
        """
        told_s: dict[int, float] = {}
        reason = "abort"
        try:
            async with aclosing(events):  # type: ignore[type-var]  # async generators have aclose
                async for tokens in events:
                    now_s = time.perf_counter()
                    for index, event in tokens:
                        self._count_token(event, now_s - began_s, now_s, told_s.get(index))
                        told_s[index] = now_s
                        completions -= event.finish_reason is not None
                    yield tokens
        except OfframpError:
            reason = "error"
            raise
        finally:
            self._ended.labels(self._model, reason).inc(completions)

    def count_texts(self, layers: Sequence[int], tokens: int, seconds: float) -> None:
        """Count texts that were classified.

        Args:
            layers: Layers that each ran.
            tokens: Tokens of all of them.
            seconds: From the request to its answer.
        """
        self._prompt.inc(tokens)
        self._whole.observe(seconds)
        self._ended.labels(self._model, "stop").inc(len(layers))
        for each in layers:
            self._depth.observe(each)
        self._run.inc(sum(layers))
        self._full.inc(self._layers * len(layers))

    def _count_token(
        self, event: TokenEvent, since_s: float, now_s: float, before_s: float | None
    ) -> None:
        if before_s is None:
            self._first.observe(since_s)
        else:
            self._gap.observe(now_s - before_s)
            self._full.inc(self._layers)
        self._made.inc()
        self._depth.observe(event.exit_layer)
        if event.finish_reason is not None:
            self._whole.observe(since_s)
            self._ended.labels(self._model, event.finish_reason).inc()
        if event.stats is not None:
            self._count_completion(event.stats)

    def _count_completion(self, stats: CompletionStats) -> None:
        self._prompt.inc(stats.prompt_tokens)
        if stats.cached_tokens is not None:
            self._asked.inc(stats.prompt_tokens)
            self._known.inc(stats.cached_tokens)
        self._queued.observe(stats.queued_s)
        self._run.inc(stats.layer_calls)
        self._drafts.inc(stats.drafts)
        self._accepted.inc(stats.drafts_accepted)


class _Histogram(Collector):
    """Counts values by bucket, for one thread: without the locks that prometheus_client's has.

    Two are told of every token; theirs took a fifth of what the front spends on one.
    """

    def __init__(self, name: str, text: str, model: str, bounds: tuple[float, ...]) -> None:
        self._name, self._text, self._model = name, text, model
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value; a bucket holds what is at most its bound."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=("model_name",))
        names = [*map(floatToGoString, self._bounds), "+Inf"]
        buckets = list(zip(names, accumulate(self._counts), strict=True))
        family.add_metric((self._model,), buckets, self._sum)
        yield family


class _Reports(Collector):
    def __init__(self, backend: Pool) -> None:
        self._backend = backend

    def collect(self) -> Iterator[Metric]:
        model, reports = self._backend.model_id, self._backend.reports()
        for name, (field, text) in REPORTED.items():
            yield _by_worker(model, name, text, {r["worker"]: r[field] for r in reports})
        kept = {r["worker"]: r["traffic"] for r in reports if r.get("traffic")}
        for name, (field, text) in TRAFFIC.items():
            yield _by_worker(model, name, text, {each: kept[each][field] for each in kept})
        yield from _energy(model, reports)
        says = ("worker", "digest", "guarantee", "state")
        info = GaugeMetricFamily(
            PREFIX + "policy_info",
            "1, and which policy a worker runs",
            labels=("model_name", *says),
        )
        for report in reports:
            info.add_metric((model, *(report[field] for field in says)), 1)
        yield info
        tasks = GaugeMetricFamily(
            PREFIX + "asyncio_tasks",
            "Tasks of a process's event loop: as many as there are requests, and a few",
            labels=("model_name", "process"),
        )
        tasks.add_metric((model, "front"), _tasks_here())
        for report in reports:
            tasks.add_metric((model, report["worker"]), report["tasks"])
        yield tasks


def _energy(model: str, reports: Sequence[Mapping[str, Any]]) -> Iterator[Metric]:
    """Joules and tokens of the steps that were read: no sample where the energy is unknown."""
    labels = ("model_name", "worker", "method", "source")
    joules = CounterMetricFamily(
        PREFIX + "energy_joules", "Energy of the decoding steps at which it was read", labels=labels
    )
    tokens = CounterMetricFamily(
        PREFIX + "energy_tokens", "Tokens that these steps emitted", labels=labels
    )
    for report in reports:
        for method, source, taken, emitted in report.get("energy", ()):
            named = (model, report["worker"], method, source)
            joules.add_metric(named, taken)
            tokens.add_metric(named, emitted)
    yield joules
    yield tokens


def _by_worker(model: str, name: str, text: str, values: Mapping[str, float]) -> Metric:
    """One sample per worker: a counter if the name says so, else a gauge."""
    kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
    family = kind(PREFIX + name, text, labels=("model_name", "worker"))
    for worker, value in values.items():
        family.add_metric((model, worker), value)
    return family


def _tasks_here() -> int:
    try:
        return len(asyncio.all_tasks())
    except RuntimeError:  # asked from outside of a loop
        return 0
