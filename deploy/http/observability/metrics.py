"""What Prometheus is told of requests, as their clients see them.

Where vLLM counts the same thing, names after the prefix, labels and buckets are vLLM's.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from offramp.controller.errors import OfframpError
from offramp.deploy.http.backend import Tokens
from offramp.deploy.http.observability.worker_metrics import PREFIX, WorkerMetrics
from offramp.deploy.http.served_models import ServedModels
from offramp.worker.decoding.request import CompletionStats, TokenEvent

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


Each = TypeVar("Each", "_Counter", "_Histogram")


class Metrics:
    """Counts what one server does.

    Args:
        models: What answers for each model.

    Attributes:
        by_model: Counts the requests of one model, by its name.
    """

    def __init__(self, models: ServedModels) -> None:
        self._registry = CollectorRegistry()
        self._only = models.only or ""
        self._replies = Counter(
            PREFIX + "http_requests",
            "Replies by their status; 0: the client left before there was one",
            ("model_name", "status"),
            registry=self._registry,
        )
        families = _Families(self._registry)
        self.by_model = {
            name: ModelMetrics(families, name, pool.layers) for name, pool in models.by_name.items()
        }
        self._registry.register(WorkerMetrics(models))

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self._registry)

    def count_reply(self, status: int, model: str) -> None:
        """Count a reply, of whatever route, once it has ended; "": it asked for no model."""
        self._replies.labels(model or self._only, str(status)).inc()


class _Families:
    """Makes the metrics that each model has."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._counted: dict[str, _Counted] = {}
        self.ended = Counter(
            PREFIX + "request_success",
            "Completions by their end; abort, error: not a success",
            ("model_name", "finished_reason"),
            registry=registry,
        )

    def counter(self, name: str, text: str, model: str) -> _Counter:
        """Make one model's counter."""
        return self._add(name, model, _Counter(), CounterMetricFamily, text)

    def histogram(self, name: str, text: str, model: str, bounds: tuple[float, ...]) -> _Histogram:
        """Make one model's histogram."""
        return self._add(name, model, _Histogram(bounds), HistogramMetricFamily, text)

    def _add(
        self, name: str, model: str, metric: Each, family: Callable[..., Any], text: str
    ) -> Each:
        if name not in self._counted:
            self._counted[name] = found = _Counted(
                partial(family, PREFIX + name, text, labels=("model_name",))
            )
            self._registry.register(found)
        self._counted[name].by_model[model] = metric
        return metric


class ModelMetrics:
    """Counts the requests of one model.

    Args:
        families: Makes metrics, or finds them.
        model: Name of the model.
        layers: Number of its layers.
    """

    def __init__(self, families: _Families, model: str, layers: int) -> None:
        self._layers = layers

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> _Histogram:
            return families.histogram(name, text, model, buckets)

        def counter(name: str, text: str) -> _Counter:
            return families.counter(name, text, model)

        self._first = histogram("time_to_first_token_seconds", "To the first token", FIRST_S)
        self._gap = histogram("inter_token_latency_seconds", "Between two tokens", GAP_S)
        self._whole = histogram("e2e_request_latency_seconds", "To the last token", WHOLE_S)
        self._queued = histogram("request_queue_time_seconds", "In line", WHOLE_S)
        self._depth = histogram(
            "exit_layer",
            "Layers before a token was emitted, or a text classified",
            tuple(range(1, layers + 1)),
        )
        self._prompt = counter("prompt_tokens", "Tokens of prompts")
        self._asked = counter("prefix_cache_queries", "Tokens of prompts that were looked up")
        self._known = counter("prefix_cache_hits", "Those of them that were known")
        self._made = counter("generation_tokens", "Tokens emitted")
        self._run = counter("layers_executed", "Layers executed after prompts")
        self._full = counter("layers_full_depth", "Layers of the same tokens at full depth")
        self._drafts = counter("spec_decode_num_draft_tokens", "Tokens drafted")
        self._accepted = counter("spec_decode_num_accepted_tokens", "Drafts confirmed")
        self._ended = partial(families.ended.labels, model)

    @contextmanager
    def following(self, completions: int, began_s: float) -> Iterator[Callable[[Tokens], None]]:
        """Count one request, until the block ends; what is entered is told its tokens.

        Args:
            completions: How many end in it.
            began_s: When the request came, by ``time.perf_counter`` (uvloop counts milliseconds).
        """
        told_s: dict[int, float] = {}
        reason = "abort"

        def count(tokens: Tokens) -> None:
            nonlocal completions
            now_s = time.perf_counter()
            for index, event in tokens:
                self._count_token(event, now_s - began_s, now_s, told_s.get(index))
                told_s[index] = now_s
                completions -= event.finish_reason is not None

        try:
            yield count
        except OfframpError:
            reason = "error"
            raise
        finally:
            self._ended(reason).inc(completions)

    def count_texts(self, layers: Sequence[int], tokens: int, seconds: float) -> None:
        """Count texts that were classified.

        Args:
            layers: Layers that each ran.
            tokens: Tokens of all of them.
            seconds: From the request to its answer.
        """
        self._prompt.inc(tokens)
        self._whole.observe(seconds)
        self._ended("stop").inc(len(layers))
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
            self._ended(event.finish_reason).inc()
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


class _Counter:
    """Counts, for one thread: without the locks that prometheus_client's has, as ``_Histogram``."""

    def __init__(self) -> None:
        self._count = 0
        self._created_s = time.time()

    def inc(self, by: int = 1) -> None:
        """Count so many more."""
        self._count += by

    def add_to(self, family: CounterMetricFamily, model: str) -> None:
        """Tell what was counted."""
        family.add_metric((model,), self._count, created=self._created_s)


class _Histogram:
    """Counts values by bucket, for one thread: without the locks that prometheus_client's has.

    Two are told of every token; theirs took a fifth of what the front spends on one.
    """

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value; a bucket holds what is at most its bound."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def add_to(self, family: HistogramMetricFamily, model: str) -> None:
        """Tell what was counted."""
        names = [*map(floatToGoString, self._bounds), "+Inf"]
        buckets = list(zip(names, accumulate(self._counts), strict=True))
        family.add_metric((model,), buckets, self._sum)


class _Counted(Collector):
    """Tells the metrics of one name, a model each."""

    def __init__(self, family: Callable[[], Any]) -> None:
        self._family = family
        self.by_model: dict[str, _Counter | _Histogram] = {}

    def collect(self) -> Iterator[Metric]:
        family = self._family()
        for model, metric in self.by_model.items():
            metric.add_to(family, model)
        yield family
